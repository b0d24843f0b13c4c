/** The safe upper bound and the half-open window, on the local stack's Postgres. Clusters of their own: ops/clusters.test.ts. */
import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { connect, type Socket } from "node:net";
import { join } from "node:path";
import type { Duplex } from "node:stream";
import { after, before, test } from "node:test";
import postgres, { type Sql } from "postgres";
import { copyJsonLines } from "../../shared/copy.ts";
import { createShop, type Result, type Shop, stepsOfPipeline, until } from "../lib/shop.ts";
import { type Env, root } from "../stack/env.ts";

/** A session that ends with its test, whatever it is doing: postgres.js waits for a COPY or a stream to end. */
function open(url: string, application: string, settings: Record<string, string> = {}): Sql & AsyncDisposable {
  const { hostname, port } = new URL(url);
  let socket: Socket | undefined;
  const own = {
    socket: () => {
      socket = connect(Number(port), hostname);
      return socket;
    },
  };
  const connection = { application_name: application, DateStyle: "ISO", ...settings };
  const sql = postgres(url, { max: 1, fetch_types: false, onnotice: () => {}, connection, ...own });
  const end = async (): Promise<void> => {
    socket?.destroy();
    await sql.end({ timeout: 0 });
  };
  return Object.assign(sql, { [Symbol.asyncDispose]: end });
}

/** A time as the runs write it, with six decimals. */
const padded = (time = ""): string => time.replace(/(?:\.(\d+))?\+00$/, (_, micros = "") => `.${micros.padEnd(6, "0")}+00`);

/** Begins a transaction. Returns its now(), which is its xact_start, and its pid. */
async function begin(sql: Sql): Promise<{ start: string; pid: number }> {
  await sql.unsafe("begin");
  const [row] = await sql`
    select replace((now() at time zone 'utc')::text, ' ', 'T') || '+00' as start, pg_backend_pid() as pid`;
  return row as unknown as { start: string; pid: number };
}

/** The log's lines with this step, which are objects here. */
// biome-ignore lint/suspicious/noExplicitAny: each step has fields of its own
const lines = ({ stderr }: Result, step: string): any[] =>
  stderr
    .split("\n")
    .map((line) => JSON.parse(line))
    .filter((line) => line.step === step);
const errorOf = (result: Result): string => lines(result, "error")[0]?.error ?? assert.fail(result.stderr);
const holder = (result: Result): string | undefined => lines(result, "held")[0]?.by;
const chunks = (result: Result): unknown[] => lines(result, "chunk").map(({ from, to, rows }) => [from, to, rows]);

