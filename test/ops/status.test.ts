// make status: what is red, and why; retention; and a source that was restored from an older backup. Needs the local stack (make up).
import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { after, before, suite, test } from "node:test";
import type { Sql } from "postgres";
import { readIntervals, readThreshold } from "../../shared/alerts.ts";
import { watermarked } from "../../shared/pipelines.ts";
import { createCluster } from "../lib/cluster.ts";
import { createLink } from "../lib/link.ts";
import { createSensors } from "../lib/sensors.ts";
import { createShop, type Process, type Shop, until } from "../lib/shop.ts";
import type { Status } from "../lib/status.ts";
import { type Env, root } from "../stack/env.ts";

const script = "scripts/ops/status.ts";

type Answer = { code: number | null; of: Record<string, Status> };
async function statusOf(shop: Shop, variables: Env = {}): Promise<Answer> {
  const { code, stdout, stderr } = await shop.run(script, { JSON: "1", ...variables });
  assert.ok(stdout, stderr);
  const all = JSON.parse(stdout) as Status[];
  return { code, of: Object.fromEntries(all.map((of) => [of.pipeline, of])) };
}

/** The table that people see: the cells of each pipeline's line, by its name, and all of it. */
async function show(shop: Shop): Promise<{ cells: Record<string, string[]>; stdout: string; code: number | null }> {
  const { stdout, code } = await shop.run(script);
  const [names = "", ...lines] = (stdout.split("\n\n")[0] ?? "").trim().split("\n");
  assert.match(names, /^PIPELINE +WATERMARK +AGE +LAST SUCCESS +EVERY +LAST RUN +ROWS +LOCK HELD BY +STATE$/);
  const cells = lines.map((line) => line.split(/ {2,}/));
  return { cells: Object.fromEntries(cells.map(([name = "", ...others]) => [name, others])), stdout, code };
}

/** Starts a run that waits, with its lock, for a table that somebody else has locked, until `free` is called. */
async function startHeld(shop: Shop, variables: Env = {}): Promise<{ run: Process; id: string; free(): Promise<void> }> {
  const owner = shop.connect("owner");
  await owner.unsafe(`begin; lock table ${shop.table} in access exclusive mode`);
  const run = shop.start(shop.script, variables);
  const id = await until("the run waits for the table", async () => {
    const [waiting] = await shop.admin`
      select split_part(application_name, 'run=', 2) as id from pg_stat_activity
      where datname = current_database() and application_name like 'etl:orders run=%' and wait_event_type = 'Lock'`;
    return waiting?.id as string | undefined;
  });
  return { run, id, free: async () => void (await owner.unsafe("rollback")) };
}

test("the intervals and limits that status judges by are those of ops/alerts.yml", () => {
  const rules = readFileSync(join(root, "ops/alerts.yml"), "utf8");
  const constants = rules.match(/record: etl_expected_interval_seconds/g) ?? [];
  assert.equal(readIntervals().size, constants.length);
  assert.deepEqual([readIntervals().get("orders"), readIntervals().get("views")], [3600, 604800]);
  for (const metric of ["etl_watermark_hold_seconds", "etl_sensors_lag", "etl_sensors_slot_retained_bytes"])
    assert.ok(readThreshold(metric) > 0, metric);
  assert.throws(() => readThreshold("etl_none"), /no alert of the form etl_none > NUMBER/);
});

