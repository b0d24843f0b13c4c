// No secret in anything that a command leaves: what it prints, schema etl, metrics, process titles, objects, jobs, files. Every command of
// scripts/ is run, and of each client one with faults in which its error tends to quote what it was given. Needs make up.
import assert from "node:assert/strict";
import { globSync, mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, before, test } from "node:test";
import { HeadObjectCommand } from "@aws-sdk/client-s3";
import { listObjects } from "../../shared/events/s3.ts";
import { createSensors, type Sensors } from "../lib/sensors.ts";
import type { Result, Shop } from "../lib/shop.ts";
import { type Env, root } from "../stack/env.ts";

/** Part of every secret that is given below. The real ones of the local stack are "local-only". */
const mark = "HUSH";
const real = "local-only";
/** Quotes, a backslash, a slash and a space: what is written differently in JSON, in a URL and in a log line. */
const odd = `${mark}"a\\b'c/d e`;

const temporary = mkdtempSync(join(tmpdir(), "etl-secrets-"));
let sensors: Sensors;
let shop: Shop;
before(async () => {
  sensors = await createSensors({ pushgateway: true });
  shop = sensors.shop;
  await shop.insertRows(1, 20);
  await shop.insertRows(1, 20, "users");
  await shop.insertEvents("2017-01-01", 10);
  await shop.admin.unsafe(`
    insert into sensor_readings (sensor_id, metric, value) values ('a', 'b', 1);
    alter table orders add channel text;
    create table shops (id bigint primary key, updated_at timestamptz not null default now());
    create index on shops (updated_at)`);
});
after(async () => {
  await sensors?.[Symbol.asyncDispose]();
  rmSync(temporary, { recursive: true, force: true });
});

const days = { FROM: "2017-01-01", TO: "2017-01-02" };
/** What each command is run with, in this order. */
const commands: Record<string, Env[]> = {
  "scripts/ops/migrate.ts": [{}],
  "scripts/ops/doctor.ts": [{}],
  "scripts/orders.ts": [{}, days],
  "scripts/users.ts": [{}],
  "scripts/events.ts": [{}],
  "scripts/ops/backfill-events.ts": [days],
  "scripts/ops/verify-events.ts": [days],
  "scripts/ops/restore-events.ts": [days],
  "scripts/views.ts": [{ ONLY: "weekly_revenue", ALLOW_STALE: "1", ALLOW_SHRINK: "1" }],
  "scripts/ops/connector.ts": [{}],
  "scripts/sensors.ts": [{ UNTIL: "caught-up" }],
  "scripts/ops/dead-letters.ts": [{}],
  "scripts/ops/replay-dead-letters.ts": [{}],
  "scripts/ops/swap-readings.ts": [{}],
  "scripts/ops/resnapshot.ts": [{}],
  "scripts/ops/status.ts": [{}, { JSON: "1" }],
  "scripts/ops/report.ts": [{ OUT: join(temporary, "report.html") }],
  "scripts/ops/new-column.ts": [{ PIPELINE: "orders", COLUMN: "channel", DRY_RUN: "1" }],
  "scripts/ops/new-pipeline.ts": [{ TABLE: "public.shops", EVERY: "1d", DRY_RUN: "1" }],
  "scripts/ops/verify.ts": [{ PIPELINE: "orders" }],
  "scripts/ops/sweep.ts": [{ PIPELINE: "orders" }],
  "scripts/ops/rewind.ts": [{ PIPELINE: "orders", TO: "2017-06-01" }],
};

/** Runs it, and meanwhile reads the command lines and titles of its process and what that starts. */
async function watch(script: string, variables: Env): Promise<{ result: Result; titles: string }> {
  const run = shop.start(script, { ...variables, TMPDIR: temporary });
  const { pid } = run.child;
  let titles = "";
  const look = (): void => {
    try {
      const children = readFileSync(`/proc/${pid}/task/${pid}/children`, "utf8").split(" ").filter(Boolean);
      for (const one of [pid, ...children])
        for (const file of ["cmdline", "comm"]) titles += `${readFileSync(`/proc/${one}/${file}`, "utf8")}\n`;
    } catch {
      // gone
    }
  };
  const timer = setInterval(look, 50);
  const result = await run.ended.finally(() => clearInterval(timer));
  return { result, titles };
}

