// rewind, status and the two roles. Needs the local stack (make up).
import assert from "node:assert/strict";
import { test } from "node:test";
import postgres from "postgres";
import { scratchCopy } from "./lib/scratch.ts";
import { createShop, until } from "./lib/shop.ts";

const rewind = "scripts/ops/rewind.ts";
const status = "scripts/ops/status.ts";
const orders = "scripts/orders.ts";

using scratch = scratchCopy();
await using shop = await createShop({ folder: scratch.folder });

const rows = async (query: string): Promise<postgres.Row[]> => [...(await shop.admin.unsafe(query))];
const watermarks = () => rows("select * from etl.watermarks");
const runs = () => rows("select * from etl.runs order by started_at");

interface Status {
  pipeline: string;
  [field: string]: unknown;
}
const statusOf = async (variables = {}): Promise<Status> => {
  const { stdout } = await shop.succeed(status, { JSON: "1", ...variables });
  const found = (JSON.parse(stdout) as Status[]).find(({ pipeline }) => pipeline === "orders");
  return found ?? assert.fail(stdout);
};
/** The cells of the line of orders in the table. */
const cells = async (variables = {}): Promise<string[]> => {
  const { stdout } = await shop.succeed(status, variables);
  assert.match(stdout, /^PIPELINE +WATERMARK +AGE +LAST SUCCESS +LAST RUN +ROWS +HELD BY$/m);
  return /^orders .*$/m.exec(stdout)?.[0].split(/ {2,}/) ?? assert.fail(stdout);
};

await test("a pipeline that never ran: status says so, and rewind refuses", async () => {
  assert.deepEqual(await cells(), ["orders", "none", "-", "never", "never", "-", "nobody"]);
  const { watermark, last_success, last_run, rows: none, held_by } = await statusOf();
  assert.deepEqual([watermark, last_success, last_run, none, held_by], [null, null, null, null, null]);
  const { code, stderr } = await shop.run(rewind, { PIPELINE: "orders", TO: "2017-01-01" });
  assert.match(
    stderr,
    /orders has no watermark: it has never run, and its first run reads everything\. Next: make orders/,
  );
  assert.equal(code, 2);
});

await test("status shows the last success: watermark, ages and rows", async () => {
  await shop.insertRows(1, 1234);
  await shop.succeed(orders);
  const [, watermark, age, success, run, count, holder] = await cells();
  assert.equal(watermark, await shop.watermark());
  assert.match(`${age} | ${success} | ${run}`, /^\d+s \| \d+s ago \| succeeded \d+s ago$/);
  assert.deepEqual([count, holder], ["1,234", "nobody"]);
  const json = await statusOf();
  assert.deepEqual(
    [json.watermark, json.last_run_state, json.last_error, json.rows],
    [watermark, "succeeded", null, 1234],
  );
  for (const name of ["watermark_age_seconds", "last_success_age_seconds", "last_run_age_seconds"]) {
    assert.ok((json[name] as number) >= 0 && (json[name] as number) < 60, `${name}: ${json[name]}`);
  }
  assert.match(String(json.last_success), /^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00$/);
});

await test("status shows the last failure with its error, and still the last success", async () => {
  await shop.admin.unsafe("alter table orders alter store_id type text");
  assert.equal((await shop.run(orders)).code, 2);
  await shop.admin.unsafe("alter table orders alter store_id type int using store_id::int");
  const [, watermark, , success, run, count] = await cells();
  assert.equal(watermark, await shop.watermark());
  assert.match(`${success} | ${run} | ${count}`, /^\d+s ago \| failed \d+s ago \| 1,234$/);
  assert.match(
    (await shop.succeed(status)).stdout,
    /^orders failed: .*\n +column public\.orders\.store_id: expected INTEGER/m,
  );
  assert.match(String((await statusOf()).last_error), /column public\.orders\.store_id: expected INTEGER/);
  await shop.succeed(orders);
});

await test("status names who holds the watermark, and for how long", async () => {
  const holder = shop.connect("nightly import");
  await holder.begin(async (sql) => {
    await sql`select 1`;
    const held = /^pid \d+, application "nightly import", role postgres, state idle in transaction, open for /;
    assert.match((await cells()).at(-1) ?? "", held);
    const { held_by, hold_seconds } = await statusOf();
    assert.match(String(held_by), held);
    assert.ok((hold_seconds as number) > 0);
  });
  assert.equal((await statusOf()).held_by, null);
});