suite("with one pipeline", () => {
  let shop: Shop;
  before(async () => {
    shop = await createShop({ clickhouse: true });
    await shop.insertRows(1, 1234);
    await shop.succeed(shop.script);
  });
  after(() => shop?.[Symbol.asyncDispose]());

  const age = (hours: number) =>
    shop.admin`update etl.runs set started_at = started_at - make_interval(hours => ${hours}), finished_at = finished_at - make_interval(hours => ${hours})`;

  test("every pipeline has a line: never ran, or its watermark, last success, ages and rows", async () => {
    const [{ cells, code }, { of }] = [await show(shop), await statusOf(shop)];
    assert.deepEqual(Object.keys(of), [...watermarked(), "sensors", "views"].sort());
    assert.deepEqual(cells.users, ["none", "-", "never", "1d", "never", "-", "nobody", "new"]);
    const { watermark: none, last_success: never, last_run: neither, rows: no, held_by, state, reasons } = of.users as Status;
    assert.deepEqual([none, never, neither, no, held_by, state, reasons], [null, null, null, null, null, "new", ["it never ran"]]);
    const [watermark, age, success, interval, run, ...others] = cells.orders ?? [];
    assert.equal(watermark, await shop.watermark());
    assert.match(`${age} | ${success} | ${run}`, /^\d+s \| \d+s ago \| succeeded \d+s ago$/);
    assert.deepEqual([code, interval, ...others], [0, "1h", "1,234", "nobody", "ok"]);
    const orders = of.orders as Status;
    assert.deepEqual([orders.state, orders.reasons, orders.watermark, orders.rows], ["ok", [], watermark, 1234]);
    assert.deepEqual([orders.last_run_state, orders.last_error], ["succeeded", null]);
    for (const name of ["watermark_age_seconds", "last_success_age_seconds", "last_run_age_seconds"] as const)
      assert.ok(Number(orders[name]) >= 0 && Number(orders[name]) < 60, `${name}: ${orders[name]}`);
    assert.match(String(orders.last_success), /^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00$/);
  });

  test("the last failure is shown with its error, and still the last success", async () => {
    await shop.admin`alter table orders alter created_at drop not null`;
    assert.equal((await shop.run(shop.script)).code, 2);
    await shop.admin`alter table orders alter created_at set not null`;
    const [{ cells, stdout, code }, { of }] = [await show(shop), await statusOf(shop)];
    const [watermark, , success, , run, count, , state] = cells.orders ?? [];
    assert.deepEqual([code, watermark], [1, await shop.watermark()]);
    assert.match(`${success} | ${run} | ${count} | ${state}`, /^\d+s ago \| failed \d+s ago \| 1,234 \| red$/);
    const error = "column public\\.orders\\.created_at: expected TIMESTAMP REQUIRED";
    assert.match(stdout, new RegExp(`^orders: its last run failed: .*\\n +${error}`, "m"));
    assert.match(String(of.orders?.last_error), new RegExp(error));
    await shop.succeed(shop.script);
  });

  test("who holds the watermark is named, and for how long; unknown, not nobody, where the role may not see it", async () => {
    const assertHeldBy = async (held: string): Promise<void> => {
      const [{ cells, stdout, code }, { of }] = [await show(shop), await statusOf(shop)];
      assert.deepEqual([code, cells.orders?.at(-1)], [0, "warn"]);
      assert.match(stdout, new RegExp(`^orders: its watermark is held for \\d+s by ${held}`, "m"));
      assert.match(String(of.orders?.held_by), new RegExp(`^${held}`));
      assert.ok(Number(of.orders?.hold_seconds) > 0);
    };
    const holder = shop.connect("nightly import");
    await holder.unsafe("begin; create table public.imported ()");
    await assertHeldBy('pid \\d+, application "nightly import", role postgres, state idle in transaction, open for ');
    await holder.unsafe(`prepare transaction '${shop.dataset}'`);
    await assertHeldBy(`prepared transaction "${shop.dataset}" of role postgres, prepared `).finally(() =>
      holder.unsafe(`rollback prepared '${shop.dataset}'`),
    );
    const { orders } = (await statusOf(shop)).of;
    assert.deepEqual([orders?.held_by, orders?.hold_seconds], [null, 0]);

    const role = `${shop.dataset}_blind`;
    await shop.admin.unsafe(`create role ${role} login password 'secret'`);
    const url = Object.assign(new URL(shop.env.SOURCE_DATABASE_URL ?? ""), { username: role, password: "secret" });
    const { of } = await statusOf(shop, { SOURCE_DATABASE_URL: url.href }).finally(() => shop.admin.unsafe(`drop role ${role}`));
    assert.match(String(of.orders?.held_by), /^unknown: .*grant pg_monitor to/);
  });

  test("a success older than two intervals is red and exit code 1, and a re-run by hand does not hide it", async () => {
    await age(1);
    assert.equal((await statusOf(shop)).of.orders?.state, "ok");
    await age(2);
    await shop.succeed(shop.script, { FROM: "2017-01-01", TO: "2017-01-02" });
    const { code, of } = await statusOf(shop);
    assert.deepEqual([code, of.orders?.state, of.orders?.last_run_by_hand], [1, "red", true]);
    assert.match(of.orders?.reasons[0] ?? "", /^its last success is 3h 0m ago, and its interval 1h 0m$/);
    const { stdout } = await shop.run(script);
    assert.match(stdout, /^orders: its last success is 3h 0m ago/m);
    await shop.succeed(shop.script);
    assert.equal((await statusOf(shop)).code, 0);
  });

  test("a run that is going is shown with its lock; killed, it is abandoned, and the next run clears it", async () => {
    const { run, id, free } = await startHeld(shop);
    const going = await statusOf(shop);
    const { last_run_state, last_run_id, lock, lock_since } = going.of.orders as Status;
    assert.deepEqual([going.code, last_run_state, last_run_id, lock], [0, "running", id, id]);
    assert.match(lock_since ?? "", /^20\d\d-/);
    run.child.kill("SIGKILL");
    await run.ended;
    await free();
    const sessions = () => shop.admin`select from pg_stat_activity where application_name like ${`%run=${id}`}`;
    await until("its sessions are gone", async () => (await sessions()).count === 0);
    const killed = await statusOf(shop);
    assert.deepEqual([killed.code, killed.of.orders?.last_run_state, killed.of.orders?.lock], [1, "abandoned", null]);
    assert.match(killed.of.orders?.reasons[0] ?? "", new RegExp(`^its last run, ${id}, was abandoned`));
    assert.match((await shop.run(script)).stdout, /^orders .* abandoned \d+s ago .* red$/m);
    await shop.succeed(shop.script);
    const next = await statusOf(shop);
    assert.deepEqual([next.code, next.of.orders?.state], [0, "ok"]);
  });

  test("the days of events are counted from etl.chunks, with those that failed", async () => {
    for (const day of ["2017-01-01", "2017-01-02"]) await shop.insertEvents(day, 3);
    await shop.succeed("scripts/ops/backfill-events.ts", { FROM: "2017-01-01", TO: "2017-01-04" });
    await shop.admin`update etl.chunks set state = 'failed' where chunk_from = '2017-01-02Z'`;
    const { code, of } = await statusOf(shop);
    assert.deepEqual(of.events?.days, {
      archived: 2,
      failed: 1,
      running: 0,
      first: "2017-01-01",
      last: "2017-01-03",
      at: null,
    });
    // By hand only: it never ran by its schedule.
    assert.deepEqual([code, of.events?.state, of.events?.last_success], [0, "warn", null]);
    assert.match((await shop.run(script)).stdout, /^events: 2 days archived of 2017-01-01 to 2017-01-03, 1 failed$/m);
  });

  test("with Postgres alone configured it works, and sensors are said to be not configured", async () => {
    const none = Object.keys(shop.env).filter((name) => /^(BIGQUERY|S3|AWS|KAFKA|SENSORS|CLICKHOUSE|CONNECT|PUSH|REPL|METRICS)/.test(name));
    const { code, of } = await statusOf(shop, Object.fromEntries(none.map((name) => [name, ""])));
    assert.deepEqual([code, of.orders?.state], [0, "ok"]);
    assert.deepEqual(
      [of.sensors?.state, of.sensors?.reasons, of.sensors?.sensors],
      ["new", ["it is not configured (SENSORS_TOPIC)"], null],
    );
  });

  test("servers that accept and never answer are named, and the command ends", async () => {
    await using silent = await createLink(shop.env.SOURCE_DATABASE_URL);
    silent.hang();
    const { port } = silent;
    const topic = shop.env.SENSORS_TOPIC ?? "";
    await shop.admin`insert into etl.topics (topic, epoch, database) values (${topic}, 1, 'x')`;
    try {
      const url = `http://127.0.0.1:${port}`;
      const { code, of } = await statusOf(shop, {
        SOURCE_DATABASE_URL: `postgres://etl_reader:x@127.0.0.1:${port}/shop`,
        KAFKA_BROKERS: `127.0.0.1:${port}`,
        CLICKHOUSE_URL: url,
        CONNECT_URL: url,
      });
      assert.equal(code, 1);
      assert.match(of.orders?.held_by ?? "", /^unknown: cannot connect to SOURCE_DATABASE_URL .*CONNECT_TIMEOUT/);
      assert.match(of.orders?.reasons.join() ?? "", /cannot tell which transaction holds its watermark: cannot connect to SOURCE/);
      const said = of.sensors?.reasons.join("\n") ?? "";
      for (const part of ["Kafka", "ClickHouse", "Kafka Connect"])
        assert.match(said, new RegExp(`^${part} is not known: no answer within 5 s$`, "m"));
      assert.match(said, /^the slot is not known: /m);
      assert.deepEqual([of.sensors?.state, of.orders?.watermark], ["red", await shop.watermark()]);
    } finally {
      await shop.admin`delete from etl.topics`;
    }
  });

  test("a run that succeeded deletes the history older than RETENTION_DAYS: never the latest run of a kind, nor a day that is yet to be archived", async () => {
    await shop.admin.unsafe("delete from etl.chunks; delete from etl.runs where state = 'failed'");
    await shop.admin`
      insert into etl.runs (run_id, pipeline, state, by_hand, host, pid, started_at)
      select format('old_%s_%s', p, i), p, case i when 2 then 'rewound' when 3 then 'running' else 'succeeded' end, i = 4, 'h', 1,
        now() - interval '401 days' - i * interval '1 hour' from generate_series(1, 6) i, unnest('{orders,users}'::text[]) p`;
    await shop.admin`
      insert into etl.runs (run_id, pipeline, state, host, pid, started_at) values ('young', 'orders', 'failed', 'h', 1, now() - interval '399 days')`;
    await shop.admin`
      insert into etl.chunks (pipeline, chunk_from, chunk_to, state, run_id, finished_at)
      select 'events', day, day + interval '1 day', state, 'old', now() - make_interval(days => age)
      from (values ('2017-01-01Z'::timestamptz, 'succeeded', 401), ('2017-01-02Z', 'failed', 401), ('2017-01-03Z', 'succeeded', 399)) v (day, state, age)`;
    await shop.succeed(shop.script);
    await shop.succeed("scripts/events.ts");
    const left = async (pipeline: string) =>
      (await shop.admin`select run_id from etl.runs where pipeline = ${pipeline} and host = 'h' order by run_id`).map(
        ({ run_id }) => run_id,
      );
    // Of orders there are newer runs by schedule, by hand, and abandoned; the rewind is the latest of its kind.
    assert.deepEqual(await left("orders"), ["old_orders_2", "young"]);
    assert.equal((await left("users")).length, 6, "another pipeline's history is its own run's to delete");
    const days = await shop.admin`select state, run_id from etl.chunks where run_id = 'old' order by chunk_from`;
    assert.deepEqual(
      days.map(({ state }) => state),
      ["failed", "succeeded"],
    );
    await shop.succeed(shop.script, { RETENTION_DAYS: "398" });
    assert.deepEqual(await left("orders"), ["old_orders_2", "young"], "the only failed one stays");
  });
});