/** Everything that is left of all runs so far, by where. */
async function leftBehind(): Promise<Record<string, string>> {
  const left: Record<string, string> = {};
  const tables = await shop.admin<{ name: string }[]>`
    select oid::regclass::text as name from pg_class where relnamespace = 'etl'::regnamespace and relkind in ('r', 'v')`;
  for (const { name } of tables)
    left[name] = JSON.stringify([...(await shop.admin.unsafe(`select to_jsonb(t)::text as row from ${name} t`))]);
  const sessions = await shop.admin`select application_name, query from pg_stat_activity where datname = current_database()`;
  left.sessions = JSON.stringify([...sessions]);
  left.Pushgateway = await (await fetch(`${shop.env.PUSHGATEWAY_URL}/metrics`)).text();
  const { jobs }: { jobs: object[] } = await shop.api("/jobs?projection=full&maxResults=500");
  left.BigQuery = jobs
    .map((job) => JSON.stringify(job))
    .filter((job) => job.includes(shop.dataset))
    .join();
  for await (const { key } of listObjects(shop.bucket, shop.bucket.prefix)) {
    const { Metadata } = await shop.bucket.client.send(new HeadObjectCommand({ Bucket: shop.bucket.name, Key: key }));
    left[key] = JSON.stringify(Metadata);
  }
  for (const file of readdirSync(temporary, { recursive: true, withFileTypes: true }))
    if (file.isFile()) left[file.name] = readFileSync(join(file.parentPath, file.name), "latin1");
  return left;
}

function assertNone(secret: string, texts: Record<string, string>): void {
  for (const [where, text] of Object.entries(texts)) {
    const at = text.indexOf(secret);
    assert.equal(at, -1, `${where}: …${text.slice(Math.max(0, at - 300), at + 100)}…`);
  }
}

/** How many runs were seen by their titles: one that ends at once may be missed. */
let seen = 0;
async function assertSilent(secret: string, script: string, variables: Env): Promise<Result> {
  const { result, titles } = await watch(script, variables);
  assertNone(secret, { [`${script} stdout`]: result.stdout, [`${script} stderr`]: result.stderr, titles });
  seen += titles.includes(script) ? 1 : 0;
  return result;
}

test("where all is well", async () => {
  assert.deepEqual(Object.keys(commands).sort(), globSync("scripts/{,ops/}*.ts", { cwd: root }).sort());
  for (const [script, runs] of Object.entries(commands)) {
    for (const variables of runs) {
      const { code, stderr } = await assertSilent(real, script, { ...variables, KAFKA_PASSWORD: odd });
      // make status also tells what is red, and there is no rebuild to swap in.
      const tells = script === "scripts/ops/status.ts" || stderr.includes("there is no rebuild of");
      assert.ok(code === 0 || tells, `${script}: ${stderr}`);
      assertNone(mark, { stderr });
    }
  }
  const consumer = await sensors.consumer();
  const metrics = await (await fetch(`${await consumer.url}/metrics`)).text();
  assert.match(metrics, /etl_sensors_rows_total/);
  assertNone(real, { metrics });
  consumer.child.kill("SIGTERM");
  assertNone(real, { consumer: (await consumer.ended).stderr });
  assert.ok(seen > 15, `only ${seen} titles were seen`);
  const left = await leftBehind();
  assert.ok(Object.keys(left).some((name) => name.endsWith("manifest.json")));
  assert.ok(left.Pushgateway?.includes("etl_rows") && left.BigQuery?.includes("MERGE"));
  assertNone(real, left);
});

