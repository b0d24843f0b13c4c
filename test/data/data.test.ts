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

test("every table has the rows of the data set, to the byte", async () => {
  const expected = {
    users: { rows: 2_469, hash: "-28858669254595921144" },
    orders: { rows: 155_848, hash: "4194941931643155968308" },
    events: { rows: 1_471_409, hash: "7345104455511097627581" },
    sensor_readings: { rows: 211_061, hash: "-2776738028439953642982" },
  };
  for (const table of only)
    assert.deepEqual(
      { ...(await one(`select count(*)::int as rows, sum(hashtextextended(t::text, 0))::text as hash from ${table} t`)) },
      expected[table],
      table,
    );
});

test("after changes as the demo makes them the data still counts as loaded; new rows get the ids after it", async () => {
  const { now } = await one("select clock_timestamp()::text as now");
  await changeSource(scratchUrl, { orders: 40, users: 7, newOrders: 3 });
  await changeReadings(scratchUrl);
  const changed = await one(`select
    (select count(*)::int from orders where updated_at >= '${now}') as orders,
    (select count(*)::int from orders where id > 41481282915) as new,
    (select sum(total + discount)::text from orders where id <= 41481282915) as shelf,
    (select count(*)::int from users where updated_at >= '${now}') as users,
    (select count(*) > 1000 from sensor_readings where extract(minute from recorded_at) = 1) as moved,
    (select min(id)::int from sensor_readings where recorded_at > '2020-01-01') > 211061 as after`);
  assert.deepEqual({ ...changed }, { orders: 43, new: 3, shelf: "5392232.87", users: 7, moved: true, after: true });
  assert.equal(await loadData(scratchUrl, { only }), false);
});

test("a database off this machine is refused", async () => {
  const url = "postgres://shop:secret@db.example.com/shop";
  const message = "data: STACK_ADMIN_DATABASE_URL is at db.example.com: only the local stack's database may be written to.";
  for (const change of [loadData(url), changeReadings(url)])
    await assert.rejects(change, (error: Error) => error.message.startsWith(message) && !error.message.includes("secret"));
});

test("a load that is killed leaves the table empty and no session behind, and the next one loads it", async () => {
  await sql`truncate users, sensor_readings`;
  const code = `import { loadData } from "./load.ts"; await loadData(${JSON.stringify(scratchUrl)}, { only: ["sensor_readings"] })`;
  const args = ["--input-type=module-typescript", "--eval", code];
  const loader = spawn(process.execPath, args, { cwd: import.meta.dirname, stdio: "ignore" });
  const copying = "select from pg_stat_progress_copy where datname = current_database() and tuples_processed > 0";
  while (!(await sql.unsafe(copying)).count) assert.equal(loader.exitCode, null, "it ended before it could be killed");
  loader.kill("SIGKILL");
  const sessions = "select from pg_stat_activity where datname = current_database() and application_name = 'etl:data'";
  await until("its session is gone", async () => !(await sql.unsafe(sessions)).count);
  assert.equal((await sql`select from sensor_readings`).count, 0);
  assert.equal(await loadData(scratchUrl, { only: ["sensor_readings"], maxRows: 1000 }), true);
  assert.equal((await sql`select from sensor_readings`).count, 1000);
});

test("a foreign row makes it refuse, with the next command, and nothing is loaded", async () => {
  await sql`truncate orders`;
  await sql`insert into orders (id) values (1)`;
  await assert.rejects(
    loadData(scratchUrl, { only: ["users", "orders"] }),
    /public\.orders holds rows that are not this data set .*: nothing was loaded\. .* 'truncate public\.orders', then make data\./,
  );
  assert.equal((await sql`select from users`).count, 0);
});
