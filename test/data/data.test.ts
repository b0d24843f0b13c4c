// The real data set as loaded, and what guards it; needs the local stack (make up). All of its events are loaded by make soak.
import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import { after, before, test } from "node:test";
import postgres from "postgres";
import { until } from "../lib/shop.ts";
import { localEnv } from "../stack/env.ts";
import { changeReadings, changeSource } from "./change.ts";
import { loadData, openSource, tables } from "./load.ts";

const admin = localEnv().STACK_ADMIN_DATABASE_URL ?? "";
const scratch = `data_test_${process.pid}`;
const scratchUrl = Object.assign(new URL(admin), { pathname: `/${scratch}` }).href;
const soak = process.env.SOAK === "1";
const only = tables.filter((table) => soak || table !== "events");
let server: postgres.Sql;
let sql: postgres.Sql;

const one = async (query: string): Promise<postgres.Row> => (await sql.unsafe(query))[0] ?? assert.fail("no row");

before(async () => {
  server = openSource(admin);
  await server.unsafe(`create database ${scratch} template template0`);
  sql = postgres(scratchUrl, { max: 1, onnotice: () => {} });
  assert.equal(await loadData(scratchUrl, { only }), true);
});

after(async () => {
  await sql?.end();
  await server.unsafe(`drop database if exists ${scratch} with (force)`);
  await server.end();
});

test("every table has the rows of the data set", async () => {
  assert.deepEqual(
    { ...(await one("select count(*)::int as users, count(age_band)::int as demographics from users")) },
    { users: 2469, demographics: 801 },
  );
  const statuses = await sql`select status, count(*)::int as orders from orders group by 1 order by 1`;
  assert.deepEqual(
    statuses.map(({ status, orders }) => [status, orders]),
    [
      ["completed", 155_370],
      ["no_charge", 478],
    ],
  );
  const metrics = await sql`
    select metric, count(*)::int as readings, count(distinct sensor_id)::int as sensors,
      count(distinct (sensor_id, recorded_at)) = count(*) as unique
    from sensor_readings where value <> 'NaN' group by 1 order by 1`;
  assert.deepEqual(
    metrics.map((row) => [row.metric, row.readings, row.sensors, row.unique]),
    [
      ["dewp", 26_114, 3, true],
      ["humid", 26_114, 3, true],
      ["precip", 26_115, 3, true],
      ["pressure", 23_386, 3, true],
      ["temp", 26_114, 3, true],
      ["visib", 26_115, 3, true],
      ["wind_dir", 25_655, 3, true],
      ["wind_gust", 5_337, 3, true],
      ["wind_speed", 26_111, 3, true],
    ],
  );
});

test("new rows get the ids after those of the data", async () => {
  assert.equal((await one("select nextval('public.sensor_readings_id_seq')::int as id")).id, 211_062);
});

test("changeSource changes and inserts by seed, the triggers set updated_at, and the data still counts as loaded", async () => {
  const before = await one("select clock_timestamp()::text as now");
  const changed = await changeSource(scratchUrl, { orders: 40, users: 7, newOrders: 3, seed: 42 });
  assert.deepEqual(
    [changed.orders.length, changed.users.length, changed.newOrders],
    [40, 7, ["41481282916", "41481282917", "41481282918"]],
  );
  const touched = (table: string) =>
    one(`select coalesce(array_agg(id::text order by id), '{}') as ids, bool_and(updated_at <= clock_timestamp()) as past
      from ${table} where updated_at >= '${before.now}'`);
  assert.deepEqual({ ...(await touched("orders")) }, { ids: [...changed.orders, ...changed.newOrders], past: true });
  assert.deepEqual({ ...(await touched("users")) }, { ids: changed.users, past: true });
  const sums = await one(`select sum(total + discount)::text as shelf, count(*) filter (where status = 'returned')::int
    as returned from orders where id <= 41481282915`);
  assert.deepEqual({ ...sums }, { shelf: "5392232.87", returned: 40 });
  const again = await changeSource(scratchUrl, { orders: 40, users: 7, newOrders: 0, seed: 42 });
  assert.deepEqual([again.orders.length, again.users], [40, changed.users]);
  assert.equal(await loadData(scratchUrl, { only }), false);
});

