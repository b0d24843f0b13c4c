// rewind, status and the two roles. Needs the local stack (make up).
import assert from "node:assert/strict";
import { after, before, test } from "node:test";
import postgres from "postgres";
import { scratchCopy } from "../lib/scratch.ts";
import { createShop, pipelines, type Shop, textColumns, until } from "../lib/shop.ts";

const rewind = "scripts/ops/rewind.ts";
const status = "scripts/ops/status.ts";

const scratch = scratchCopy();
let shop: Shop;
before(async () => {
  shop = await createShop({ folder: scratch.folder });
  for (const pipeline of pipelines) await shop.insertRows(1, 1234, pipeline);
});
after(async () => {
  await shop?.[Symbol.asyncDispose]();
  scratch[Symbol.dispose]();
});

const rows = async (query: string): Promise<postgres.Row[]> => [...(await shop.admin.unsafe(query))];
const watermarks = () => rows("select * from etl.watermarks order by pipeline");
const runs = () => rows("select * from etl.runs order by started_at");
/** The same of every pipeline, at the same time. */
const each = (work: (pipeline: (typeof pipelines)[number]) => Promise<unknown>) => Promise.all(pipelines.map(work));
const sync = () => each((pipeline) => shop.succeed(`scripts/${pipeline}.ts`));

type Status = Record<string, unknown>;
/** Of each pipeline, by its name. */
const statusOf = async (variables = {}): Promise<Record<string, Status>> => {
  const { stdout } = await shop.run(status, { JSON: "1", ...variables });
  return Object.fromEntries((JSON.parse(stdout) as Status[]).map((of) => [of.pipeline, of]));
};
/** The table: the cells of each pipeline's line, by its name, and all of it. */
const show = async (variables = {}): Promise<{ cells: Record<string, string[]>; stdout: string; code: number | null }> => {
  const { stdout, code } = await shop.run(status, variables);
  const [names = "", ...lines] = (stdout.split("\n\n")[0] ?? "").trim().split("\n");
  assert.match(names, /^PIPELINE +WATERMARK +AGE +LAST SUCCESS +EVERY +LAST RUN +ROWS +LOCK HELD BY +STATE$/);
  const cells = lines.map((line) => line.split(/ {2,}/));
  return { cells: Object.fromEntries(cells.map(([name = "", ...others]) => [name, others])), stdout, code };
};
const every = { orders: "1h", users: "1d" };

test("a pipeline that never ran: status says so, and rewind refuses", async () => {
  const [{ cells }, json] = [await show(), await statusOf()];
  for (const pipeline of pipelines) {
    assert.deepEqual(cells[pipeline], ["none", "-", "never", every[pipeline], "never", "-", "nobody", "new"]);
    const { watermark, last_success, last_run, rows: none, held_by, state, reasons } = json[pipeline] ?? {};
    assert.deepEqual([watermark, last_success, last_run, none, held_by], [null, null, null, null, null]);
    assert.deepEqual([state, reasons], ["new", ["it never ran"]]);
  }
  await each(async (pipeline) => {
    const { code, stderr } = await shop.run(rewind, { PIPELINE: pipeline, TO: "2017-01-01" });
    assert.match(
      stderr,
      new RegExp(`${pipeline} has no watermark: it has never run, and its first run reads everything\\. Next: make ${pipeline}`),
    );
    assert.equal(code, 2);
  });
});

test("status shows the last success: watermark, ages and rows", async () => {
  await sync();
  const [{ cells, code }, all] = [await show(), await statusOf()];
  assert.equal(code, 0);
  for (const pipeline of pipelines) {
    const [watermark, age, success, interval, run, ...others] = cells[pipeline] ?? [];
    assert.equal(watermark, await shop.watermark(pipeline));
    assert.match(`${age} | ${success} | ${run}`, /^\d+s \| \d+s ago \| succeeded \d+s ago$/);
    assert.deepEqual([interval, ...others], [every[pipeline], "1,234", "nobody", "ok"]);
    const json = all[pipeline] ?? {};
    assert.deepEqual([json.state, json.reasons], ["ok", []]);
    assert.deepEqual([json.watermark, json.last_run_state, json.last_error, json.rows], [watermark, "succeeded", null, 1234]);
    for (const name of ["watermark_age_seconds", "last_success_age_seconds", "last_run_age_seconds"]) {
      assert.ok((json[name] as number) >= 0 && (json[name] as number) < 60, `${name}: ${json[name]}`);
    }
    assert.match(String(json.last_success), /^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00$/);
  }
});