await test("status shows the metadata also while the source is down", async () => {
  const down = { SOURCE_DATABASE_URL: "postgres://etl_reader:x@127.0.0.1:1/shop" };
  const [, watermark, , , run, , holder] = await cells(down);
  assert.equal(watermark, await shop.watermark());
  assert.match(String(run), /^succeeded/);
  assert.match(String(holder), /^unknown: cannot connect to SOURCE_DATABASE_URL \(host 127\.0\.0\.1, port 1,/);
  assert.match(String((await statusOf(down)).held_by), /^unknown: cannot connect to SOURCE_DATABASE_URL/);
});

const refusals: [variables: Record<string, string>, says: RegExp][] = [
  [
    { PIPELINE: "orders" },
    /TO is missing: the time to set the watermark back to\. Example: make rewind PIPELINE=orders TO=2017-06-01/,
  ],
  [{ TO: "2017-01-01" }, /PIPELINE is missing: the pipeline's name\. Example: PIPELINE=orders/],
  [{ PIPELINE: "order", TO: "2017-01-01" }, /PIPELINE=order: there is no such pipeline; there are: .*\borders\b/],
  [
    { PIPELINE: "orders", TO: "2999-01-01" },
    /TO=2999-01-01T00:00:00\.000000\+00 is after the watermark \d{4}-\S+: a rewind goes back only, since the rows between them would never be read\./,
  ],
];
for (const [variables, says] of refusals) {
  await test(`rewind ${Object.entries(variables).map((pair) => pair.join("="))} is refused, and changes nothing`, async () => {
    const before = [await watermarks(), await runs()];
    const { code, stderr } = await shop.run(rewind, variables);
    assert.match(stderr, says);
    assert.equal(code, 2);
    assert.deepEqual([await watermarks(), await runs()], before);
  });
}

await test("rewind is refused while a run is going, and names it", async () => {
  const lock = shop.connect("etl:orders run=somebody");
  await lock`select pg_advisory_lock(hashtextextended('etl:orders', 0))`;
  const { code, stderr } = await shop.run(rewind, { PIPELINE: "orders", TO: "2017-01-01" });
  await lock.end();
  assert.match(
    stderr,
    /a run of orders is going \(etl:orders run=somebody,.*\): wait for its end, then: make rewind PIPELINE=orders TO=2017-01-01/,
  );
  assert.equal(code, 1);
});

await test("rewind sets the watermark back, says what is read again, keeps it in etl.runs, and the next run reads it", async () => {
  const before = (await shop.watermark()) ?? "";
  await shop.admin.unsafe(`alter table orders disable trigger user;
    update orders set updated_at = '2017-06-01 00:00:00.000001Z' where id <= 7;
    update orders set updated_at = '2017-06-01 00:00:00.000002Z', status = 'read again' where id in (8, 9);
    alter table orders enable trigger user`);
  const to = "2017-06-01T00:00:00.000002";
  const state = [await watermarks(), await runs()];
  const dry = await shop.succeed(rewind, { PIPELINE: "orders", TO: to, DRY_RUN: "1" });
  assert.match(dry.stderr, /step=would-rewind from=\S+ to=2017-06-01T00:00:00\.000002\+00 rows_to_read_again=1227$/);
  assert.deepEqual([await watermarks(), await runs()], state);

  const { stderr } = await shop.succeed(rewind, { PIPELINE: "orders", TO: to });
  assert.ok(stderr.includes(`step=rewind from=${before} to=${to}+00 rows_to_read_again=1227`), stderr);
  assert.match(stderr, /step=done watermark=2017-06-01T00:00:00\.000002\+00 next="make orders"/);
  assert.equal(await shop.watermark(), `${to}+00`);
  const [history] =
    await rows(`select state, pipeline, rows::text, host <> '' and pid > 0 and finished_at is not null as whole,
    replace(chunk_from::text, ' ', 'T') as from, replace(chunk_to::text, ' ', 'T') as to,
    run_id = (select run_id from etl.watermarks) as same from etl.runs order by started_at desc limit 1`);
  assert.deepEqual(
    { ...history },
    { state: "rewound", pipeline: "orders", rows: "1227", whole: true, from: `${to}+00`, to: before, same: true },
  );
  assert.match((await cells())[4] ?? "", /^succeeded/);

  const run = await shop.succeed(orders);
  assert.match(run.stderr, /step=done rows=1227 /);
  assert.ok(((await shop.watermark()) ?? "") > before);
  const destination = await shop.destinationRows();
  assert.deepEqual(
    destination.filter(({ status }) => status === "read again").map(({ id }) => id).length,
    0,
    "an older version never replaces a newer one",
  );
});

/** A session of one of the two roles, as its URL gives it. */
const as = (variable: string): postgres.Sql =>
  postgres(shop.env[variable] ?? "", { max: 1, onnotice: () => {}, fetch_types: false });

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
      "select pg_terminate_backend(pid) from pg_stat_activity where usename = 'postgres'",
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
  await test(promise, async () => {
    const before = await shop.sourceRows();
    const session = as(variable);
    try {
      await session.unsafe("set default_transaction_read_only = off; set lock_timeout = '2s'");
      for (const statement of statements) {
        await assert.rejects(session.unsafe(statement), /permission denied|must be owner/, statement);
      }
      const [role] = await session`
        select rolsuper or rolcreatedb or rolcreaterole or rolreplication or rolbypassrls as powers,
          array(select b.rolname from pg_auth_members m join pg_roles b on b.oid = m.roleid where m.member = r.oid)::text as member
        from pg_roles r where rolname = current_user`;
      assert.deepEqual(
        { ...role },
        { powers: false, member: variable.startsWith("SOURCE") ? "{pg_read_all_stats}" : "{}" },
      );
    } finally {
      await session.end();
    }
    assert.deepEqual(await shop.sourceRows(), before);
  });
}

await test("etl_reader's sessions are read only to begin with", async () => {
  const session = as("SOURCE_DATABASE_URL");
  await assert.rejects(session`update orders set status = 'x'`, /read-only transaction|permission denied/);
  assert.deepEqual([...(await session`show default_transaction_read_only`)], [{ default_transaction_read_only: "on" }]);
  await session.end();
});

await test("a run's sessions, its COPY and its MERGE name the run", async () => {
  scratch.edit("sql/orders.sql", (text) =>
    text.replace(";", " and case when current_query() like '/* etl:%' then pg_sleep(60) is not null else true end;"),
  );
  await shop.insertRows(2000, 2001);
  const run = shop.start(orders);
  const copying = await until("the run copies", async () => {
    const found = await rows(`select usename, application_name, query from pg_stat_activity
      where datname = current_database() and application_name like 'etl:orders run=%'`);
    return found.some(({ query }) => query.startsWith("/* etl:")) ? found : undefined;
  });
  run.child.kill("SIGTERM");
  await run.ended;
  const [stopped] = await rows("select run_id, state from etl.runs order by started_at desc limit 1");
  assert.equal(stopped?.state, "failed");
  const origin = `etl:orders run=${stopped?.run_id}`;
  assert.deepEqual(copying.map(({ usename }) => usename).sort(), ["etl_metadata", "etl_reader", "etl_reader"]);
  assert.deepEqual([...new Set(copying.map(({ application_name }) => application_name))], [origin]);
  assert.ok(
    copying.some(({ query }) => query.startsWith(`/* ${origin} */ copy (`)),
    JSON.stringify(copying),
  );

  const [merged] = await rows("select run_id from etl.runs where state = 'succeeded' and rows > 0 limit 1");
  const { BIGQUERY_ENDPOINT: endpoint, BIGQUERY_PROJECT: project } = shop.env;
  const job = `etl_orders_staging_${merged?.run_id}_1_1_merge`;
  const { configuration } = await fetch(`${endpoint}/bigquery/v2/projects/${project}/jobs/${job}`).then(
    // biome-ignore lint/suspicious/noExplicitAny: the API's own JSON
    (answer) => answer.json() as Promise<any>,
  );
  assert.match(configuration.query.query, new RegExp(`^/\\* etl:orders run=${merged?.run_id} \\*/\nMERGE `));
  assert.deepEqual(configuration.labels, { etl_pipeline: "orders", etl_run: merged?.run_id });
  // What BigQuery allows in the value of a label; the local server takes anything.
  assert.match(configuration.labels.etl_run, /^[a-z0-9_-]{1,63}$/);
});
