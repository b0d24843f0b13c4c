// What a second pair of eyes broke once: each of these lost, doubled or hung something, or said nothing useful.
import assert from "node:assert/strict";
import { writeFileSync } from "node:fs";
import { join } from "node:path";
import { test } from "node:test";
import { scratchCopy } from "./lib/scratch.ts";
import { createShop, until } from "./lib/shop.ts";

const orders = "scripts/orders.ts";
const assertRefuses = async (
  shop: Awaited<ReturnType<typeof createShop>>,
  code: number,
  text: RegExp,
  variables = {},
): Promise<void> => {
  const before = [await shop.watermark(), await shop.destinationRows()];
  const result = await shop.run(orders, variables);
  assert.equal(result.code, code, result.stderr);
  assert.match(result.stderr, text);
  assert.doesNotMatch(result.stderr, /^ {4}at /m, "a stack trace where a sentence should be");
  assert.deepEqual([await shop.watermark(), await shop.destinationRows()], before);
};

test("a re-run by hand reads no further than the bound, so that a late commit with an older now() still arrives", async () => {
  await using shop = await createShop();
  await shop.insertRows(1, 3);
  await shop.succeed(orders);
  await shop.admin`alter table orders disable trigger user`;
  const late = shop.connect("late");
  await late.begin(async (transaction) => {
    await transaction`select now()`;
    await shop.admin`update orders set status = 'first', updated_at = now() where id = 1`;
    const { stderr } = await shop.succeed(orders, { FROM: "2026-01-01", TO: "9999-01-01" });
    assert.match(stderr, /step=held by="pid \d+, application \\"late\\"/);
    await transaction`update orders set status = 'last', updated_at = now() where id = 1`;
  });
  await shop.succeed(orders);
  assert.deepEqual(await shop.destinationRows(), await shop.sourceRows());
});

test("a SELECT that returns a key twice merges nothing, and names the key", async () => {
  using scratch = scratchCopy();
  await using shop = await createShop({ folder: scratch.folder });
  await shop.insertRows(1, 3);
  await shop.succeed(orders);
  scratch.edit("sql/orders.sql", (text) =>
    text.replace("from orders", "from orders join (values (1), (2)) twice (n) on id = 2 or n = 1"),
  );
  await shop.admin`update orders set status = 'changed'`;
  await assertRefuses(
    shop,
    2,
    /sql\/orders\.sql returned the key {"id":2} more than once; nothing of this chunk was merged/,
  );
  assert.deepEqual(await shop.stagingTables(), []);
});

test("a transaction in which track_activities was switched on is not taken for none", async () => {
  await using shop = await createShop();
  await shop.insertRows(1, 3);
  await shop.succeed(orders);
  const sql = shop.connect("hidden");
  await sql`set track_activities = off`;
  await sql.begin(async (transaction) => {
    await transaction`set local track_activities = on`;
    await transaction`update orders set status = 'hidden' where id = 1`;
    await assertRefuses(shop, 1, /is not seen whole .*: pid \d+, application "hidden"/);
  });
  await shop.admin`select pg_terminate_backend(pid) from pg_stat_activity where application_name = 'hidden'`;
  await until("the session is gone", async () => {
    const [row] = await shop.admin`select count(*)::int as n from pg_stat_activity where application_name = 'hidden'`;
    return row?.n === 0;
  });
  await shop.succeed(orders);
  assert.deepEqual(await shop.destinationRows(), await shop.sourceRows());
});

test("a reading role that may write single columns is waited for like any other", async () => {
  await using shop = await createShop();
  await shop.insertRows(1, 3);
  await shop.succeed(orders);
  await shop.admin`grant update (status) on orders to etl_reader`;
  const { default: postgres } = await import("postgres");
  const reader = postgres(shop.env.SOURCE_DATABASE_URL ?? "", {
    max: 1,
    connection: { application_name: "writing reader" },
  });
  await reader`set default_transaction_read_only = off`;
  await reader.begin(async (transaction) => {
    await transaction`update orders set status = 'by the reader' where id = 1`;
    const { stderr } = await shop.succeed(orders);
    assert.match(stderr, /step=held by="pid \d+, application \\"writing reader\\", role etl_reader/);
  });
  await reader.end();
  await shop.succeed(orders);
  assert.deepEqual(await shop.destinationRows(), await shop.sourceRows());
});

test("files that an editor leaves, a comment after the last semicolon, two hosts, a broken contract: no harm, or a sentence", async () => {
  using scratch = scratchCopy();
  await using shop = await createShop({ folder: scratch.folder });
  for (const name of [".orders.json.swp", "orders.json~", "README.md"])
    writeFileSync(join(scratch.folder, "schemas/bigquery", name), "");
  const { stdout } = await shop.succeed("scripts/ops/status.ts", { JSON: "1" });
  assert.deepEqual(
    JSON.parse(stdout).map(({ pipeline }: { pipeline: string }) => pipeline),
    ["orders", "users"],
  );
  scratch.edit("sql/orders.sql", (text) => `${text}-- the end;\n`);
  await shop.insertRows(1, 2);
  await shop.succeed(orders);
  assert.equal((await shop.destinationRows()).length, 2);
  const { SOURCE_DATABASE_URL: url = "" } = shop.env;
  await assertRefuses(shop, 2, /SOURCE_DATABASE_URL must name one host/, {
    SOURCE_DATABASE_URL: url.replace("127.0.0.1", "127.0.0.9,127.0.0.1"),
  });
  scratch.edit("schemas/bigquery/orders.json", (text) => text.replace("tableConstraints", "constraints"));
  await assertRefuses(
    shop,
    2,
    /schemas\/bigquery\/orders\.json must be a BigQuery Table resource with schema\.fields and tableConstraints\.primaryKey/,
  );
  writeFileSync(join(scratch.folder, "schemas/bigquery/orders.json"), "{");
  await assertRefuses(shop, 2, /schemas\/bigquery\/orders\.json must be a BigQuery Table resource .* JSON/);
});