test("sensors: lag, consumers, dead letters, connector and slot; without a consumer red while messages wait", async () => {
  await using sensors = await createSensors();
  const { shop } = sensors;
  const insert = (first: number) => shop.admin`
    insert into sensor_readings (id, sensor_id, metric, value, recorded_at)
    select i, 'S', 'temp', i, '2024-01-01Z' from generate_series(${first}::int, ${first + 99}::int) i`;
  assert.equal((await statusOf(shop)).of.sensors?.state, "new");
  const consumer = await sensors.consumer();
  await insert(1);
  await sensors.equal();
  await sensors.drained();
  // A canary may be on its way.
  const { code, of } = await until("no message waits", async () => {
    const now = await statusOf(shop);
    return now.of.sensors?.sensors?.lag === 0 ? now : undefined;
  });
  const { slot_retained_bytes: bytes, canary_age_seconds: age, ...well } = of.sensors?.sensors ?? {};
  assert.deepEqual(well, {
    topic: sensors.topic,
    epoch: 1,
    lag: 0,
    consumers: 1,
    dead_letters: 0,
    connector_running: true,
    slot_active: true,
    canary_gap: null,
  });
  assert.ok(typeof bytes === "number" && bytes >= 0);
  assert.ok(typeof age === "number" && age < 60);
  assert.deepEqual([code, of.sensors?.state, of.sensors?.reasons], [0, "ok", []]);
  assert.ok((of.sensors?.last_success_age_seconds ?? 99) < 60);

  await sensors.produce([{ key: '{"id":1}', value: "no change" }]);
  await until("it is a dead letter", async () => (await sensors.deadLetters()).length);
  consumer.child.kill("SIGTERM");
  await consumer.ended;
  await insert(1000);
  await until("the messages wait", async () => (await sensors.state()).some(({ lag }) => lag > 0));
  await fetch(new URL(`/connectors/etl-${shop.dataset}-sensor_readings/stop`, shop.env.CONNECT_URL), { method: "PUT" });
  const behind = await until("the group is empty and the connector stopped", async () => {
    const now = await statusOf(shop);
    return now.of.sensors?.sensors?.consumers === 0 && now.of.sensors.sensors.connector_running === false ? now : undefined;
  });
  assert.deepEqual([behind.code, behind.of.sensors?.state], [1, "red"]);
  const said = behind.of.sensors?.reasons.join("\n") ?? "";
  for (const says of [
    /no consumer runs\./,
    /^1 dead letters\. Next: make dead-letters/m,
    /^Debezium's connector does not run\. Next: make connector$/m,
  ])
    assert.match(said, says);
  assert.match((await shop.run(script)).stdout, /^sensors: lag [1-9]\d* · consumers 0 · dead letters 1 · WAL kept for the slot \d+ MB$/m);
});

