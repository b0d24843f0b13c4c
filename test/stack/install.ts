// Installing into .stack/ what the parts need, once.
import { type ChildProcess, spawn } from "node:child_process";
import { once } from "node:events";
import { existsSync, mkdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { text } from "node:stream/consumers";
import { type Env, root } from "./env.ts";
import { digest, lockStack, say, stackPath } from "./stack.ts";

/** Something to have in .stack/ before a part can start; parts may share one. `definition` is all that decides its content. */
export type Install = { name: string; definition: () => string; run: () => Promise<void> };

const stampPath = (install: Install): string => stackPath("stamps", install.name);
export const installKey = (install: Install): string => digest(install.definition());

export const installed = (install: Install): boolean =>
  existsSync(stampPath(install)) && readFileSync(stampPath(install), "utf8") === installKey(install);

/** The stamp is written last: an install that was killed half-way is done again. */
export async function runInstall(install: Install): Promise<void> {
  const started = Date.now();
  say(`${install.name}: installing`);
  rmSync(stampPath(install), { force: true });
  const key = installKey(install);
  await install.run();
  mkdirSync(stackPath("stamps"), { recursive: true });
  writeFileSync(stampPath(install), key);
  say(`${install.name}: installed in ${((Date.now() - started) / 1000).toFixed(1)} s`);
}

/** For those who need what is installed, not the part: `await ensureInstalled(pythonInstall)`. */
export async function ensureInstalled(install: Install): Promise<void> {
  if (installed(install)) return;
  const release = await lockStack();
  try {
    if (!installed(install)) await runInstall(install);
  } finally {
    release();
  }
}

const installers = new Set<ChildProcess>();

/** Ends the installs under way, with all that they started. */
export function stopInstalls(): void {
  for (const { pid } of installers) if (pid) process.kill(-pid, "SIGKILL");
}

type RunOptions = { cwd?: string; env?: Env; needs?: string };

/** Runs a command to its end, and answers its standard output. Its output goes into the error where it fails. */
export async function run(command: string, args: string[], { cwd = root, env = process.env, needs }: RunOptions = {}): Promise<string> {
  const child = spawn(command, args, { cwd, env, stdio: ["ignore", "pipe", "pipe"], detached: true });
  installers.add(child);
  const output = Promise.all([text(child.stdout), text(child.stderr)]);
  const [code, signal] = await once(child, "close")
    .catch((error: NodeJS.ErrnoException) => {
      throw error.code === "ENOENT" && needs ? new Error(`${command}: not found on PATH. ${needs}`) : error;
    })
    .finally(() => installers.delete(child));
  const said = await output;
  if (code === 0) return said[0];
  throw new Error(`${command} ${args.join(" ")}: ${signal ?? `exit ${code}`}\n${said.join("").trim().split("\n").slice(-20).join("\n")}`);
}
