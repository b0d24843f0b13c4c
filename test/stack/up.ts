// make up: installs what is missing, starts what does not run, waits until it serves. Safe to repeat; data is never removed.
// ENV_FILE (default .env, copied from .env.example where there is none) says where each part is to be.
import { constants, copyFileSync, existsSync } from "node:fs";
import { join } from "node:path";
import { afterStart } from "./after-start.ts";
import { type Env, endpoint, localEnv, notOurs, root } from "./env.ts";
import { type Install, installed, runInstall, stopInstalls } from "./install.ts";
import { parts } from "./parts.ts";
import { awaitReady, checkPort, commandKey, running, startPart, stopProcess } from "./process.ts";
import { lockStack, type Part, say, stackPath } from "./stack.ts";

/** Waits for all, then throws the failures together: one broken part does not hide another. */
async function all(work: Promise<unknown>[]): Promise<void> {
  const failures = (await Promise.allSettled(work)).filter((result) => result.status === "rejected");
  if (failures.length > 0) throw new Error([...new Set(failures.map(({ reason }) => reason.message))].join("\n\n"));
}

async function start(part: Part, env: Env): Promise<void> {
  const since = Date.now();
  const record = running(part.name);
  if (record && record.key !== commandKey(part.command(env, stackPath(part.name)), part.installs)) {
    say(`${part.name}: its settings changed, restarting`);
    await stopProcess(part.name);
  }
  const fresh = !running(part.name);
  if (fresh) {
    await checkPort(part.name, env[part.variable] ?? "", `Stop that process, or set another port in ${part.variable} (${env.ENV_FILE})`);
    await startPart(part, env);
  } else await awaitReady(part.name, () => part.ready(env));
  const { host, port } = endpoint(env[part.variable] ?? "");
  say(`${part.name}: ${fresh ? `started in ${((Date.now() - since) / 1000).toFixed(1)} s` : "runs"} at ${host}:${port}`);
}

async function up(): Promise<void> {
  await lockStack();
  const file = process.env.ENV_FILE || ".env";
  if (file === ".env" && !existsSync(join(root, file))) {
    copyFileSync(join(root, ".env.example"), join(root, file), constants.COPYFILE_EXCL);
    say("setup: .env copied from .env.example");
  }
  const env = localEnv(file);
  const ours = parts.filter((part) => {
    const reason = notOurs(part.variable, env);
    if (reason) say(`${part.name}: ${reason}: not ours, not started`);
    return !reason;
  });
  const missing = new Set(ours.flatMap((part) => part.installs).filter((install) => !installed(install)));
  const outdated = ours.filter((part) => part.installs.some((install) => missing.has(install)));
  await all(outdated.map((part) => stopProcess(part.name)));
  const installing = new Map<Install, Promise<void>>([...missing].map((install) => [install, runInstall(install)]));
  // A part starts as soon as its own installs are done.
  await all(
    ours.map(async (part) => {
      await Promise.all(part.installs.map((install) => installing.get(install)));
      await start(part, env);
    }),
  );
  for (const step of afterStart.filter(({ name }) => !process.argv.includes(`--without=${name}`))) {
    if (!step.needs.every((name) => ours.some((part) => part.name === name))) continue;
    const since = Date.now();
    await step.run(env);
    say(`${step.name}: done in ${((Date.now() - since) / 1000).toFixed(1)} s`);
  }
}

for (const signal of ["SIGINT", "SIGTERM", "SIGHUP"])
  process.on(signal, () => {
    stopInstalls();
    say("make up: stopped; what already runs stays, the rest is done by the next make up");
    process.exit(130);
  });
await up().catch((error: Error) => {
  stopInstalls();
  say(error.message);
  process.exit(1);
});
