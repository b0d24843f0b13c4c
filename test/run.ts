/**
 * make test: starts the local stack where it does not run, runs every test on it, and stops it again if it started it.
 * Always on the local stack's own addresses (.env.example), whatever .env says.
 *   node test/run.ts orders test/ops/verify.test.ts    some of them: folders of test/, or files
 * SEED=… is what random tests begin with: 1, or with SOAK=1 another one each time.
 */
import { spawn } from "node:child_process";
import { once } from "node:events";
import { globSync } from "node:fs";
import { join } from "node:path";
import { finished } from "node:stream/promises";
import { run } from "node:test";
import { spec } from "node:test/reporters";
import postgres from "postgres";
import { type Env, localEnv, root } from "./stack/env.ts";
import { parts } from "./stack/parts.ts";
import { running } from "./stack/process.ts";
import { say } from "./stack/stack.ts";

const { SEED = process.env.SOAK === "1" ? String(Date.now() % 1_000_000) : "1" } = process.env;
const env: Env = { ...localEnv(), SEED };
const ours = parts.some((part) => running(part.name));
const stopping = new AbortController();

async function node(args: string[], stdio: "inherit" | "ignore" = "inherit"): Promise<number> {
  const child = spawn(process.execPath, args, { cwd: root, env, stdio });
  const [code] = await once(child, "close");
  return code ?? 1;
}

/** Runs them in this order, which `node --test` would not: it sorts them. @returns whether all passed. */
async function test(files: string[]): Promise<boolean> {
  let passed = true;
  const tests = run({ files, cwd: root, env, concurrency: 3, timeout: 900_000, signal: stopping.signal });
  tests.on("test:fail", () => {
    passed = false;
  });
  const report = tests.compose(spec);
  report.pipe(process.stdout);
  await finished(report);
  return passed;
}

/**
 * The long ones, in this order and far from one another: those that keep both cores busy with servers of their own do not begin together,
 * those that mostly wait are not left alone at the end, and that of the alerts, for which time passes fast, is the first.
 */
const long = `ops/alerting sensors/epoch orders/faults docs/recipes sensors/kill docs/readme
  ops/verify sensors/canary ops/chaos sensors/faults views/views`.split(/\s+/);

function spread(files: string[]): string[] {
  const place = (file: string): number => long.indexOf(file.replace(/^test\/(.*)\.test\.ts$/, "$1"));
  const named = files.filter((file) => place(file) >= 0).sort((one, other) => place(one) - place(other));
  const others = files.filter((file) => place(file) < 0);
  return named.flatMap((file, at) => {
    const [from, to] = [at, at + 1].map((n) => Math.round((n * others.length) / named.length));
    return [file, ...others.slice(from, to)];
  });
}

/** The test files that a word of TESTS= names: itself, or those of a folder of test/. */
const under =
  (all: string[]) =>
  (word: string): string[] => {
    const files = word.endsWith(".test.ts") ? [word] : all.filter((file) => file.startsWith(`test/${word}/`));
    if (!files.length) throw new Error(`TESTS=${word}: neither a test file nor a folder of test/ with tests`);
    return files;
  };

/** The databases that earlier runs cloned their shops from: each run makes its own. */
async function dropTemplates(): Promise<void> {
  const server = postgres(env.STACK_ADMIN_DATABASE_URL ?? "", { max: 1, onnotice: () => {} });
  for (const { datname } of await server`select datname from pg_database where datname like 'test\\_template\\_%'`)
    await server.unsafe(`drop database ${datname} with (force)`);
  await server.end();
}

// Ctrl-C reaches the children as well; what is left to do here is to begin no further file, and to stop the stack.
for (const signal of ["SIGINT", "SIGTERM"])
  process.on(signal, () => {
    say(`make test: ${signal}, stopping`);
    stopping.abort();
  });

say("test: starting the local stack (make up)");
let code = await node([join("test", "stack", "up.ts"), "--without=real-data"]);
if (code === 0) {
  await dropTemplates();
  const named = process.argv.slice(2);
  const all = globSync("test/**/*.test.ts", { cwd: root }).sort();
  const files = named.length ? named.flatMap(under(all)) : spread(all);
  say(`test: ${files.length} files, three at a time, SEED=${SEED}`);
  code = (await test(files)) && !stopping.signal.aborted ? 0 : 1;
}
// Quietly: the last lines are the test runner's.
if (!ours) await node([join("test", "stack", "down.ts")], "ignore");
process.exit(code);