test("changeReadings moves readings, and the data still counts as loaded, also where the seed hits its first or last reading", async () => {
  for (const [seed, id] of [
    [513, 1],
    [132, 211_061],
  ] as const) {
    const hit = await one(`select abs(hashtextextended('${id}', ${seed}) % 1000) between 20 and 24 as it`);
    assert.ok(hit.it, "the seed does not hit that reading: it shows nothing");
    await changeReadings(scratchUrl, seed);
    assert.equal(await loadData(scratchUrl, { only }), false);
  }
  const { n } = await one("select count(*)::int as n from sensor_readings where extract(minute from recorded_at) = 1");
  assert.ok(n > 1000, `${n} of the data set's readings were moved`);
});

test("a database off this machine is refused", async () => {
  const url = "postgres://shop:secret@db.example.com/shop";
  await assert.rejects(loadData(url), (error: Error) => {
    assert.match(error.message, /STACK_ADMIN_DATABASE_URL is at db\.example\.com: only the local stack's database/);
    assert.doesNotMatch(error.message, /secret/);
    return true;
  });
  await assert.rejects(changeSource(url), /only the local stack's database/);
});

test("a load that fails at its last row leaves the table empty, and the next one loads it", async () => {
  await sql`truncate sensor_readings`;
  // At the last row the server's words may come after the next statement was sent, and then they are in its log only.
  const refused =
    /^data: public\.sensor_readings: .*(violates check constraint "less"|Postgres refused the last rows).*; nothing of it was loaded/;
  await sql`alter table sensor_readings add constraint less check (id < 211061)`;
  await assert.rejects(loadData(scratchUrl, { only }), { message: refused });
  assert.equal((await one("select count(*)::int as n from sensor_readings")).n, 0);
  await sql`alter table sensor_readings drop constraint less`;
  assert.equal(await loadData(scratchUrl, { only }), true);
  assert.equal(await loadData(scratchUrl, { only: ["sensor_readings"] }), false);
});

test("a load that is killed leaves the table empty and no session behind, and the next one loads it", async () => {
  await sql`truncate orders, sensor_readings`;
  const code = `import { loadData } from "./load.ts"; await loadData(process.env.SCRATCH_URL)`;
  const env = { ...process.env, SCRATCH_URL: scratchUrl };
  const args = ["--input-type=module-typescript", "--eval", code];
  const loader = spawn(process.execPath, args, { cwd: import.meta.dirname, env, stdio: "ignore" });
  const copying = () =>
    one(`
    select count(*)::int as n from pg_stat_progress_copy where datname = current_database() and tuples_processed > 0`);
  while ((await copying()).n === 0) assert.equal(loader.exitCode, null, "it ended before it could be killed");
  loader.kill("SIGKILL");
  const sessions = () =>
    one(`
    select count(*)::int as n from pg_stat_activity
    where datname = current_database() and application_name = 'etl:data'`);
  await until("its session is gone", async () => (await sessions()).n === 0);
  assert.equal((await one("select count(*)::int as n from orders")).n, 0);
  assert.equal(await loadData(scratchUrl, { only }), true);
});

test("a foreign row makes it refuse, with the next command, and nothing is loaded", async () => {
  await sql`truncate orders, users`;
  await sql`insert into orders (id) values (1)`;
  await assert.rejects(
    loadData(scratchUrl, { only }),
    /public\.orders holds rows that are not this data set .*: nothing was loaded\. .* 'truncate public\.orders', then make data\./,
  );
  assert.equal((await one("select count(*)::int as n from users")).n, 0);
  await sql`truncate orders`;
  assert.equal(await loadData(scratchUrl, { only: ["orders"], maxRows: 1000 }), true);
  assert.equal(await loadData(scratchUrl, { only: ["orders"], maxRows: 1000 }), false);
  await assert.rejects(loadData(scratchUrl, { only: [...tables] }), /public\.orders holds rows/);
});
