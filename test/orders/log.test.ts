// The log: one line a step, as key=value or as JSON, and the run id that joins it to all else of the run. Needs the local stack (make up).
import assert from "node:assert/strict";
import { after, before, test } from "node:test";
import { HeadObjectCommand } from "@aws-sdk/client-s3";
import { scratchCopy } from "../lib/scratch.ts";
import { createShop, type Process, type Shop, until } from "../lib/shop.ts";

const scratch = scratchCopy();
let shop: Shop;
before(async () => {
  shop = await createShop({ folder: scratch.folder });
  await shop.insertRows(1, 100);
});
after(async () => {
  await shop?.[Symbol.asyncDispose]();
  scratch[Symbol.dispose]();
});

const json = { LOG_FORMAT: "json" };
type Line = Record<string, unknown>;
/** Each line must be an object. */
const parse = (stderr: string): Line[] => stderr.split("\n").map((line) => JSON.parse(line) as Line);
const pairs = (line: string): string[] => [...line.matchAll(/(?:^| )(\w+)=/g)].map(([, key]) => key as string);

test("LOG_FORMAT=json gives the same lines as text, an object each: the same fields in their order, numbers as numbers", async () => {
  const asJson = parse((await shop.succeed(shop.script, json)).stderr);
  await shop.updateRows(1, 100, "again");
  const asText = (await shop.succeed(shop.script, { LOG_FORMAT: "text" })).stderr.split("\n");
  assert.deepEqual(
    asJson.map((line) => Object.keys(line)),
    asText.map(pairs),
  );
  assert.deepEqual(
    asJson.map(({ step }) => step),
    ["window", "chunk", "done"],
  );
  const [, chunk, done] = asJson;
  for (const [name, value] of Object.entries({ ...chunk, ...done })) {
    const number = !["ts", "pipeline", "run", "step", "from", "to", "watermark"].includes(name);
    assert.equal(typeof value, number ? "number" : "string", name);
  }
  assert.equal(done?.rows, 100);
  assert.equal(new Set(asJson.map(({ run }) => run)).size, 1);
  assert.ok(Math.abs(Date.parse(String(done?.ts)) - Date.now()) < 60_000);
});

test("the other commands' lines are objects too, and what Postgres or rounding made text is a number", async () => {
  await shop.insertEvents("2017-01-01", 3);
  const days = { FROM: "2017-01-01", TO: "2017-01-03" };
  const lines = [
    ...parse((await shop.succeed("scripts/ops/backfill-events.ts", { ...json, ...days })).stderr),
    ...parse((await shop.succeed("scripts/ops/verify-events.ts", { ...json, ...days })).stderr),
    ...parse((await shop.succeed("scripts/ops/migrate.ts", json)).stderr),
    ...parse((await shop.succeed("scripts/ops/rewind.ts", { ...json, PIPELINE: "orders", TO: "2017-01-01" })).stderr),
  ];
  for (const line of lines)
    for (const [name, value] of Object.entries(line))
      if (/rows|bytes|seconds|days|parts/.test(name)) assert.equal(typeof value, "number", JSON.stringify(line));
  for (const step of ["day", "done", "rewind"])
    assert.ok(
      lines.some((line) => line.step === step),
      step,
    );
});

test("an error is one object with the run's id, of several lines where it has them, and without a stack trace", async () => {
  await shop.admin`alter table orders alter created_at drop not null`;
  const { code, stderr } = await shop.run(shop.script, json);
  const text = await shop.run(shop.script);
  await shop.admin`alter table orders alter created_at set not null`;
  assert.equal(code, 2);
  const lines = parse(stderr);
  const [failed, error] = lines.slice(-2);
  assert.deepEqual([failed?.step, error?.step, error?.pipeline, error?.run], ["failed", "error", "orders", failed?.run]);
  const message = text.stderr.slice(text.stderr.indexOf("error: ") + "error: ".length);
  assert.match(message, /\n {2}column public\.orders\.created_at/);
  assert.equal(error?.error, message);

  // A mistake in the code, thrown where nobody awaits it.
  using _ = scratch.edit("shared/run.ts", (code) =>
    code.replace(
      "  const [lock] =",
      '  setTimeout(() => (undefined as unknown as { x: string }).x, 1);\n  process.emitWarning("careful");\n  await new Promise((resolve) => setTimeout(resolve, 1000));\n  const [lock] =',
    ),
  );
  const broken = await shop.run(shop.script, json);
  const [warning, mistake] = parse(broken.stderr);
  assert.deepEqual([warning?.step, warning?.warning], ["warning", "careful"]);
  assert.match(String(mistake?.error), /^TypeError: Cannot read properties of undefined \(reading 'x'\)$/);
  assert.match(String(mistake?.run), /^20/);
  assert.equal(broken.code, 1);
});