test("status shows the last failure with its error, and still the last success", async () => {
  await each(async (pipeline) => {
    const alter = `alter table ${pipeline} alter created_at`;
    await shop.admin.unsafe(`${alter} drop not null`);
    const { code } = await shop.run(`scripts/${pipeline}.ts`);
    await shop.admin.unsafe(`${alter} set not null`);
    assert.equal(code, 2);
  });
  const [{ cells, stdout, code }, all] = [await show(), await statusOf()];
  assert.equal(code, 1);
  for (const pipeline of pipelines) {
    const [watermark, , success, , run, count, , state] = cells[pipeline] ?? [];
    assert.equal(watermark, await shop.watermark(pipeline));
    assert.match(`${success} | ${run} | ${count} | ${state}`, /^\d+s ago \| failed \d+s ago \| 1,234 \| red$/);
    const error = `column public\\.${pipeline}\\.created_at: expected TIMESTAMP REQUIRED`;
    assert.match(stdout, new RegExp(`^${pipeline}: its last run failed: .*\\n +${error}`, "m"));
    assert.match(String(all[pipeline]?.last_error), new RegExp(error));
  }
  await sync();
});

/** What status says of the holder, the same of every pipeline. */
async function assertHeldBy(held: RegExp): Promise<void> {
  const [{ cells, stdout, code }, all] = [await show(), await statusOf()];
  assert.equal(code, 0);
  for (const pipeline of pipelines) {
    assert.equal(cells[pipeline]?.at(-1), "warn");
    const { source } = held;
    assert.match(stdout, new RegExp(`^${pipeline}: its watermark is held for \\d+s by ${source.slice(1)}`, "m"));
    assert.match(String(all[pipeline]?.held_by), held);
    assert.ok((all[pipeline]?.hold_seconds as number) > 0);
  }
}

test("status names who holds the watermark, and for how long", async () => {
  const holder = shop.connect("nightly import");
  await holder.unsafe("begin; create table public.imported ()");
  await assertHeldBy(/^pid \d+, application "nightly import", role postgres, state idle in transaction, open for /);
  await holder.unsafe(`prepare transaction '${shop.dataset}'`);
  try {
    await assertHeldBy(new RegExp(`^prepared transaction "${shop.dataset}" of role postgres, prepared `));
  } finally {
    await holder.unsafe(`rollback prepared '${shop.dataset}'`);
  }
  for (const { held_by, hold_seconds } of Object.values(await statusOf())) assert.deepEqual([held_by, hold_seconds], [null, 0]);
});

test("status says unknown, not nobody, where the role may not see who holds the watermark", async () => {
  const role = `${shop.dataset}_blind`;
  await shop.admin.unsafe(`create role ${role} login password 'secret'`);
  const url = new URL(shop.env.SOURCE_DATABASE_URL ?? "");
  try {
    const all = await statusOf({
      SOURCE_DATABASE_URL: Object.assign(url, { username: role, password: "secret" }).href,
    });
    for (const pipeline of pipelines) assert.match(String(all[pipeline]?.held_by), /^unknown: .*grant pg_monitor to/);
  } finally {
    await shop.admin.unsafe(`drop role ${role}`);
  }
});

test("status shows the metadata also while the source is down", async () => {
  const down = { SOURCE_DATABASE_URL: "postgres://etl_reader:x@127.0.0.1:1/shop" };
  const [{ cells, stdout, code }, all] = [await show(down), await statusOf(down)];
  assert.equal(code, 1);
  for (const pipeline of pipelines) {
    const [watermark, , , , run, , , state] = cells[pipeline] ?? [];
    assert.equal(watermark, await shop.watermark(pipeline));
    assert.match(`${run} | ${state}`, /^succeeded .* \| red$/);
    const says =
      "cannot tell which transaction holds its watermark: cannot connect to SOURCE_DATABASE_URL \\(host 127\\.0\\.0\\.1, port 1,";
    assert.match(stdout, new RegExp(`^${pipeline}: ${says}`, "m"));
    assert.match(String(all[pipeline]?.held_by), /^unknown: cannot connect to SOURCE_DATABASE_URL/);
  }
});