stepsOfPipeline((pipeline) => {
  /** The tests share a shop. Each compares with what had arrived before it, so none rests on the one before it. */
  let shop: Shop;
  let last = 5;
  const script = `scripts/${pipeline}.ts`;
  before(async () => {
    shop = await createShop({ pipeline, pushgateway: true });
    shop.env.LOG_FORMAT = "json";
    await shop.insertRows(1, last);
    // Whatever the database writes times as, and in whatever zone: a run pins its own. (This session is older.)
    for (const setting of ["timezone = 'Asia/Kathmandu'", "datestyle = 'SQL, DMY'", "intervalstyle = 'sql_standard'"])
      await shop.admin.unsafe(`alter database ${shop.dataset} set ${setting}`);
    await shop.succeed(script);
  });
  after(() => shop?.[Symbol.asyncDispose]());

  const adminUrl = (): string => shop.env.STACK_ADMIN_DATABASE_URL ?? "";
  const commitRow = async (): Promise<void> => {
    last += 1;
    await shop.insertRows(last, last); // the trigger dates it
  };
  /** What an application may do whose updated_at is now(): dates a row at the start of its transaction. */
  const writeWithNow = async (sql: Sql, id: number, text: string): Promise<void> => {
    await sql.unsafe("set local session_replication_role = replica"); // without the trigger
    await sql`update ${sql(shop.table)} set ${sql(shop.text)} = ${text}, updated_at = now() where id = ${id}`;
  };
  /** Inserts rows dated exactly so, past the trigger: [id, timestamptz, microseconds to add]. */
  const put = async (rows: [number, string, number?][]): Promise<void> => {
    await shop.admin.begin(async (sql) => {
      await sql`set local session_replication_role = replica`;
      for (const [id, at, microseconds = 0] of rows) {
        await sql`
          insert into ${sql(shop.table)} (id, updated_at)
          values (${id}, ${at}::text::timestamptz + ${microseconds}::int * interval '1 microsecond')
          on conflict (id) do update set updated_at = excluded.updated_at`;
      }
    });
  };
  /** As before the first run: no rows on either side, and no watermark. */
  const clear = async (): Promise<void> => {
    await shop.admin.unsafe(`truncate ${shop.table}; delete from etl.watermarks`);
    await shop.query(`TRUNCATE TABLE ${pipeline}`);
  };
  const assertSynced = async (): Promise<void> => assert.deepEqual(await shop.destinationRows(), await shop.sourceRows());
  const syncedIds = async (): Promise<number[]> => (await shop.query(`SELECT id FROM ${pipeline} ORDER BY id`)).map(({ id }) => Number(id));
  /** A role for one test: roles belong to the cluster, and other tests use those of sql/roles.sql at the same time. */
  const createRole = async (suffix: string, grants: string): Promise<{ name: string; url: string } & AsyncDisposable> => {
    const name = `${shop.dataset}_${suffix}`;
    await shop.admin.unsafe(`create role ${name} login password 'secret'; ${grants.replaceAll("ROLE", name)}`);
    const url = Object.assign(new URL(adminUrl()), { username: name, password: "secret" }).href;
    const drop = (): Promise<unknown> => shop.admin.unsafe(`drop owned by ${name}; drop role ${name}`);
    return { name, url, [Symbol.asyncDispose]: async () => void (await drop()) };
  };

  test("an open transaction that writes before or after a run holds the watermark at its start, and nothing is skipped", async () => {
    await using checkout = open(adminUrl(), "check out");
    const arrived = await shop.destinationRows();
    const { start, pid } = await begin(checkout);
    await writeWithNow(checkout, 1, "before");
    await commitRow();

    const held = await shop.succeed(script);
    const who = new RegExp(`^pid ${pid}, application "check out", role postgres, state idle in transaction, open for [\\d:]+$`);
    assert.match(holder(held) ?? "", who);
    assert.ok(((await shop.metrics()).etl_watermark_hold_seconds ?? 0) > 0);
    const again = await shop.succeed(script);
    assert.match(holder(again) ?? "", who);
    assert.deepEqual(chunks(again), []);
    // One by hand goes no further: the MERGE would then refuse the transaction's older version of a row for ever.
    assert.match(holder(await shop.succeed(script, { FROM: "2017-01-01", TO: "9999-01-01" })) ?? "", who);
    assert.equal(await shop.watermark(), start);
    assert.deepEqual(await shop.destinationRows(), arrived);

    await writeWithNow(checkout, 2, "after");
    await checkout.unsafe("commit");
    assert.equal(holder(await shop.succeed(script)), undefined);
    assert.equal((await shop.metrics()).etl_watermark_hold_seconds, 0);
    await assertSynced();
    assert.deepEqual(
      (await shop.destinationRows()).slice(0, 2).map((row) => row[shop.text]),
      ["before", "after"],
    );
  });

  test("the bound's clock is fixed before pg_stat_activity is scanned", async () => {
    // In a transaction now() stands still, while clock_timestamp(), read after the scan, would be later.
    await using reader = open(shop.env.SOURCE_DATABASE_URL ?? "", "test", { "etl.lag_seconds": "0" });
    const { start } = await begin(reader);
    const [row] = await reader.unsafe(readFileSync(join(root, "sql/safe_bound.sql"), "utf8"));
    assert.equal(row?.bound, padded(start));
  });

  test("WATERMARK_LAG_SECONDS keeps the window back from the clock", async () => {
    await commitRow();
    const waits = await shop.succeed(script, { WATERMARK_LAG_SECONDS: "3600" });
    assert.deepEqual([chunks(waits), holder(waits)], [[], undefined]); // the next test's first run takes it
  });

  test("a prepared transaction holds the watermark where it is, since its start is not known", async () => {
    const gid = shop.dataset;
    await using checkout = open(adminUrl(), "check out");
    const { start } = await begin(checkout);
    await writeWithNow(checkout, 1, "prepared");
    await shop.succeed(script);
    await checkout.unsafe(`prepare transaction '${gid}'`);
    try {
      await commitRow();
      const arrived = await shop.destinationRows();
      const held = await shop.succeed(script);
      assert.equal(await shop.watermark(), start);
      assert.match(holder(held) ?? "", new RegExp(`^prepared transaction "${gid}" of role postgres, prepared [\\d:]+ ago$`));
      await shop.refused(script, 1, /may not be read yet: .* -infinity \(prepared/, { FROM: "2017-01-01", TO: "9999-01-01" });
      assert.deepEqual(await shop.destinationRows(), arrived);
    } finally {
      await shop.admin.unsafe(`commit prepared '${gid}'`);
    }
    await shop.succeed(script);
    await assertSynced();
    assert.equal((await shop.destinationRows())[0]?.[shop.text], "prepared");
  });

  test("transactions of another database, walsenders and the reading role's own do not hold the watermark", async () => {
    const other = `${shop.dataset}_other`;
    await shop.admin.unsafe(`create database ${other}`);
    const url = Object.assign(new URL(adminUrl()), { pathname: `/${other}` }).href;
    await using cleanup = new AsyncDisposableStack();
    cleanup.defer(async () => void (await shop.admin.unsafe(`drop database ${other} with (force)`)));
    const writer = cleanup.use(open(url, "writer"));
    await begin(cleanup.use(open(url, "report")));
    await begin(writer);
    await writer.unsafe(`create table t (); prepare transaction '${other}'`);
    cleanup.defer(async () => void (await writer.unsafe(`rollback prepared '${other}'`)));

    // Postgres never shows a walsender's xact_start; it is left out by its backend_type all the same.
    await cleanup
      .use(open(adminUrl(), "export", { replication: "database" }))
      .unsafe("begin read only")
      .simple();
    const streaming = cleanup.use(open(adminUrl(), "stream", { replication: "database" }));
    const [system] = await streaming.unsafe("IDENTIFY_SYSTEM").simple();
    const replication = streaming.unsafe(`START_REPLICATION PHYSICAL ${system?.xlogpos}`);
    const stream = (await replication.writable()) as Duplex; // postgres.js's types leave out that it can be read
    // It ends by being cut off; and it is read, for a walsender that waits for its client holds up every DROP DATABASE.
    stream.on("error", () => {}).resume();

    const reader = cleanup.use(await createRole("reader", `grant select on ${shop.table} to ROLE; grant pg_read_all_stats to ROLE`));
    await begin(cleanup.use(open(reader.url, "dump")));
    const session = { application: "copy", timeoutSeconds: 60 };
    const rows = cleanup.use(copyJsonLines(reader.url, "select repeat('x', 1000) from generate_series(1, 1000000)", session));
    await rows.lines[Symbol.asyncIterator]().next(); // and nobody reads on, so it stays in mid-COPY
    await until("all of them at work", async () => {
      const { count } = await shop.admin`
        select from pg_stat_activity where datname = current_database() and (application_name, backend_type, state) in (
          ('export', 'walsender', 'idle in transaction'), ('stream', 'walsender', 'active'),
          ('dump', 'client backend', 'idle in transaction'), ('copy', 'client backend', 'active'))`;
      return count === 4;
    });
    const [now] = await shop.admin`select replace((now() at time zone 'utc')::text, ' ', 'T') || '+00' as at`;
    const result = await shop.succeed(script, { SOURCE_DATABASE_URL: reader.url });
    assert.equal(holder(result), undefined);
    assert.ok((lines(result, "window")[0]?.to ?? "") > now?.at, `${result.stderr}\nnot past ${now?.at}`);
  });

  test("a role that may write, be it single columns, is waited for, also where the pipeline runs as that role", async () => {
    await using app = await createRole(
      "app",
      `grant pg_read_all_stats to ROLE; grant select, update (${shop.text}) on ${shop.table} to ROLE`,
    );
    await using checkout = open(app.url, "check out");
    const { start } = await begin(checkout);
    await checkout`update ${checkout(shop.table)} set ${checkout(shop.text)} = 'own role' where id = 1`;
    const held = await shop.succeed(script, { SOURCE_DATABASE_URL: app.url });
    assert.match(holder(held) ?? "", new RegExp(`application "check out", role ${app.name},`));
    assert.equal(await shop.watermark(), start);
    await checkout.unsafe("commit");
    await shop.succeed(script);
    await assertSynced();
  });

  /** What stops a run before a row moves: how it comes about, what the run says, its advice in SQL in parentheses, and its exit code. */
  const refusals: Record<string, (own: AsyncDisposableStack) => Promise<{ code: number; says: string; variables?: Env }>> = {
    "without pg_read_all_stats": async (own) => {
      const { name, url } = own.use(await createRole("blind", `grant select on ${shop.table} to ROLE`));
      const says = `role ${name} may not see when .*Run as an administrator: (grant pg_monitor to ${name};)`;
      return { code: 1, says, variables: { SOURCE_DATABASE_URL: url } };
    },
    "while another role's transactions are hidden by track_activities": async (own) => {
      const { name, url } = own.use(await createRole("dark", "alter role ROLE set track_activities = off"));
      const { pid } = await begin(own.use(open(url, "dark app")));
      const says = `no bound is safe: pid ${pid}, application "dark app", role ${name} hides .*Run: (alter role .*\\(${pid}\\);)`;
      return { code: 1, says };
    },
    "while a transaction is open in which track_activities was switched on": async (own) => {
      const app = own.use(open(adminUrl(), "dim app", { track_activities: "off" }));
      const { pid } = await begin(app);
      await app.unsafe(`set local track_activities = on; update ${shop.table} set ${shop.text} = 'dim' where id = 1`);
      return {
        code: 1,
        says: `no bound is safe: pid ${pid}, application "dim app", role postgres hides .*Run: (alter role .*\\(${pid}\\);)`,
      };
    },
    "on a table with row-level security, whose policy shows every row": async () => {
      await shop.admin.unsafe(`create policy everyone on ${shop.table} using (true); alter table ${shop.table} enable row level security`);
      return {
        code: 2,
        says: `source table ${shop.table}: row-level security would hide rows .*or (alter table .* disable row level security;)`,
      };
    },
    "while the cursor is infinity or -infinity in a row": async () => {
      await put([
        [9000, "infinity"],
        [9001, "-infinity"],
      ]);
      return { code: 2, says: `column ${shop.table}\\.updated_at: .* found infinity\\. Run: (update ${shop.table} set .*;)` };
    },
  };
  for (const [when, cause] of Object.entries(refusals))
    test(`a run refuses ${when}; its advice, followed, helps`, async () => {
      await commitRow();
      const state = async (): Promise<unknown[]> => [await shop.watermark(), await shop.destinationRows(), await shop.stagingTables()];
      const before = await state();
      await using own = new AsyncDisposableStack();
      const { code, says, variables } = await cause(own);
      const refused = await shop.run(script, variables);
      const [, advice = ""] = new RegExp(says).exec(errorOf(refused)) ?? assert.fail(refused.stderr);
      assert.equal(refused.code, code);
      assert.deepEqual(await state(), before);
      await shop.admin.unsafe(advice.replace("then end that session:", ""));
      await until("a run succeeds", async () => (await shop.run(script, variables)).code === 0, 10); // a session may take a moment to end
      await assertSynced();
    });

  test("a window is half-open to the microsecond: a row at the watermark is in, a row at the bound waits", async () => {
    await clear();
    await put([[9, "2020-01-01T00:00:00+00"]]); // an empty table is not the one of a watermark
    await shop.succeed(script);
    const watermark = (await shop.watermark()) ?? "";
    await using checkout = open(adminUrl(), "check out");
    const { start } = await begin(checkout);
    await put([
      [1, watermark, -1], // dated before the bound that was taken: this is what the bound prevents
      [2, watermark],
      [3, watermark, 1],
      [4, start, -1],
      [5, start],
      [6, start, 1],
    ]);
    assert.equal(lines(await shop.succeed(script), "done")[0]?.rows, 3);
    assert.deepEqual(await syncedIds(), [2, 3, 4, 9]);
    assert.equal(await shop.watermark(), start);
    await checkout.unsafe("rollback");
    assert.equal(lines(await shop.succeed(script), "done")[0]?.rows, 2);
    assert.deepEqual(
      await shop.destinationRows(),
      (await shop.sourceRows()).filter(({ id }) => id !== "1"),
    );
  });

  test("more than CHUNK_ROWS rows of one timestamp, at a cut, at the watermark and at the end, arrive once each", async () => {
    await clear();
    const variables = { CHUNK_ROWS: "3", RUN_TIMEOUT_SECONDS: "60" };
    const at = (second: number): string => `2020-01-01T00:00:0${second}.000001+00`;
    await put([1, 2, 2, 2, 2, 2, 3, 3, 3, 3].map((second, index) => [index, at(second)]));
    const first = await shop.succeed(script, variables);
    const end = padded(await shop.watermark());
    assert.deepEqual(chunks(first), [
      ["-infinity", at(2), 1], // the fourth row's timestamp; it is never split
      [at(2), at(3), 5], // so all of its rows, to the next distinct one
      [at(3), end, 4], // there is no next one
    ]);
    await assertSynced();

    await shop.succeed("scripts/ops/rewind.ts", { PIPELINE: pipeline, TO: at(3).replace("+00", "Z") });
    const again = await shop.succeed(script, variables);
    assert.deepEqual(chunks(again), [[at(3), padded(await shop.watermark()), 4]]);
    assert.ok(lines(again, "chunk").every(({ inserted }) => inserted === 0));
    await assertSynced();
  });

  test("FROM is inclusive and TO exclusive to the microsecond, and the watermark stays where it is", async () => {
    await clear();
    const [from, to] = ["2020-06-01T10:00:00.000002+00", "2020-06-02T00:00:00+00"];
    await put([
      [1, from, -1],
      [2, from],
      [3, to, -1],
      [4, to],
    ]);
    const byHand = await shop.succeed(script, { FROM: "2020-06-01T10:00:00.000002Z", TO: "2020-06-02" });
    assert.deepEqual(chunks(byHand), [[from, "2020-06-02T00:00:00.000000+00", 2]]);
    assert.deepEqual(await syncedIds(), [2, 3]);
    assert.equal(await shop.watermark(), undefined);
  });
});
