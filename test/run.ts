/**
 * make test: starts the local stack where it does not run, runs every test on it, and stops it again if it started it.
 * Always on the local stack's own addresses (.env.example), whatever .env says.
 *   node test/run.ts [files]    some of them
 */
import { spawn } from "node:child_process";
import { once } from "node:events";
import { globSync } from "node:fs";
import { join } from "node:path";
import { localEnv, root } from "./stack/env.ts";
import { parts } from "./stack/parts.ts";
import { running } from "./stack/process.ts";
import { say } from "./stack/stack.ts";

const env = localEnv();
const ours = parts.some((part) => running(part.name));

async function node(args: string[], stdio: "inherit" | "ignore" = "inherit"): Promise<number> {
  const child = spawn(process.execPath, args, { cwd: root, env, stdio });
  const [code] = await once(child, "close");
  return code ?? 1;
}

/** Those of the sensors start a Kafka, a Connect and a ClickHouse each: far from one another, so that no two of them run at once. */
function spread(files: string[]): string[] {
  const heavy = files.filter((file) => file.includes("/sensors."));
  const others = files.filter((file) => !heavy.includes(file));
  return heavy.flatMap((file, at) => {
    const [from, to] = [at, at + 1].map((n) => Math.round((n * others.length) / heavy.length));
    return [file, ...others.slice(from, to)];
  });
}

// Ctrl-C reaches the children as well; what is left to do here is to stop the stack.
for (const signal of ["SIGINT", "SIGTERM"]) process.on(signal, () => say(`make test: ${signal}, stopping`));

say("test: starting the local stack (make up)");
let code = await node([join("test", "stack", "up.ts"), "--without=real-data"]);
if (code === 0) {
  const named = process.argv.slice(2);
  const files = named.length ? named : spread(globSync("test/**/*.test.ts", { cwd: root }).sort());
  say(`test: ${files.length} files, two at a time`);
  // The limit is for a file as a whole too: one that leaves something open, and so never ends, is ended.
  code = await node(["--test", "--test-timeout=900000", "--test-concurrency=2", ...files]);
}
// Quietly: the last lines are the test runner's.
if (!ours) await node([join("test", "stack", "down.ts")], "ignore");
process.exit(code);
