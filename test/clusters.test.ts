/** What a run makes of a source that is another server than before, or whose clock is: on clusters of the tests' own. */
import assert from "node:assert/strict";
import { after, before, test } from "node:test";
import { createCluster, type TestCluster } from "./lib/cluster.ts";
import { createShop, type Shop, until } from "./lib/shop.ts";

const orders = "scripts/orders.ts";
let shop: Shop;
let primary: TestCluster;
before(async () => {
  // Autovacuum comes every second, and is slow enough to be met at work.
  const settings = {
    autovacuum_naptime: "1s",
    autovacuum_vacuum_cost_delay: "100ms",
    autovacuum_vacuum_cost_limit: "1",
  };
  [shop, primary] = await Promise.all([createShop(), createCluster(settings)]);
});
after(async () => {
  await shop?.[Symbol.asyncDispose]();
  await primary?.[Symbol.asyncDispose]();
});

async function writeOrder(cluster: TestCluster, id: number, status: string): Promise<void> {
  await cluster.admin`
    insert into public.orders (id, status) values (${id}, ${status})
    on conflict (id) do update set status = excluded.status`;
}

/** id → status at the destination. */
async function synced(): Promise<Record<string, string | null>> {
  return Object.fromEntries((await shop.destinationRows()).map(({ id, status }) => [id, status ?? null]));
}

async function assertStops(cluster: TestCluster, says: RegExp): Promise<void> {
  const state = async (): Promise<unknown[]> => [await shop.watermark(), await synced(), await shop.stagingTables()];
  const before = await state();
  const { code, stderr } = await shop.run(orders, cluster.variables);
  assert.match(stderr, says);
  assert.equal(code, 1);
  assert.deepEqual(await state(), before);
}

/** As the message says: rewinds to a time before it happened. */
async function rewind(cluster: TestCluster): Promise<void> {
  await shop.succeed("scripts/ops/rewind.ts", { ...cluster.variables, PIPELINE: "orders", TO: "2020-01-01" });
}

const otherServer =
  /source database \w+ is not the server that the watermark \S+ was taken from \(system identifier \d+, timeline \d+; expected \d+, \d+\): a restore or a failover .* Next: make rewind PIPELINE=orders TO=… with a time before it/;

test("an autovacuum worker at work does not hold the watermark", async () => {
  const { admin, variables } = primary;
  await admin.unsafe(`create table public.vacuumed as select i, repeat('x', 1000) from generate_series(1, 7000) i`);
  await admin.unsafe(
    "alter table public.vacuumed set (autovacuum_vacuum_threshold = 0, autovacuum_vacuum_scale_factor = 0)",
  );
  await admin.unsafe("delete from public.vacuumed where i % 2 = 0");
  const worker = async (): Promise<number | undefined> => {
    const [row] = await admin<{ pid: number }[]>`
      select pid from pg_stat_activity
      where datname = current_database() and backend_type = 'autovacuum worker' and xact_start is not null
        and query like '%public.vacuumed%'`;
    return row?.pid;
  };
  const pid = await until("an autovacuum worker in its transaction", worker);
  await writeOrder(primary, 1, "new");
  const { stderr } = await shop.succeed(orders, variables);
  assert.doesNotMatch(stderr, /step=held/);
  assert.deepEqual(await synced(), { 1: "new" });
  assert.equal(await worker(), pid, "the worker ended before the run did");
  await admin.unsafe("drop table public.vacuumed");
});

test("a standby is refused; promoted, it is another server at once, until make rewind takes it over", async () => {
  await using standby = await primary.createStandby();
  await writeOrder(primary, 1, "before");
  await shop.succeed(orders, primary.variables);
  await assertStops(
    standby,
    /source database \w+ is a standby: .* no bound is safe\. Point SOURCE_DATABASE_URL at the primary/,
  );

  // Pages for its first checkpoint to write, which takes its time: until it is done the control file has the old timeline.
  await primary.admin.unsafe("create table public.pages as select i from generate_series(1, 100000) i");
  await until("the standby has replayed all", async () => {
    const [sent] = await primary.admin`select pg_current_wal_lsn()::text as lsn`;
    const [got] = await standby.admin`select pg_last_wal_replay_lsn() >= ${sent?.lsn}::text::pg_lsn as all`;
    return got?.all;
  });
  await standby.admin`select pg_promote()`;
  await assertStops(standby, otherServer);

  await rewind(standby);
  await writeOrder(standby, 1, "promoted");
  await shop.succeed(orders, standby.variables);
  assert.deepEqual(await synced(), { 1: "promoted" });
  await standby.admin`checkpoint`;
  await shop.succeed(orders, standby.variables);
  await assertStops(primary, otherServer); // the old primary came back
  await rewind(primary);
});

test("another system identifier stops the run, until make rewind takes the server over", async () => {
  await writeOrder(primary, 2, "of the old server");
  await shop.succeed(orders, primary.variables);
  await using restored = await createCluster();
  await writeOrder(restored, 2, "of the new server");
  await assertStops(restored, otherServer);
  await rewind(restored);
  await shop.succeed(orders, restored.variables);
  assert.equal((await synced())[2], "of the new server");
  await rewind(primary);
});

test("a clock that was set back stops the run; once it is right again the next run goes on", async () => {
  await writeOrder(primary, 3, "first");
  await shop.succeed(orders, primary.variables);
  primary.setClock("-3600");
  await assertStops(
    primary,
    /the clock of source database \w+ says \S+, which is before the watermark \S+: it was set back, .* Next: correct the clock, or make rewind PIPELINE=orders TO=… with a time before it/,
  );
  primary.setClock("+0");
  await writeOrder(primary, 3, "second");
  await shop.succeed(orders, primary.variables);
  assert.equal((await synced())[3], "second");
});

test("after a clock was set back for good, make rewind warns, and the runbook's steps bring what was written since", async () => {
  await writeOrder(primary, 4, "dated later");
  await shop.succeed(orders, primary.variables);
  primary.setClock("-3600");
  const [now] = await primary.admin`select now()::text as at`;
  await writeOrder(primary, 4, "written later");
  await writeOrder(primary, 5, "new");
  await shop.query(`DELETE FROM orders WHERE updated_at >= TIMESTAMP '${now?.at}'`);
  const { stderr } = await shop.succeed("scripts/ops/rewind.ts", {
    ...primary.variables,
    PIPELINE: "orders",
    TO: "0001-01-01",
  });
  assert.match(stderr, /the destination may hold versions that the source has lost, .* next="ops\/runbook\.md, /);
  await shop.succeed(orders, primary.variables);
  const { 4: updated, 5: inserted } = await synced();
  assert.deepEqual([updated, inserted], ["written later", "new"]);
});