const encoded = encodeURIComponent(odd);
const at = (variable: string, change: Partial<URL>): Env => ({
  [variable]: Object.assign(new URL(shop.env[variable] ?? ""), change).href,
});
/** A server that is not there; with a password that is, as typed, so partly encoded, where the URL may hold one. */
const nowhere = (name: string): string =>
  /^(CONNECT|PUSHGATEWAY)_/.test(name) ? `http://user:${mark}%22a'b@127.0.0.1:1` : "http://127.0.0.1:1";
const secrets: Env = {
  AWS_SECRET_ACCESS_KEY: odd,
  AWS_SESSION_TOKEN: odd,
  CLICKHOUSE_PASSWORD: odd,
  KAFKA_SASL_MECHANISM: "plain",
  KAFKA_USERNAME: "etl",
  KAFKA_PASSWORD: odd,
};
const services = ["BIGQUERY_ENDPOINT", "S3_ENDPOINT", "CLICKHOUSE_URL", "CONNECT_URL", "PUSHGATEWAY_URL"];
const databases = ["SOURCE_DATABASE_URL", "ETL_DATABASE_URL", "REPLICATION_DATABASE_URL"];
const faults: Record<string, () => Env> = {
  "passwords are wrong, and lines are JSON": () =>
    Object.assign({ ...secrets, LOG_FORMAT: "json" }, ...databases.map((name) => at(name, { password: encoded }))),
  "databases answer and services are away": () => ({
    ...secrets,
    ...Object.fromEntries(services.map((name) => [name, nowhere(name)])),
    KAFKA_BROKERS: "127.0.0.1:1",
  }),
  "variables are malformed": () => ({
    ...secrets,
    ...Object.fromEntries([...databases, ...services].map((name) => [name, `nonsense://u:${mark}@db:port/x`])),
    ...Object.fromEntries(["BIGQUERY_PROJECT", "FROM", "TO", "PIPELINE", "CHUNK_ROWS"].map((name) => [name, `${mark} 1`])),
  }),
};
/** Of each client one command, or two: what an error may quote is made in the modules that all share. Not doctor: it waits longest. */
const clients = ["status", "backfill-events", "verify-events", "connector", "dead-letters"].map((name) => `scripts/ops/${name}.ts`);
for (const [what, variables] of Object.entries(faults)) {
  test(`where ${what}`, async () => {
    // The consumer waits for a server that is away, until it is told to end.
    const consumer = shop.start("scripts/sensors.ts", variables());
    const runs = ["scripts/orders.ts", "scripts/views.ts", ...clients].map((script) =>
      assertSilent(mark, script, { RUN_TIMEOUT_SECONDS: "10", ...commands[script]?.[0], ...variables() }),
    );
    const failed = (await Promise.all(runs)).filter(({ code }) => code !== 0).length;
    assert.ok(failed >= 6, `only ${failed} failed`);
    consumer.child.kill("SIGTERM");
    const { stdout, stderr } = await consumer.ended;
    assertNone(mark, { stdout, stderr });
    assertNone(mark, await leftBehind());
  });
}

test("where Google's credentials are broken", async () => {
  const [file, empty] = [join(temporary, "credentials.json"), join(temporary, "empty.env")];
  writeFileSync(empty, "");
  const key = {
    type: "service_account",
    client_email: "etl@example.com",
    private_key: `-----BEGIN PRIVATE KEY-----\n${mark}\n-----END PRIVATE KEY-----\n`,
    private_key_id: mark,
    token_uri: "http://127.0.0.1:1",
  };
  const texts = [JSON.stringify(key), `${mark} is not JSON`, `{"private_key": "${mark}" oops`, ""];
  for (const [index, text] of texts.entries()) {
    writeFileSync(file, text);
    const { code, stdout, stderr } = await assertSilent(mark, index % 2 ? "scripts/ops/doctor.ts" : "scripts/orders.ts", {
      BIGQUERY_ENDPOINT: undefined,
      ENV_FILE: empty, // it would have the endpoint
      GOOGLE_APPLICATION_CREDENTIALS: file,
      PIPELINE: "orders",
    });
    assert.equal(code, 1, stdout + stderr);
  }
  rmSync(file);
  assertNone(mark, await leftBehind());
});
