// make status: what is red, and why; retention; and a source that was restored from an older backup. Needs the local stack (make up).
import assert from "node:assert/strict";
import { execFile } from "node:child_process";
import { randomBytes } from "node:crypto";
import { cpSync, mkdirSync, readFileSync, rmSync } from "node:fs";
import { join } from "node:path";
import { after, before, suite, test } from "node:test";
import { promisify } from "node:util";
import postgres from "postgres";
import { readIntervals, readThreshold } from "../../shared/alerts.ts";
import { watermarked } from "../../shared/pipelines.ts";
import { createSource } from "../data/source.ts";
import { createLink } from "../lib/link.ts";
import { createSensors } from "../lib/sensors.ts";
import { createShop, freePort, type Process, type Shop, until } from "../lib/shop.ts";
import type { Status } from "../lib/status.ts";
import { type Env, localEnv, root } from "../stack/env.ts";
import { type Cluster, startCluster, stopCluster } from "../stack/postgres.ts";
import { python } from "../stack/python.ts";
import { stackPath } from "../stack/stack.ts";

const script = "scripts/ops/status.ts";

type Answer = { code: number | null; of: Record<string, Status> };
async function statusOf(shop: Shop, variables: Env = {}): Promise<Answer> {
  const { code, stdout, stderr } = await shop.run(script, { JSON: "1", ...variables });
  assert.ok(stdout, stderr);
  const all = JSON.parse(stdout) as Status[];
  return { code, of: Object.fromEntries(all.map((of) => [of.pipeline, of])) };
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
    await shop.insertRows(1, 3);
    await shop.succeed(shop.script);
  });
  after(() => shop?.[Symbol.asyncDispose]());

  const age = (hours: number) =>
    shop.admin`update etl.runs set started_at = started_at - make_interval(hours => ${hours}), finished_at = finished_at - make_interval(hours => ${hours})`;

  test("every pipeline has a line, and in JSON every key that --help documents", async () => {
    const { stdout } = await shop.succeed(script, { JSON: "1" });
    const all = JSON.parse(stdout) as Status[];
    assert.deepEqual(
      all.map(({ pipeline }) => pipeline),
      [...watermarked(), "sensors", "views"].sort(),
    );
    const header = readFileSync(join(root, script), "utf8").replaceAll(/\n \* +/g, " ");
    const documented = /sql\/status\.sql: (.*?); times/.exec(header)?.[1]?.split(", ").sort();
    for (const of of all) assert.deepEqual(Object.keys(of).sort(), documented, of.pipeline);
  });

  test("a success older than two intervals is red and exit code 1, and a re-run by hand does not hide it", async () => {
    const fresh = await statusOf(shop);
    assert.deepEqual([fresh.code, fresh.of.orders?.state, fresh.of.orders?.reasons], [0, "ok", []]);
    await age(1);
    assert.equal((await statusOf(shop)).of.orders?.state, "ok");
    await age(2);
    await shop.succeed(shop.script, { FROM: "2017-01-01", TO: "2017-01-02" });
    const { code, of } = await statusOf(shop);
    assert.deepEqual([code, of.orders?.state, of.orders?.last_run_by_hand], [1, "red", true]);
    assert.match(of.orders?.reasons[0] ?? "", /^its last success is 3h 0m ago, and its interval 1h 0m$/);
    assert.equal(of.users?.state, "new");
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
    assert.match((await shop.run(script)).stdout, new RegExp(`^orders: its lock is held by ${id} since 20`, "m"));
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
      const said = of.sensors?.reasons.join("\n") ?? "";
      for (const part of ["Kafka", "ClickHouse", "Kafka Connect"])
        assert.match(said, new RegExp(`^${part} is not known: ${part} has not answered within 5 s$`, "m"));
      assert.match(said, /^the slot is not known: /m);
      assert.deepEqual([of.sensors?.state, of.orders?.watermark], ["red", await shop.watermark()]);
    } finally {
      await shop.admin`delete from etl.topics`;
    }
  });

  test("colours come on a terminal only, and not where NO_COLOR is set", async () => {
    const program = `import pty, os, sys
status = pty.spawn(sys.argv[1:])
sys.exit(os.waitstatus_to_exitcode(status))`;
    // Node takes the terminal of a CI for one without colours.
    const { CI, NO_COLOR, NODE_DISABLE_COLORS, FORCE_COLOR, ...env } = shop.env;
    const onTerminal = (variables: Env = {}) =>
      promisify(execFile)(python, ["-c", program, process.execPath, join(root, script)], {
        env: { ...env, TERM: "xterm", ...variables } as NodeJS.ProcessEnv,
      });
    const coloured = String.fromCharCode(27);
    assert.ok((await onTerminal()).stdout.includes(`${coloured}[32morders`));
    assert.ok(!(await onTerminal({ NO_COLOR: "1" })).stdout.includes(`${coloured}[`));
    assert.ok(!(await shop.run(script)).stdout.includes(coloured));
  });

  test("a run that succeeded deletes the history older than RETENTION_DAYS: never the latest run of a kind, nor a day that is yet to be archived", async () => {
    await shop.admin`delete from etl.chunks`;
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

test("dead letters go after 400 days, also in a table that was made before", async () => {
  await using shop = await createShop({ clickhouse: true });
  const { clickhouse } = shop;
  await clickhouse.command({ query: "ALTER TABLE sensor_dead_letters REMOVE TTL" });
  await clickhouse.command({ query: "DROP TABLE etl_migrations SYNC" });
  await shop.succeed("scripts/ops/migrate.ts");
  await clickhouse.command({
    query:
      "INSERT INTO sensor_dead_letters SELECT 't', 1, 0, number, 0, 'r', 'k', 'v', now64(3) - toIntervalDay(398 + number * 3) FROM numbers(2)",
  });
  await clickhouse.command({ query: "OPTIMIZE TABLE sensor_dead_letters FINAL" });
  const answer = await clickhouse.query({
    query: "SELECT toString(offset) AS offset FROM sensor_dead_letters",
    format: "JSONEachRow",
  });
  assert.deepEqual(await answer.json(), [{ offset: "0" }]);
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
  const { code, of } = await statusOf(shop);
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
  const empty = await until("the group is empty", async () => {
    const now = await statusOf(shop);
    return now.of.sensors?.sensors?.consumers === 0 ? now : undefined;
  });
  assert.match(empty.of.sensors?.reasons.join() ?? "", /no consumer runs\..*,1 dead letters\. Next: make dead-letters/);

  await insert(1000);
  const behind = await until("the messages wait", async () => {
    const now = await statusOf(shop);
    return now.of.sensors?.sensors?.lag ? now : undefined;
  });
  assert.deepEqual([behind.code, behind.of.sensors?.state], [1, "red"]);
  assert.match((await shop.run(script)).stdout, /^sensors: lag \d+ · consumers 0 · dead letters 1 · WAL kept for the slot \d+ MB$/m);

  await fetch(new URL(`/connectors/etl-${shop.dataset}-sensor_readings/stop`, shop.env.CONNECT_URL), { method: "PUT" });
  const stopped = await until("the connector is stopped", async () => {
    const now = await statusOf(shop);
    return now.of.sensors?.sensors?.connector_running === false ? now : undefined;
  });
  assert.match(stopped.of.sensors?.reasons.join("\n") ?? "", /^Debezium's connector does not run\. Next: make connector$/m);
});

suite("a source restored from an older backup", { concurrency: true }, () => {
  const says =
    /rows that were synced since may be gone there\. Next: ops\/runbook\.md, "After a restore, a failover or a clock set back", with make rewind PIPELINE=orders TO=…/;

  /** The run refuses and moves nothing; status is red; after the runbook's steps source and destination are equal. */
  async function assertNoticed(
    shop: Shop,
    variables: Env,
    taken: string,
    words: RegExp,
    rows: () => Promise<{ id: string; text: string }[]>,
  ): Promise<void> {
    const state = async () => [await shop.watermark(), await shop.destinationRows()];
    const before = await state();
    const { code, stderr } = await shop.run(shop.script, variables);
    assert.match(stderr, words);
    assert.match(stderr, says);
    assert.equal(code, 1);
    assert.deepEqual(await state(), before);
    const status = await statusOf(shop, variables);
    assert.deepEqual([status.code, status.of.orders?.state], [1, "red"]);
    assert.match(status.of.orders?.reasons.join() ?? "", words);

    // ops/runbook.md, "After a restore, a failover or a clock set back".
    await shop.query(`DELETE FROM orders WHERE updated_at >= TIMESTAMP '${taken}'`);
    await shop.succeed("scripts/ops/rewind.ts", { ...variables, PIPELINE: "orders", TO: "0001-01-01" });
    await shop.succeed(shop.script, variables);
    const there = await shop.query("SELECT id, status AS text FROM orders ORDER BY orders.id");
    assert.deepEqual(there, await rows());
    assert.equal((await statusOf(shop, variables)).code, 0);
  }

  test("as a database made anew from it: the run stops, status is red, and the runbook's steps make both equal", async () => {
    await using shop = await createShop({ clickhouse: true });
    const server = shop.connect("dba");
    const [source, backup] = [`${shop.dataset}_source`, `${shop.dataset}_backup`];
    const to = (name: string, url = shop.env.SOURCE_DATABASE_URL) => Object.assign(new URL(url ?? ""), { pathname: `/${name}` }).href;
    const variables = { SOURCE_DATABASE_URL: to(source) };
    const insert = async (first: number, last: number, text: string): Promise<void> => {
      const sql = postgres(to(source, shop.env.STACK_ADMIN_DATABASE_URL), { max: 1 });
      await sql`insert into orders (id, status) select i, ${text} from generate_series(${first}::int, ${last}::int) i on conflict (id) do update set status = excluded.status`;
      await sql.end();
    };
    const rows = async () => {
      const sql = postgres(to(source, shop.env.STACK_ADMIN_DATABASE_URL), { max: 1 });
      const found = await sql<{ id: string; text: string }[]>`select id::text, status as text from orders order by orders.id`;
      await sql.end();
      return found.map((row) => ({ ...row }));
    };
    try {
      await server.unsafe(`create database ${source}`);
      await createSource(to(source, shop.env.STACK_ADMIN_DATABASE_URL), []);
      await insert(1, 5, "before");
      await shop.succeed(shop.script, variables);
      await server.unsafe(`create database ${backup} template ${source}`);
      const taken = new Date().toISOString();
      await insert(4, 8, "lost");
      await shop.succeed(shop.script, variables);
      await server.unsafe(`drop database ${source} with (force)`);
      await server.unsafe(`create database ${source} template ${backup}`);
      await insert(9, 9, "after the restore");
      await assertNoticed(
        shop,
        variables,
        taken,
        /is another one than the watermark \S+ was taken from \(expected .*, found .*\): it was restored or failed over/,
        rows,
      );
    } finally {
      for (const name of [source, backup]) await server.unsafe(`drop database if exists ${name} with (force)`);
    }
  });

  test("as a copy of its files, with the same system identifier and timeline: the same", async () => {
    await using shop = await createShop({ clickhouse: true });
    const name = `test-restored-${randomBytes(4).toString("hex")}`;
    const folder = stackPath("clusters", name);
    mkdirSync(folder, { recursive: true });
    const url = Object.assign(new URL(localEnv().STACK_ADMIN_DATABASE_URL ?? ""), { port: String(await freePort()) });
    const cluster: Cluster = {
      name,
      dataDir: join(folder, "data"),
      url: url.href,
      settings: { shared_buffers: "16MB", max_connections: "30" },
    };
    const reader = new URL(localEnv().SOURCE_DATABASE_URL ?? "");
    const variables = { SOURCE_DATABASE_URL: Object.assign(reader, { host: url.host, pathname: url.pathname }).href };
    const admin = postgres(cluster.url, { max: 1, fetch_types: false });
    const insert = (first: number, last: number, text: string) => admin`
      insert into orders (id, status) select i, ${text} from generate_series(${first}::int, ${last}::int) i on conflict (id) do update set status = excluded.status`;
    const rows = async () =>
      (await admin<{ id: string; text: string }[]>`select id::text, status as text from orders order by orders.id`).map((row) => ({
        ...row,
      }));
    try {
      await startCluster(cluster);
      await createSource(cluster.url, [localEnv().SOURCE_DATABASE_URL ?? ""]);
      await insert(1, 5, "before");
      await shop.succeed(shop.script, variables);
      await stopCluster(name);
      cpSync(cluster.dataDir, join(folder, "backup"), { recursive: true });
      const taken = new Date().toISOString();
      await startCluster(cluster);
      await insert(4, 2000, "lost");
      await shop.succeed(shop.script, variables);
      await stopCluster(name);
      rmSync(cluster.dataDir, { recursive: true });
      cpSync(join(folder, "backup"), cluster.dataDir, { recursive: true });
      await startCluster(cluster);
      await insert(9, 9, "after the restore");
      await assertNoticed(
        shop,
        variables,
        taken,
        /went back: its WAL ends at \S+, and was at \S+ when the watermark \S+ was set: it was restored or failed over/,
        rows,
      );
    } finally {
      await admin.end({ timeout: 1 });
      await stopCluster(name);
      rmSync(folder, { recursive: true, force: true });
    }
  });
});
