// The log: one line a step, as key=value or as JSON, and the run id that joins it to all else of the run. Needs the local stack (make up).
import assert from "node:assert/strict";
import { after, before, test } from "node:test";
import { HeadObjectCommand } from "@aws-sdk/client-s3";
import { scratchCopy } from "../lib/scratch.ts";
import { createShop, type Result, type Shop, until } from "../lib/shop.ts";

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

  const [early] = parse((await shop.run(shop.script, { ...json, BIGQUERY_PROJECT: "" })).stderr);
  assert.match(`${early?.step} ${early?.error}`, /^error .*BIGQUERY_PROJECT is missing/s);

  // A mistake in the code, thrown where nobody awaits it.
  const mistake = `setTimeout(() => (undefined as unknown as { x: string }).x, 1); process.emitWarning("careful"); await delay(1000);`;
  using _ = scratch.edit("shared/run.ts", (code) => code.replace("  const [lock] =", `  ${mistake}\n  const [lock] =`));
  const broken = await shop.run(shop.script, json);
  const [warning, thrown] = parse(broken.stderr);
  assert.deepEqual([warning?.step, warning?.warning], ["warning", "careful"]);
  assert.match(String(thrown?.error), /^TypeError: Cannot read properties of undefined \(reading 'x'\)$/);
  assert.match(String(thrown?.run), /^20/);
  assert.equal(broken.code, 1);
});

/** One grep for a run's id, everywhere. */
test("one run id joins log, etl.runs, BigQuery's jobs and their labels, Postgres's application_name and S3's metadata", async () => {
  await shop.updateRows(1, 10, "joined");
  const owner = shop.connect("owner");
  await owner.unsafe(`begin; lock table ${shop.table} in access exclusive mode`);
  const orders = shop.start(shop.script, json);
  const names = await until("the run waits for the table", async () => {
    const rows = await shop.admin`select application_name as name, wait_event_type as wait from pg_stat_activity
      where datname = current_database() and application_name like 'etl:%run=%'`;
    return rows.some(({ wait }) => wait === "Lock") ? rows.map(({ name }) => name as string) : undefined;
  });
  await owner.unsafe("rollback");
  /** The id that all lines of a run have; it is recorded under it. */
  const idOf = async ({ code, stderr }: Result, pipeline: string): Promise<string> => {
    assert.equal(code, 0, stderr);
    const [id, ...others] = new Set(parse(stderr).map((line) => `${line.pipeline} ${line.run}`.replace(`${pipeline} `, "")));
    assert.deepEqual(others, []);
    assert.equal((await shop.admin`select from etl.runs where run_id = ${id ?? ""} and state = 'succeeded'`).count, 1);
    return id ?? "";
  };
  const id = await idOf(await orders.ended, "orders");
  assert.deepEqual([...new Set(names)], [`etl:orders run=${id}`]);
  // biome-ignore lint/suspicious/noExplicitAny: the API's own JSON
  const job = (name: string): Promise<any> => shop.api(`/jobs/etl_orders_staging_${id}_1_1_${name}`);
  assert.deepEqual((await job("merge")).configuration.labels, { etl_pipeline: "orders", etl_run: id });
  // The client puts no labels on an upload's job: its id has the run's.
  assert.equal((await job("load")).configuration.load.destinationTable.tableId, `orders_staging_${id}_1_1`);

  await shop.insertEvents("2017-01-01", 3);
  const days = { FROM: "2017-01-01", TO: "2017-01-02" };
  const run = await idOf(await shop.run("scripts/ops/backfill-events.ts", { ...json, ...days }), "events");
  const { client, name: Bucket, prefix } = shop.bucket;
  for (const object of ["manifest.json", `part-0001-${run}.ndjson.gz`]) {
    const head = await client.send(new HeadObjectCommand({ Bucket, Key: `${prefix}events/dt=2017-01-01/${object}` }));
    assert.equal(head.Metadata?.run, run, object);
  }
});
