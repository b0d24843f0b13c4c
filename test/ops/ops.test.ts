// rewind and the two roles. Needs the local stack (make up).
import assert from "node:assert/strict";
import { after, before, test } from "node:test";
import postgres from "postgres";
import { createShop, type Shop } from "../lib/shop.ts";

const rewind = "scripts/ops/rewind.ts";
const orders = { PIPELINE: "orders" };

let shop: Shop;
before(async () => {
  shop = await createShop();
  await shop.insertRows(1, 1234);
});
after(() => shop?.[Symbol.asyncDispose]());

const rows = async (query: string): Promise<postgres.Row[]> => [...(await shop.admin.unsafe(query))];
/** All that a rewind could change. */
const state = async () => [await rows("select * from etl.watermarks"), await rows("select * from etl.runs order by started_at")];

test("rewind of a pipeline that never ran is refused", async () => {
  const says = /orders has no watermark: it has never run, and its first run reads everything\. Next: make orders/;
  await shop.refused(rewind, 2, says, { ...orders, TO: "2017-01-01" });
  await shop.succeed(shop.script);
});

test("rewind forwards, without an end or of no pipeline, or while a run is going, which it names, is refused and changes nothing", async () => {
  const before = await state();
  const refused: [variables: Record<string, string>, says: RegExp][] = [
    [orders, /TO is missing\. The end, exclusive; of rewind, the time to set the watermark back to\. Example: TO=/],
    [{ ...orders, TO: "2999-01-01" }, /TO=2999-01-01T00:00:00\.000000\+00 is after the watermark \d{4}-\S+: a rewind goes back only/],
    [{ PIPELINE: "order", TO: "2017-01-01" }, /PIPELINE must be one of events, orders, users\./],
  ];
  for (const [variables, says] of refused) await shop.refused(rewind, 2, says, variables);
  const lock = shop.connect("etl:orders run=somebody");
  await lock`select pg_advisory_lock(hashtextextended('etl:orders', 0))`;
  const going = /a run of orders is going \(etl:orders run=somebody,.*\)\. Once it has ended: make rewind PIPELINE=orders TO=2017-01-01/;
  await shop.refused(rewind, 1, going, { ...orders, TO: "2017-01-01" });
  await lock.end();
  assert.deepEqual(await state(), before);
});

test("rewind sets the watermark back, counts what is read again in a dry run, keeps it in etl.runs, and the next run reads it", async () => {
  const to = "2017-06-01T00:00:00.000002";
  const before = (await shop.watermark()) ?? "";
  await shop.admin.unsafe(`alter table orders disable trigger user;
    update orders set updated_at = '2017-06-01 00:00:00.000001Z' where id <= 7;
    update orders set updated_at = '2017-06-01 00:00:00.000002Z', status = 'read again' where id in (8, 9);
    alter table orders enable trigger user`);
  const untouched = await state();
  const dry = await shop.succeed(rewind, { ...orders, TO: to, DRY_RUN: "1" });
  assert.match(dry.stderr, /step=would-rewind from=\S+ to=2017-06-01T00:00:00\.000002\+00 rows_to_read_again=1227$/);
  assert.deepEqual(await state(), untouched);

  const { stderr } = await shop.succeed(rewind, { ...orders, TO: to });
  const [second, micros = ""] = before.replace("+00", "").split(".");
  const from = `${second}.${micros.padEnd(6, "0")}+00`; // Postgres's text leaves trailing zeros out
  assert.ok(stderr.includes(`step=done from=${from} watermark=${to}+00 next="make orders"`), stderr);
  assert.equal(await shop.watermark(), `${to}+00`);
  const [kept] = await rows(`select state, host <> '' and pid > 0 and finished_at is not null as whole,
    replace(chunk_from::text, ' ', 'T') as from, replace(chunk_to::text, ' ', 'T') as to,
    run_id = (select run_id from etl.watermarks where pipeline = 'orders') as same from etl.runs order by started_at desc limit 1`);
  assert.deepEqual({ ...kept }, { state: "rewound", whole: true, from: `${to}+00`, to: before, same: true });
  const { stdout } = await shop.run("scripts/ops/status.ts");
  assert.match(stdout, /^orders .* succeeded \d+s ago /m); // it is no run

  assert.match((await shop.succeed(shop.script)).stderr, /step=done rows=1227 /);
  const older = await shop.query("SELECT id FROM orders WHERE status = 'read again'");
  assert.deepEqual(older, [], "an older version never replaces a newer one");
});

/** A session of one of the two roles, as its URL gives it. */
const as = (variable: string): postgres.Sql => postgres(shop.env[variable] ?? "", { max: 1, onnotice: () => {}, fetch_types: false });

const forbidden: Record<string, { variable: string; statements: string[] }> = {
  "etl_reader can write nothing, even where it says set transaction read write": {
    variable: "SOURCE_DATABASE_URL",
    statements: [
      "insert into orders (id) values (-1)",
      "update orders set status = 'x'",
      "delete from orders",
      "truncate orders",
      "select * from orders for update",
      "create table orders_2 (id int)",
      "create schema mine",
      "drop table orders",
      "alter table orders add x int",
      "select nextval(pg_get_serial_sequence('events', 'id'))",
      "select pg_terminate_backend(pid) from pg_stat_activity where usename = 'postgres' and datname = current_database()",
      "insert into etl.watermarks (pipeline) values ('x')",
      "select * from etl.watermarks",
      "create role mine",
      "copy orders to program 'true'",
      "set role etl_metadata",
    ],
  },
  "etl_metadata owns schema etl only": {
    variable: "ETL_DATABASE_URL",
    statements: [
      "select * from orders",
      "insert into orders (id) values (-1)",
      "create table public.mine (id int)",
      "create schema mine",
      "drop table orders",
      "create role mine",
      "set role etl_reader",
    ],
  },
};
for (const [promise, { variable, statements }] of Object.entries(forbidden)) {
  test(promise, async () => {
    const before = await shop.sourceRows();
    const session = as(variable);
    try {
      if (variable === "SOURCE_DATABASE_URL")
        assert.deepEqual([...(await session`show default_transaction_read_only`)], [{ default_transaction_read_only: "on" }]);
      await session.unsafe("set default_transaction_read_only = off; set lock_timeout = '2s'");
      for (const statement of statements) {
        await assert.rejects(session.unsafe(statement), /permission denied|must be owner/, statement);
      }
      const [role] = await session`
        select rolsuper or rolcreatedb or rolcreaterole or rolreplication or rolbypassrls as powers,
          array(select b.rolname from pg_auth_members m join pg_roles b on b.oid = m.roleid where m.member = r.oid)::text as member
        from pg_roles r where rolname = current_user`;
      assert.deepEqual({ ...role }, { powers: false, member: variable.startsWith("SOURCE") ? "{pg_read_all_stats}" : "{}" });
    } finally {
      await session.end();
    }
    assert.deepEqual(await shop.sourceRows(), before);
  });
}

test("a run's MERGE names the run, in its text and in its label", async () => {
  const [merged] = await rows("select run_id from etl.runs where state = 'succeeded' and rows > 0 order by started_at desc limit 1");
  const { configuration } = await shop.api(`/jobs/etl_orders_staging_${merged?.run_id}_1_1_merge`);
  assert.match(configuration.query.query, new RegExp(`^/\\* etl:orders run=${merged?.run_id} \\*/\nMERGE `));
  // What BigQuery allows in the value of a label; the local server takes anything.
  assert.match(configuration.labels.etl_run, /^[a-z0-9_-]{1,63}$/);
});
