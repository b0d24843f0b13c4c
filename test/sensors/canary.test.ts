// A flow from the source that has stopped, or has lost something, while every other signal is well: the canary tells, in schema etl,
// /healthz, the metrics and status.
import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { suite, test } from "node:test";
import { setTimeout as delay } from "node:timers/promises";
import type { Sql } from "postgres";
import { createCluster, type TestCluster } from "../lib/cluster.ts";
import { stop } from "../lib/faults.ts";
import { type Consumer, createSensors, type Sensors } from "../lib/sensors.ts";
import { until } from "../lib/shop.ts";
import { root } from "../stack/env.ts";

interface Judged {
  state: string;
  reasons: string[];
}

const seen = async ({ shop, topic }: Sensors) => {
  const [row] = await shop.admin`select canary_seen::text as seen, canary_gap as gap from etl.topics where topic = ${topic}`;
  return row as { seen: string | null; gap: string | null } | undefined;
};
const status = async ({ shop }: Sensors): Promise<Judged> => {
  const { stdout } = await shop.run("scripts/ops/status.ts", { JSON: "1" });
  return JSON.parse(stdout).find(({ pipeline }: { pipeline: string }) => pipeline === "sensors");
};

/** A shop at that source, with a consumer that has seen a canary. */
async function begin(source?: TestCluster): Promise<{ sensors: Sensors; consumer: Consumer }> {
  const sensors = await createSensors({ bigquery: false, ...(source && { servers: source.variables }) });
  const consumer = await sensors.consumer();
  await comes(sensors);
  return { sensors, consumer };
}

const comes = async (sensors: Sensors): Promise<unknown> => {
  const before = (await seen(sensors))?.seen ?? null;
  return await until("a canary has come", async () => ((await seen(sensors))?.seen ?? null) !== before, 60);
};

const insert = (sql: Sql, first: number, last: number) => sql`
  insert into sensor_readings (id, sensor_id, metric, value, recorded_at)
  select i, 'S', 'temp', i, '2024-01-01Z' from generate_series(${first}::int, ${last}::int) i`;

/** As if the last canary had come six minutes ago: were the flow well, the next would be ten seconds away. */
async function goesStale(sensors: Sensors, consumer: Consumer, source: Sql, isWritten = true): Promise<Judged> {
  const { shop, topic } = sensors;
  await shop.admin`update etl.topics set canary_seen = now() - interval '6 min' where topic = ${topic}`;
  const at = async () => (await source`select at from etl_heartbeat`.catch(() => []))[0]?.at?.getTime() ?? 0;
  const [from, now] = [await at(), Date.now()];
  if (isWritten) await until("the source has written two canaries", async () => (await at()) - from > 15_000, 60);
  else await until("two would have come", () => Date.now() - now > 25_000, 60);
  const health = await fetch(`${await consumer.url}/healthz`);
  assert.match(`${health.status} ${await health.text()}`, /^503 no canary from the source for 3\d\d s$/m);
  const { etl_sensors_canary_timestamp_seconds: metric = 0 } = await consumer.metrics();
  assert.ok(Date.now() / 1000 - metric > 300);
  const judged = await status(sensors);
  assert.equal(judged.state, "red");
  assert.match(judged.reasons.join("\n"), /no canary has come from the source for 6m/);
  return judged;
}

/** Waits for a gap, which status shows; stops the consumer. */
async function showsGap(sensors: Sensors, consumer: Consumer, gap: RegExp): Promise<void> {
  await until("a gap shows", async () => (await seen(sensors))?.gap, 90);
  const { state, reasons } = await status(sensors);
  assert.equal(state, "red");
  assert.match(reasons.join("\n"), gap);
  assert.match(reasons.join("\n"), /Next: make verify PIPELINE=sensors, and where rows differ: make resnapshot/);
  assert.equal((await consumer.metrics()).etl_sensors_canary_gap, 1);
}

async function rebuild({ shop, catchUp }: Sensors, consumer: Consumer): Promise<void> {
  await stop(consumer);
  await shop.succeed("scripts/ops/resnapshot.ts");
  await catchUp({ CLICKHOUSE_DATABASE: `${shop.env.CLICKHOUSE_DATABASE}_rebuild` });
  await shop.succeed("scripts/ops/swap-readings.ts");
}

const logical = { wal_level: "logical", max_slot_wal_keep_size: "2MB", min_wal_size: "32MB", max_wal_size: "32MB" };