const refusals: [variables: Record<string, string>, says: RegExp][] = [
  ...pipelines.flatMap((PIPELINE): [Record<string, string>, RegExp][] => [
    [{ PIPELINE }, /TO is missing\. The end, exclusive; of rewind, the time to set the watermark back to\. Example: TO=/],
    [
      { PIPELINE, TO: "2999-01-01" },
      /TO=2999-01-01T00:00:00\.000000\+00 is after the watermark \d{4}-\S+: a rewind goes back only, since the rows between them would never be read\./,
    ],
  ]),
  [{ TO: "2017-01-01" }, /PIPELINE is missing\. The pipeline's name\. Example: PIPELINE=orders/],
  [{ PIPELINE: "order", TO: "2017-01-01" }, /PIPELINE must be one of events, orders, users\./],
];
for (const [variables, says] of refusals) {
  test(`rewind ${Object.entries(variables).map((pair) => pair.join("="))} is refused, and changes nothing`, async () => {
    const before = [await watermarks(), await runs()];
    const { code, stderr } = await shop.run(rewind, variables);
    assert.match(stderr, says);
    assert.equal(code, 2);
    assert.deepEqual([await watermarks(), await runs()], before);
  });
}

test("rewind is refused while a run is going, and names it", async () => {
  await each(async (pipeline) => {
    const lock = shop.connect(`etl:${pipeline} run=somebody`);
    await lock`select pg_advisory_lock(hashtextextended(${`etl:${pipeline}`}, 0))`;
    const { code, stderr } = await shop.run(rewind, { PIPELINE: pipeline, TO: "2017-01-01" });
    await lock.end();
    const says = `a run of ${pipeline} is going \\(etl:${pipeline} run=somebody,.*\\)\\. Once it has ended: make rewind`;
    assert.match(stderr, new RegExp(`${says} PIPELINE=${pipeline} TO=2017-01-01`));
    assert.equal(code, 1);
  });
});

test("rewind sets the watermark back, says what is read again, keeps it in etl.runs, and the next run reads it", async () => {
  const to = "2017-06-01T00:00:00.000002";
  await each(async (pipeline) => {
    const text = textColumns[pipeline];
    const before = (await shop.watermark(pipeline)) ?? "";
    await shop.admin.unsafe(`alter table ${pipeline} disable trigger user;
      update ${pipeline} set updated_at = '2017-06-01 00:00:00.000001Z' where id <= 7;
      update ${pipeline} set updated_at = '2017-06-01 00:00:00.000002Z', ${text} = 'read again' where id in (8, 9);
      alter table ${pipeline} enable trigger user`);
    const history = () => rows(`select * from etl.runs where pipeline = '${pipeline}' order by started_at`);
    const state = [await shop.watermark(pipeline), await history()];
    const dry = await shop.succeed(rewind, { PIPELINE: pipeline, TO: to, DRY_RUN: "1" });
    assert.match(dry.stderr, /step=would-rewind from=\S+ to=2017-06-01T00:00:00\.000002\+00 rows_to_read_again=1227$/);
    assert.deepEqual([await shop.watermark(pipeline), await history()], state);

    const { stderr } = await shop.succeed(rewind, { PIPELINE: pipeline, TO: to });
    const [second, micros = ""] = before.replace("+00", "").split(".");
    const from = `${second}.${micros.padEnd(6, "0")}+00`; // Postgres's text leaves trailing zeros out
    assert.ok(stderr.includes(`step=rewind from=${from} to=${to}+00 rows_to_read_again=1227`), stderr);
    assert.ok(stderr.includes(`step=done watermark=${to}+00 next="make ${pipeline}"`), stderr);
    assert.equal(await shop.watermark(pipeline), `${to}+00`);
    const [kept] = await rows(`select state, rows::text, host <> '' and pid > 0 and finished_at is not null as whole,
      replace(chunk_from::text, ' ', 'T') as from, replace(chunk_to::text, ' ', 'T') as to,
      run_id = (select run_id from etl.watermarks where pipeline = '${pipeline}') as same
      from etl.runs where pipeline = '${pipeline}' order by started_at desc limit 1`);
    assert.deepEqual({ ...kept }, { state: "rewound", rows: "1227", whole: true, from: `${to}+00`, to: before, same: true });
  });
  const { cells } = await show();
  for (const pipeline of pipelines) assert.match(cells[pipeline]?.[4] ?? "", /^succeeded/);

  await each(async (pipeline) => {
    const run = await shop.succeed(`scripts/${pipeline}.ts`);
    assert.match(run.stderr, /step=done rows=1227 /);
    const older = await shop.query(`SELECT id FROM ${pipeline} WHERE ${textColumns[pipeline]} = 'read again'`);
    assert.deepEqual(older, [], "an older version never replaces a newer one");
  });
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
  test(promise, async () => {
    const before = await each((pipeline) => shop.sourceRows(pipeline));
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
      assert.deepEqual({ ...role }, { powers: false, member: variable.startsWith("SOURCE") ? "{pg_read_all_stats}" : "{}" });
    } finally {
      await session.end();
    }
    assert.deepEqual(await each((pipeline) => shop.sourceRows(pipeline)), before);
  });
}

test("etl_reader's sessions are read only to begin with", async () => {
  const session = as("SOURCE_DATABASE_URL");
  await assert.rejects(session`update orders set status = 'x'`, /read-only transaction|permission denied/);
  assert.deepEqual([...(await session`show default_transaction_read_only`)], [{ default_transaction_read_only: "on" }]);
  await session.end();
});

test("a run's sessions, its COPY and its MERGE name the run", async () => {
  await each(async (pipeline) => {
    const ofIt = `pipeline = '${pipeline}'`;
    const [merged] = await rows(`select run_id from etl.runs where ${ofIt} and state = 'succeeded' and rows > 0 limit 1`);
    const { BIGQUERY_ENDPOINT: endpoint, BIGQUERY_PROJECT: project } = shop.env;
    const job = `etl_${pipeline}_staging_${merged?.run_id}_1_1_merge`;
    const { configuration } = await fetch(`${endpoint}/bigquery/v2/projects/${project}/jobs/${job}`).then(
      // biome-ignore lint/suspicious/noExplicitAny: the API's own JSON
      (answer) => answer.json() as Promise<any>,
    );
    assert.match(configuration.query.query, new RegExp(`^/\\* etl:${pipeline} run=${merged?.run_id} \\*/\nMERGE `));
    assert.deepEqual(configuration.labels, { etl_pipeline: pipeline, etl_run: merged?.run_id });
    // What BigQuery allows in the value of a label; the local server takes anything.
    assert.match(configuration.labels.etl_run, /^[a-z0-9_-]{1,63}$/);

    using _ = scratch.edit(`sql/${pipeline}.sql`, (text) =>
      text.replace(";", " and case when current_query() like '/* etl:%' then pg_sleep(60) is not null else true end;"),
    );
    await shop.insertRows(2000, 2001, pipeline);
    const run = shop.start(`scripts/${pipeline}.ts`);
    const copying = await until("the run copies", async () => {
      const found = await rows(`select usename, application_name, query from pg_stat_activity
        where datname = current_database() and application_name like 'etl:${pipeline} run=%'`);
      return found.some(({ query }) => query.startsWith("/* etl:")) ? found : undefined;
    });
    run.child.kill("SIGTERM");
    await run.ended;
    const [stopped] = await rows(`select run_id, state from etl.runs where ${ofIt} order by started_at desc limit 1`);
    assert.equal(stopped?.state, "failed");
    const origin = `etl:${pipeline} run=${stopped?.run_id}`;
    assert.deepEqual(copying.map(({ usename }) => usename).sort(), ["etl_metadata", "etl_reader", "etl_reader"]);
    assert.deepEqual([...new Set(copying.map(({ application_name }) => application_name))], [origin]);
    assert.ok(
      copying.some(({ query }) => query.startsWith(`/* ${origin} */ copy (`)),
      JSON.stringify(copying),
    );
  });
});
