import assert from "node:assert/strict";
import { globSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { afterEach, test } from "node:test";
import { DeleteBucketCommand } from "@aws-sdk/client-s3";
import { scratchCopy } from "../lib/scratch.ts";
import { createShop } from "../lib/shop.ts";
import { type Env, root } from "../stack/env.ts";

const migrate = "scripts/ops/migrate.ts";
const orders = "scripts/orders.ts";

using scratch = scratchCopy();
await using shop = await createShop({ folder: scratch.folder, clickhouse: true });
const table = `${shop.dataset}.orders`;
const contract = join(scratch.folder, "schemas/bigquery/orders.json");
const committed = readFileSync(contract, "utf8");
afterEach(() => writeFileSync(contract, committed));

/** Everything that migrate creates, as it is there now. */
async function created(): Promise<unknown> {
  const tables = await shop.admin`
    select relname from pg_class where relnamespace = to_regnamespace('etl') and relkind = 'r' order by 1`;
  const migrations = tables.length ? await shop.admin`select file, sha256 from etl.migrations order by 1` : [];
  const columns = await shop.query("SELECT table_name, column_name, data_type, is_nullable FROM INFORMATION_SCHEMA.COLUMNS ORDER BY 1, 2");
  return { tables: [...tables], migrations: [...migrations], columns };
}

/** As before the first migrate. */
async function unmigrate(): Promise<void> {
  await shop.admin.unsafe("drop schema etl cascade; create schema etl authorization etl_metadata");
  await shop.query("DROP TABLE IF EXISTS orders");
}

/** What the lines of a migrate say it does or would do. */
const steps = (stderr: string): string[] =>
  [...stderr.matchAll(/step=(\S+ what=(?:"[^"]*"|\S+)|done)/g)].map(([, step]) => (step as string).replaceAll('"', ""));

/** With DRY_RUN=1 it says these and changes nothing; then it does these; a second time it does nothing. */
async function assertApplies(what: string[], variables: Env = {}): Promise<void> {
  const before = await created();
  const run = async (more: Env = {}): Promise<string[]> => steps((await shop.succeed(migrate, { ...variables, ...more })).stderr);
  assert.deepEqual(await run({ DRY_RUN: "1" }), [...what.map((one) => `would-apply what=${one}`), "done"]);
  assert.deepEqual(await created(), before);
  assert.deepEqual(await run(), [...what.map((one) => `apply what=${one}`), "done"]);
  assert.deepEqual(await run(), ["done"]);
}

const files = globSync("sql/etl/*.sql", { cwd: root }).sort();

await test("migrate creates what is missing, a second time nothing, and with DRY_RUN=1 only says so", async () => {
  const before = await created();
  await unmigrate();
  await assertApplies([...files, `create table ${table}`]);
  assert.deepEqual(await created(), before);
});

await test("a shop without an archive and without sensors leaves their variables out, and migrate says what it leaves out", async () => {
  await unmigrate();
  const without = { S3_BUCKET: "", CLICKHOUSE_URL: "" };
  const { stderr } = await shop.succeed(migrate, without);
  assert.match(stderr, /step=left-out what="the bucket of events" because="S3_BUCKET is not set"/);
  assert.match(stderr, /step=left-out what="ClickHouse's tables of sensors" because="CLICKHOUSE_URL is not set"/);
  await shop.succeed(orders, without);
  // The other parts' variables are all asked for where one of them is set.
  const missing = { AWS_REGION: "", CLICKHOUSE_DATABASE: "" };
  await shop.refused(migrate, 2, /AWS_REGION is missing.*CLICKHOUSE_DATABASE is missing/s, missing);
});

await test("two migrates at once are safe: both succeed, and each thing is done once", async () => {
  const before = await created();
  await unmigrate();
  const both = await Promise.all([shop.succeed(migrate), shop.succeed(migrate)]);
  const done = both.flatMap(({ stderr }) => steps(stderr)).sort();
  const once = [`create table ${table}`, ...files].map((what) => `apply what=${what}`);
  assert.deepEqual(done, [...once, "done", "done"]);
  assert.deepEqual(await created(), before);
});

await test("a bucket that is missing is created, one that may not be used is named", async () => {
  const Bucket = `${shop.dataset.replaceAll("_", "-")}-archive`;
  await assertApplies([`create bucket ${Bucket}`], { S3_BUCKET: Bucket });
  await shop.bucket.client.send(new DeleteBucketCommand({ Bucket }));
  const says = /error: S3_BUCKET may not be used: s3:\/\/archive\/: SignatureDoesNotMatch .* Check AWS_ACCESS_KEY_ID/;
  await shop.refused(migrate, 2, says, { AWS_SECRET_ACCESS_KEY: "wrong" });
});

await test("migrate without schema etl says which file an administrator has to run", async () => {
  await shop.admin.unsafe("alter schema etl rename to aside");
  await shop.refused(
    migrate,
    1,
    /schema etl does not exist\. Run sql\/roles\.sql in that database as an administrator, then: make migrate/,
  );
  await shop.admin.unsafe("alter schema aside rename to etl");
});

await test("an applied file of sql/etl that was edited is an error that says what to do, and a new one is applied", async () => {
  const file = join(scratch.folder, "sql/etl/001_metadata.sql");
  const text = readFileSync(file, "utf8");
  writeFileSync(file, `${text}-- edited\n`);
  const says =
    /sql\/etl\/001_metadata\.sql was applied at \S+ \S+ and has been edited since\. Run: git checkout sql\/etl\/001_metadata\.sql/;
  await shop.refused(migrate, 2, says);
  writeFileSync(file, text);
  writeFileSync(join(scratch.folder, "sql/etl/002_more.sql"), "alter table etl.runs add column more int;");
  await assertApplies(["sql/etl/002_more.sql"]);
});

await test("a file of schemas/clickhouse that is killed between its statements is applied again, as a whole", async () => {
  const file = "schemas/clickhouse/009_two.sql";
  const broken = "ALTER TABLE sensor_readings ADD COLUMN IF NOT EXISTS one UInt8 DEFAULT 1;\nSELECT throwIf(1, 'killed here');\n";
  writeFileSync(join(scratch.folder, file), broken);
  await shop.refused(migrate, 1, /killed here/);
  writeFileSync(join(scratch.folder, file), broken.replace("throwIf(1, ", "throwIf(0, "));
  await assertApplies([file]);
});

await test("a new nullable column, a relaxed mode and a description are printed, then applied; rows and runs stay right", async () => {
  await shop.insertRows(1, 3);
  await shop.succeed(orders);
  scratch.editFields("orders", (fields) =>
    fields
      .map((field) => (field.name === "created_at" ? { ...field, mode: "NULLABLE", description: "Changed." } : field))
      .concat({ name: "note", type: "STRING" }),
  );
  const changes = [`relax column ${table}.created_at TIMESTAMP NULLABLE`, `add column ${table}.note STRING NULLABLE`, `describe ${table}`];
  await assertApplies([changes.join(", ")]);
  assert.deepEqual(
    await shop.query("SELECT id, note FROM orders ORDER BY id"),
    [1, 2, 3].map((id) => ({ id: String(id), note: null })),
  );

  // Everything else that the table now has, and the contract has not.
  writeFileSync(contract, committed);
  await assertRefused([
    /column \S+\.created_at: expected TIMESTAMP REQUIRED \(schemas\/bigquery\/orders\.json\), found TIMESTAMP NULLABLE$/m,
    /column \S+\.note: expected no such field .*, found STRING NULLABLE\. Run in BigQuery, to drop it: ALTER TABLE \S+\.orders DROP COLUMN note$/m,
  ]);
});

await test("what could lose data or needs a decision is refused, all of it at once", async () => {
  scratch.edit("schemas/bigquery/orders.json", (text) => text.replace('"MONTH"', '"DAY"'));
  scratch.editFields("orders", (fields) =>
    fields
      .map((field) => (field.name === "item_count" ? { ...field, type: "NUMERIC" } : field))
      .concat({ name: "must", type: "STRING", mode: "REQUIRED" }),
  );
  await assertRefused([
    /column \S+\.item_count: expected NUMERIC NULLABLE .*, found INTEGER NULLABLE$/m,
    /column \S+\.must: expected STRING REQUIRED .*, found no such column$/m,
    /table \S+\.orders: expected timePartitioning {"type":"DAY","field":"created_at"} .* create a new table/,
  ]);
});

async function assertRefused(texts: RegExp[]): Promise<void> {
  const before = await created();
  const { code, stderr } = await shop.run(migrate);
  assert.equal(code, 2, stderr);
  for (const text of texts) assert.match(stderr, text);
  assert.deepEqual(await created(), before);
}
