/**
 * What the runs make of a source that is another server than before, or whose clock is: on clusters of the tests' own, which
 * the pipelines read, at the same time, at each stage.
 */
import assert from "node:assert/strict";
import { after, before, test } from "node:test";
import { createCluster, type TestCluster } from "../lib/cluster.ts";
import { createShop, ofSteps as pipelines, type Result, type Shop, textColumns, until } from "../lib/shop.ts";

let shop: Shop;
let primary: TestCluster;
let restored: TestCluster;
before(async () => {
  // Autovacuum comes every second, and is slow enough to be met at work.
  const settings = {
    autovacuum_naptime: "1s",
    autovacuum_vacuum_cost_delay: "100ms",
    autovacuum_vacuum_cost_limit: "1",
  };
  [shop, primary, restored] = await Promise.all([createShop(), createCluster(settings), createCluster()]);
});
after(() => Promise.all([shop, primary, restored].map((created) => created?.[Symbol.asyncDispose]())));

const run = (cluster: TestCluster): Promise<Result[]> =>
  Promise.all(pipelines.map((pipeline) => shop.succeed(`scripts/${pipeline}.ts`, cluster.variables)));

/** Writes to the row of this id, which may be new, in the table of each pipeline. */
async function write(cluster: TestCluster, id: number, text: string): Promise<void> {
  const { admin } = cluster;
  for (const pipeline of pipelines) {
    const column = admin(textColumns[pipeline]);
    await admin`
      insert into ${admin(pipeline)} (id, ${column}) values (${id}, ${text})
      on conflict (id) do update set ${column} = excluded.${column}`;
  }
}

/** What each pipeline's table has at the destination: "orders 1" → text. */
async function synced(): Promise<Record<string, string | null>> {
  const tables = pipelines.map((name) => `SELECT '${name}' AS name, id, ${textColumns[name]} AS text FROM ${name}`);
  const rows = await shop.query(tables.join(" UNION ALL "));
  return Object.fromEntries(rows.map(({ name, id, text }) => [`${name} ${id}`, text ?? null]));
}

/** For each pipeline the row of this id has arrived so. */
async function assertArrived(id: number, text: string): Promise<void> {
  const rows = await synced();
  for (const pipeline of pipelines) assert.equal(rows[`${pipeline} ${id}`], text, `${pipeline} ${id}`);
}

async function assertStop(cluster: TestCluster, says: (pipeline: string) => RegExp): Promise<void> {
  const state = async (): Promise<unknown[]> => [
    await Promise.all(pipelines.map((pipeline) => shop.watermark(pipeline))),
    await synced(),
    await shop.stagingTables(),
  ];
  const before = await state();
  await Promise.all(pipelines.map((pipeline) => shop.refused(`scripts/${pipeline}.ts`, 1, says(pipeline), cluster.variables)));
  assert.deepEqual(await state(), before);
}

/** As the message says: rewinds to a time before it happened. */
const rewind = (cluster: TestCluster, to = "2020-01-01"): Promise<Result[]> =>
  Promise.all(pipelines.map((PIPELINE) => shop.succeed("scripts/ops/rewind.ts", { ...cluster.variables, PIPELINE, TO: to })));

const otherServer = (pipeline: string): RegExp =>
  new RegExp(
    `source database \\w+ is another one than the watermark \\S+ was taken from \\(expected .*, found .*\\): it was restored or failed over, .* Next: ops/runbook\\.md, .* make rewind PIPELINE=${pipeline} TO=…`,
  );

test("an autovacuum worker at work does not hold the watermark", async () => {
  const { admin } = primary;
  await admin.unsafe(`create table public.vacuumed as select i, repeat('x', 1000) from generate_series(1, 7000) i`);
  await admin.unsafe("alter table public.vacuumed set (autovacuum_vacuum_threshold = 0, autovacuum_vacuum_scale_factor = 0)");
  await admin.unsafe("delete from public.vacuumed where i % 2 = 0");
  const worker = async (): Promise<number | undefined> => {
    const [row] = await admin<{ pid: number }[]>`
      select pid from pg_stat_activity
      where datname = current_database() and backend_type = 'autovacuum worker' and xact_start is not null
        and query like '%public.vacuumed%'`;
    return row?.pid;
  };
  const pid = await until("an autovacuum worker in its transaction", worker);
  await write(primary, 1, "new");
  for (const { stderr } of await run(primary)) assert.doesNotMatch(stderr, /step=held/);
  await assertArrived(1, "new");
  assert.equal(await worker(), pid, "the worker ended before the runs did");
  await admin.unsafe("drop table public.vacuumed");
});

test("a standby is refused; promoted, it is another server at once, until make rewind takes it over", async () => {
  await using standby = await primary.createStandby();
  await write(primary, 1, "before");
  await run(primary);
  await assertStop(standby, () => /source database \w+: no bound is safe: it is a standby.* Point SOURCE_DATABASE_URL at the primary/);

  // Pages for its first checkpoint to write, which takes its time: until it is done the control file has the old timeline.
  await primary.admin.unsafe("create table public.pages as select i from generate_series(1, 100000) i");
  await until("the standby has replayed all", async () => {
    const [sent] = await primary.admin`select pg_current_wal_lsn()::text as lsn`;
    const [got] = await standby.admin`select pg_last_wal_replay_lsn() >= ${sent?.lsn}::text::pg_lsn as all`;
    return got?.all;
  });
  await standby.admin`select pg_promote()`;
  await assertStop(standby, otherServer);

  await rewind(standby);
  await write(standby, 1, "promoted");
  await run(standby);
  await assertArrived(1, "promoted");
  await standby.admin`checkpoint`;
  await run(standby);
  await assertStop(primary, otherServer); // the old primary came back
});

test("another system identifier stops the run, until make rewind takes the server over", async () => {
  await rewind(primary);
  await write(restored, 2, "of the new server");
  await assertStop(restored, otherServer);
  await rewind(restored);
  await run(restored);
  await assertArrived(2, "of the new server");
});

test("a clock that was set back stops the run; once it is right again the next run goes on", async () => {
  await rewind(primary);
  await write(primary, 3, "first");
  await run(primary);
  primary.setClock("-3600");
  await assertStop(
    primary,
    (pipeline) =>
      new RegExp(
        `the clock of source database \\w+ says \\S+, which is before the watermark \\S+: it was set back, .* Next: correct it, or ops/runbook\\.md, .* make rewind PIPELINE=${pipeline} TO=…`,
      ),
  );
  primary.setClock("+0");
  await write(primary, 3, "second");
  await run(primary);
  await assertArrived(3, "second");
});

test("after a clock was set back for good, make rewind warns, and the runbook's steps bring what was written since", async () => {
  primary.setClock("+0");
  await write(primary, 4, "dated later");
  await run(primary);
  primary.setClock("-3600");
  const [now] = await primary.admin`select now()::text as at`;
  await write(primary, 4, "written later");
  await write(primary, 5, "new");
  for (const pipeline of pipelines) await shop.query(`DELETE FROM ${pipeline} WHERE updated_at >= TIMESTAMP '${now?.at}'`);
  for (const { stderr } of await rewind(primary, "0001-01-01")) {
    assert.match(stderr, /the destination may hold versions that the source has lost, .* ops\/runbook\.md, /);
  }
  await run(primary);
  await assertArrived(4, "written later");
  await assertArrived(5, "new");
});