suite("the canary", { concurrency: true }, () => {
  test("a publication made again: a gap, until a rebuild; the canary's table dropped: stale, then a gap, until verify", async () => {
    const { sensors, consumer } = await begin();
    await using _ = sensors;
    const { shop } = sensors;
    await shop.admin`drop publication etl_sensors`;
    await insert(shop.admin, 1, 500);
    await shop.admin`
      create publication etl_sensors for table public.sensor_readings, public.etl_heartbeat with (publish_via_partition_root = true)`;
    await showsGap(sensors, consumer, /never came|publication was changed or made again/);
    const { code, stderr } = await shop.run("scripts/ops/verify.ts", { PIPELINE: "sensors" });
    assert.equal(code, 1, stderr);
    assert.match(stderr, /500 rows of sensors differ/);
    assert.ok((await seen(sensors))?.gap);
    await rebuild(sensors, consumer);
    assert.deepEqual(await sensors.readings(), await sensors.source());
    assert.equal((await seen(sensors))?.gap, null);

    const again = await sensors.consumer();
    await comes(sensors);
    // Whoever holds the row stops the canaries, not the changes.
    const holder = shop.connect("holder");
    await holder.unsafe("begin; select from etl_heartbeat for update").simple();
    await delay(21_000); // Debezium has tried to write two
    await insert(shop.admin, 501, 501);
    await until("a change has come", async () => (await sensors.readings()).length === 501, 20).finally(() => holder.end());
    await shop.admin`drop table etl_heartbeat`;
    await goesStale(sensors, again, shop.admin, false);
    await shop.admin.unsafe(readFileSync(join(root, "sql/replication.sql"), "utf8")).simple();
    await comes(sensors);
    await showsGap(sensors, again, /never came/);
    await shop.succeed("scripts/ops/verify.ts", { PIPELINE: "sensors" });
    assert.deepEqual(await status(sensors).then(({ state, reasons }) => [state, reasons]), ["ok", []]);
    await shop.admin`alter publication etl_sensors set (publish = 'insert, update')`; // canaries are both
    await showsGap(sensors, again, /publication was changed or made again/);
  });

  test("the replicator's password changed: stale; the WAL of the slot removed: stale, and make resnapshot is named", async () => {
    await using source = await createCluster(logical);
    const { sensors, consumer } = await begin(source);
    await using _ = sensors;
    const { shop } = sensors;
    const { password } = new URL(source.variables.REPLICATION_DATABASE_URL);
    await source.admin`alter role etl_replicator password 'another'`;
    await source.admin`select pg_terminate_backend(pid) from pg_stat_activity where usename = 'etl_replicator'`;
    await goesStale(sensors, consumer, source.admin, false);
    await source.admin.unsafe(`alter role etl_replicator password '${password}'`);
    await sensors.connector();
    await comes(sensors);

    const connector = new URL(`/connectors/etl-${shop.env.CLICKHOUSE_DATABASE}-sensor_readings`, shop.env.CONNECT_URL);
    await fetch(`${connector}/stop`, { method: "PUT" });
    await until("nobody reads the slot", async () => !(await source.admin`select active from pg_replication_slots`)[0]?.active);
    await until("its WAL is removed", async () => {
      await source.admin`select pg_logical_emit_message(false, 'test', repeat('x', 20000000))`;
      await source.admin`checkpoint`;
      return (await source.admin`select wal_status from pg_replication_slots`)[0]?.wal_status === "lost";
    });
    await fetch(`${connector}/resume`, { method: "PUT" });
    const { reasons } = await goesStale(sensors, consumer, source.admin);
    assert.match(reasons.join("\n"), /has removed WAL that slot etl_\w+ needs: .*make resnapshot/);
    for (const script of ["scripts/ops/connector.ts", "scripts/ops/doctor.ts"]) {
      const { code, stderr, stdout } = await shop.run(script, { PIPELINE: "sensors" });
      assert.notEqual(code, 0);
      assert.match(stderr + stdout, /make resnapshot/);
    }
    await insert(source.admin, 1, 10);
    await rebuild(sensors, consumer);
    assert.equal((await sensors.readings()).length, 10);
  });

  test("a source restored from a copy of its disk, whose slot is behind what Debezium stored: a gap, or stale", async () => {
    await using source = await createCluster(logical);
    const { sensors, consumer } = await begin(source);
    await using _ = sensors;
    const disk = await source.saveDisk();
    await insert(source.admin, 1, 1000);
    await until("they have come", async () => (await sensors.readings()).length === 1000, 90);
    await disk.restore();
    await insert(source.admin, 2001, 2050);
    const ended = await Promise.race([
      showsGap(sensors, consumer, /never came/).then(() => "gap"),
      goesStale(sensors, consumer, source.admin).then(() => "stale"),
    ]);
    assert.match(ended, /gap|stale/);
  });
});
