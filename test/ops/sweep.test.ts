// sweep: removes what was deleted at the source, and nothing else. Needs the local stack (make up).
import assert from "node:assert/strict";
import { after, before, test } from "node:test";
import { pipelines } from "../../shared/pipelines.ts";
import { createProxy, type Gate, type HttpProxy, hold, pass, reach, steps } from "../lib/faults.ts";
import { createShop, type Process, type Result, type Shop } from "../lib/shop.ts";

const sweep = "scripts/ops/sweep.ts";
type Variables = Record<string, string>;

let shop: Shop;
before(async () => {
  shop = await createShop();
  await shop.insertRows(1, 1000);
  await sync();
});
after(() => shop?.[Symbol.asyncDispose]());

const sync = () => shop.succeed("scripts/orders.ts");
const orders = { PIPELINE: "orders" };
const swept = (variables: Variables = {}): Promise<Result> => shop.succeed(sweep, { ...orders, ...variables });
const there = async (): Promise<string[]> => (await shop.destinationRows()).map(({ id }) => id ?? "");
const remove = (...ids: number[]) => shop.admin`delete from orders where id = any(${`{${ids}}`}::text::bigint[])`;
const insert = (id: number) => shop.insertRows(id, id);
/** As it starts, with a proxy before BigQuery in which `gate` is at its first statement, the comparison, or at its second, the deletion. */
const startHeld = async (statement: 1 | 2, gate: Gate): Promise<[Process, HttpProxy]> => {
  const proxy = await createProxy(shop.env.BIGQUERY_ENDPOINT);
  proxy.fault(steps.merge, pass, statement - 1);
  proxy.fault(steps.merge, gate, 1);
  const run = shop.start(sweep, { ...orders, BIGQUERY_ENDPOINT: proxy.url });
  await reach(run, gate.reached);
  return [run, proxy];
};
const assertEqual = async () => assert.deepEqual(await shop.destinationRows(), await shop.sourceRows());

test("rows that were deleted at the source are removed; DRY_RUN=1 says which, and removes nothing", async () => {
  assert.match((await swept()).stderr, /step=found compared=1000 gone=0$/m);
  await remove(3, 4);
  await sync();
  const dry = await swept({ DRY_RUN: "1" });
  assert.match(dry.stderr, /step=would-delete compared=1000 gone=2 keys="id=3,id=4"$/m);
  assert.equal((await there()).length, 1000);
  assert.match((await swept()).stderr, /step=swept deleted=2 kept=0$/m);
  await assertEqual();
  const [run] = await shop.admin`select state, rows::int from etl.runs order by started_at desc limit 1`;
  assert.deepEqual({ ...run }, { state: "succeeded", rows: 2 });
});

test("more than SWEEP_MAX_SHARE of the rows are refused without CONFIRM=1", async () => {
  const [{ total } = { total: 0 }] = await shop.admin`select count(*)::int as total from orders`;
  await shop.admin`delete from orders where id > 900`;
  const gone = total - (await shop.sourceRows()).length;
  const says = `nothing was deleted: ${gone} of ${total} rows of orders are not at the source, more than SWEEP_MAX_SHARE=0\\.05 of them\\.`;
  await shop.refused(sweep, 2, new RegExp(`${says}.+make sweep PIPELINE=orders CONFIRM=1`), orders);
  assert.equal((await there()).length, total);
  assert.match((await swept({ CONFIRM: "1" })).stderr, new RegExp(`step=swept deleted=${gone} kept=0`));
  await assertEqual();
});

test("a row whose deletion is not committed stays, and one that is inserted and not committed yet arrives", async () => {
  const writer = shop.connect("writer");
  await writer`begin`;
  await writer`delete from orders where id = 10`;
  await remove(11);
  await writer`insert into orders (id, created_at) values (11, '2017-01-01'), (2001, '2017-01-01')`;
  assert.match((await swept()).stderr, /step=swept deleted=1 kept=0/);
  assert.ok((await there()).includes("10"));
  await sync(); // the transaction holds its window
  await writer`commit`;
  await sync();
  await swept();
  await assertEqual();
});

test("a row that is inserted again while it reads is there after the next run", async () => {
  await remove(20, 21);
  const gate = hold();
  const [run, proxy] = await startHeld(1, gate); // the keys of the source are read
  await using _proxy = proxy;
  await insert(20);
  await insert(21);
  await shop.admin`update orders set status = 'again' where id = 21`;
  gate.release();
  assert.equal((await run.ended).code, 0);
  await sync();
  await assertEqual();
});

test("a row that another run brings back between the last look and the deletion stays, the lock lost", async () => {
  await remove(30, 31);
  const gate = hold();
  const [run, proxy] = await startHeld(2, gate);
  await using _proxy = proxy;
  await insert(30);
  const lost = await shop.admin`
    select pg_terminate_backend(pid, 5000) from pg_locks
    where locktype = 'advisory' and granted and database = (select oid from pg_database where datname = current_database())`;
  assert.equal(lost.length, 1);
  await sync();
  gate.release();
  const { stderr } = await run.ended;
  assert.doesNotMatch(stderr, /deleted=2/);
  assert.ok((await there()).includes("30"));
  await assertEqual();
});

test("killed before the deletion, the same command goes on", async () => {
  await remove(40);
  const [run, proxy] = await startHeld(2, hold());
  await using _proxy = proxy;
  run.child.kill("SIGKILL");
  await run.ended;
  await swept(); // once the lock has gone with its session
  await assertEqual();
});

test("nothing is removed for a source that is another server, a pipeline that never ran, or one without deletions", async () => {
  const refused: [Variables, RegExp][] = [
    [{ PIPELINE: "events" }, new RegExp(`PIPELINE must be one of ${pipelines().join(", ")}`)],
    [{ PIPELINE: "users" }, /users has no watermark: it has never run/],
    [{ ...orders, SWEEP_MAX_SHARE: "2" }, /SWEEP_MAX_SHARE must be a number from 0 to 1/],
  ];
  for (const [variables, says] of refused) await shop.refused(sweep, 2, says, variables);
  await remove(50);
  await shop.admin`update etl.watermarks set server = server || '0' where pipeline = 'orders'`;
  await shop.refused(
    sweep,
    2,
    /nothing was written or deleted: source database .+ is another one than the watermark \S+ was taken from/,
    orders,
  );
  assert.ok((await there()).includes("50"));
});