test("errors before a run begins are objects as well; a wrong LOG_FORMAT is refused, with all else that is missing", async () => {
  const missing = await shop.run(shop.script, { ...json, BIGQUERY_PROJECT: "" });
  const [error, ...others] = parse(missing.stderr);
  assert.deepEqual([others, error?.step, missing.code], [[], "error", 2]);
  assert.match(String(error?.error), /BIGQUERY_PROJECT is missing/);
  const wrong = await shop.run(shop.script, { LOG_FORMAT: "xml", BIGQUERY_PROJECT: "" });
  assert.match(wrong.stderr, /^ {2}BIGQUERY_PROJECT is missing.*\n {2}LOG_FORMAT must be text or json\. .* Example: LOG_FORMAT=text$/m);
  assert.equal(wrong.code, 2);
  assert.equal((await shop.run("scripts/ops/status.ts", { LOG_FORMAT: "JSON" })).code, 2);
});

test("a secret that JSON would write in another way is redacted too", async () => {
  const password = 'quo"te\\';
  const { stderr } = await shop.run("scripts/ops/dead-letters.ts", { ...json, CLICKHOUSE_PASSWORD: password });
  assert.ok(!stderr.includes("quo"), stderr);
  const url = Object.assign(new URL(shop.env.SOURCE_DATABASE_URL ?? ""), {
    password: encodeURIComponent(password),
  }).href;
  const refused = await shop.run(shop.script, { ...json, SOURCE_DATABASE_URL: url });
  assert.equal(refused.code, 1);
  assert.ok(!/quo|te\\/.test(refused.stderr), refused.stderr);
});

/** Holds the run before it reads `table`, and returns what its sessions are called then. */
async function sessionsOf(script: string, table: string, variables = {}): Promise<{ names: string[]; run: Process }> {
  const owner = shop.connect("owner");
  await owner.unsafe(`begin; lock table ${table} in access exclusive mode`);
  const run = shop.start(script, variables);
  const names = await until("the run waits for the table", async () => {
    const rows = await shop.admin`select application_name as name, wait_event_type as wait from pg_stat_activity
      where datname = current_database() and application_name like 'etl:%run=%'`;
    return rows.some(({ wait }) => wait === "Lock") ? rows.map(({ name }) => name as string) : undefined;
  });
  await owner.unsafe("rollback");
  return { names, run };
}

/** One grep for a run's id, everywhere. */
test("one run id joins log, etl.runs, BigQuery's jobs and their labels, Postgres's application_name and S3's metadata", async () => {
  await shop.updateRows(1, 10, "joined");
  const orders = await sessionsOf(shop.script, shop.table, json);
  const ended = await orders.run.ended;
  assert.equal(ended.code, 0, ended.stderr);
  const lines = parse(ended.stderr);
  const id = lines.at(-1)?.run as string;
  assert.ok(lines.every(({ run }) => run === id));
  assert.deepEqual([...new Set(orders.names)], [`etl:orders run=${id}`]);
  assert.equal((await shop.admin`select from etl.runs where run_id = ${id} and state = 'succeeded'`).count, 1);
  // biome-ignore lint/suspicious/noExplicitAny: the API's own JSON
  const job = (name: string): Promise<any> => shop.api(`/jobs/etl_orders_staging_${id}_1_1_${name}`);
  assert.deepEqual((await job("merge")).configuration.labels, { etl_pipeline: "orders", etl_run: id });
  // The client puts no labels on an upload's job: its id has the run's.
  const load = await job("load");
  assert.equal(load.configuration.load.destinationTable.tableId, `orders_staging_${id}_1_1`);

  const days = { FROM: "2017-01-01", TO: "2017-01-02", FORCE: "1" };
  const events = await sessionsOf("scripts/ops/backfill-events.ts", "public.events", { ...json, ...days });
  const archived = parse((await events.run.ended).stderr);
  const run = archived.at(-1)?.run as string;
  assert.ok(archived.every((line) => line.run === run && line.pipeline === "events"));
  assert.deepEqual([...new Set(events.names)], [`etl:events run=${run}`]);
  assert.equal((await shop.admin`select from etl.runs where run_id = ${run} and state = 'succeeded'`).count, 1);
  const { client, name: Bucket, prefix } = shop.bucket;
  for (const object of ["manifest.json", `part-0001-${run}.ndjson.gz`]) {
    const head = await client.send(new HeadObjectCommand({ Bucket, Key: `${prefix}events/dt=2017-01-01/${object}` }));
    assert.equal(head.Metadata?.run, run, object);
  }
});
