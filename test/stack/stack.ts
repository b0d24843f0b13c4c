// What every file of the local stack shares: its paths, what a part is, the lock.
import { createHash } from "node:crypto";
import { existsSync, mkdirSync, readFileSync, writeFileSync } from "node:fs";
import { createServer } from "node:net";
import { join } from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import { type Env, root } from "./env.ts";
import type { Install } from "./install.ts";
import type { Command } from "./process.ts";

export const stackDir = join(root, ".stack");
export const stackPath = (...names: string[]): string => join(stackDir, ...names);
export const logPath = (name: string): string => stackPath("log", `${name}.log`);
export const say = (line: string): void => void process.stderr.write(`${line}\n`);

export const digest = (text: string): string => createHash("sha256").update(text).digest("hex").slice(0, 16);

export type Part = {
  name: string;
  /** The environment variable that says where it is: a URL or host:port. */
  variable: string;
  installs: Install[];
  /** Puts into its folder what must be there before the start. Idempotent. */
  prepare?: (env: Env, folder: string) => Promise<void>;
  command: (env: Env, folder: string) => Command;
  /** Resolves once the part can serve; throws until then. */
  ready: (env: Env) => Promise<void>;
};

/**
 * Takes the lock of this checkout's stack, and answers what releases it; waits for another holder, and says so. The lock is
 * an abstract Unix socket: the kernel releases it when its process ends, however it ends, so it can never be stale.
 */
export async function lockStack(): Promise<() => void> {
  mkdirSync(stackDir, { recursive: true });
  for (let told = false; ; told = true) {
    const server = createServer().unref();
    const held = await new Promise<boolean>((resolve, reject) => {
      server.once("error", (error: NodeJS.ErrnoException) => (error.code === "EADDRINUSE" ? resolve(false) : reject(error)));
      server.listen(`\0etl-stack-${digest(root)}`, () => resolve(true));
    });
    if (held) {
      writeFileSync(stackPath("lock"), String(process.pid));
      return () => void server.close();
    }
    const holder = existsSync(stackPath("lock")) ? readFileSync(stackPath("lock"), "utf8") : "not known yet";
    if (!told) say(`another make up or down (pid ${holder}) is at work on this stack: waiting for it`);
    await sleep(100);
  }
}