suite("a source restored from an older backup", { concurrency: true }, () => {
  const next =
    /rows that were synced since may be gone there\. Next: ops\/runbook\.md, "After a restore, a failover or a clock set back", with make rewind PIPELINE=orders TO=…/;

  interface Source {
    variables: Env;
    admin: Sql;
    backUp(): Promise<{ restore(): Promise<void> }>;
  }

  /** The run refuses and moves nothing; status is red; after the runbook's steps source and destination are equal. */
  async function assertNoticed(shop: Shop, { variables, admin, backUp }: Source, says: RegExp): Promise<void> {
    const insert = (first: number, last: number, text: string) => admin`
      insert into orders (id, status) select i, ${text} from generate_series(${first}::int, ${last}::int) i
      on conflict (id) do update set status = excluded.status`;
    await insert(1, 5, "before");
    await shop.succeed(shop.script, variables);
    const backup = await backUp();
    const taken = new Date().toISOString();
    await insert(4, 2000, "lost");
    await shop.succeed(shop.script, variables);
    await backup.restore();
    await insert(9, 9, "after the restore");

    const state = async () => [await shop.watermark(), await shop.destinationRows()];
    const before = await state();
    assert.match((await shop.refused(shop.script, 1, says, variables)).stderr, next);
    assert.deepEqual(await state(), before);
    const status = await statusOf(shop, variables);
    assert.deepEqual([status.code, status.of.orders?.state], [1, "red"]);
    assert.match(status.of.orders?.reasons.join() ?? "", says);

    // ops/runbook.md, "After a restore, a failover or a clock set back".
    await shop.query(`DELETE FROM orders WHERE updated_at >= TIMESTAMP '${taken}'`);
    await shop.succeed("scripts/ops/rewind.ts", { ...variables, PIPELINE: "orders", TO: "0001-01-01" });
    await shop.succeed(shop.script, variables);
    const rows = await admin`select id::text, status as text from orders order by orders.id`;
    assert.deepEqual(
      await shop.query("SELECT id, status AS text FROM orders ORDER BY orders.id"),
      Array.from(rows, (row) => ({ ...row })),
    );
    assert.equal((await statusOf(shop, variables)).code, 0);
  }

  test("as a database made anew from it: the run stops, status is red, and the runbook's steps make both equal", async () => {
    await using shop = await createShop();
    await using source = await createShop({ bigquery: false });
    const [name, backup] = [source.dataset, `${source.dataset}_backup`];
    const copy = async (to: string, from: string): Promise<void> => {
      await shop.admin`select pg_terminate_backend(pid, 5000) from pg_stat_activity where datname = ${from}`;
      await shop.admin.unsafe(`drop database if exists ${to} with (force)`);
      await shop.admin.unsafe(`create database ${to} template ${from}`);
    };
    const variables = { SOURCE_DATABASE_URL: source.env.SOURCE_DATABASE_URL };
    const backUp = () => copy(backup, name).then(() => ({ restore: () => copy(name, backup) }));
    const says = /is another one than the watermark \S+ was taken from \(expected .*, found .*\): it was restored or failed over/;
    await assertNoticed(shop, { variables, admin: source.admin, backUp }, says).finally(() =>
      shop.admin.unsafe(`drop database if exists ${backup} with (force)`),
    );
  });

  test("as a copy of its files, with the same system identifier and timeline: the same", async () => {
    await using shop = await createShop();
    await using cluster = await createCluster();
    const says = /went back: its WAL ends at \S+, and was at \S+ when the watermark \S+ was set: it was restored or failed over/;
    await assertNoticed(shop, { ...cluster, backUp: cluster.saveDisk }, says);
  });
});
