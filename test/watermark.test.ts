/** The safe upper bound and the half-open window, on the local stack's Postgres. Clusters of their own: clusters.test.ts. */
import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { connect, type Socket } from "node:net";
import { join } from "node:path";
import type { Duplex } from "node:stream";
import { after, before, test } from "node:test";
import postgres, { type Sql } from "postgres";
import { copyJsonLines } from "../shared/postgres.ts";
import { createShop, type Result, type Shop, until } from "./lib/shop.ts";
import { type Env, root } from "./stack/env.ts";

const orders = "scripts/orders.ts";
/** Most tests share a shop; each begins and ends with everything synced. */
let shop: Shop;
let last = 5;
before(async () => {
  shop = await createShop();
  await shop.insertRows(1, last);
  await shop.succeed(orders);
});
after(() => shop[Symbol.asyncDispose]());

/** Commits one more order; the trigger dates it. */
async function commitOrder(): Promise<void> {
  last += 1;
  await shop.insertRows(last, last);
}

const adminUrl = (): string => shop.env.STACK_ADMIN_DATABASE_URL ?? "";
const readerUrl = (): string => shop.env.SOURCE_DATABASE_URL ?? "";

/** A session that ends with its test, whatever it is doing: postgres.js waits for a COPY or a stream to end. */
function open(url: string, application: string, settings: Record<string, string> = {}): Sql & AsyncDisposable {
  const { hostname, port } = new URL(url);
  let socket: Socket | undefined;
  const connection = { application_name: application, ...settings };
  const own = {
    socket: () => {
      socket = connect(Number(port), hostname);
      return socket;
    },
  };
  const sql = postgres(url, { max: 1, fetch_types: false, onnotice: () => {}, connection, ...own });
  const end = async (): Promise<void> => {
    socket?.destroy();
    await sql.end({ timeout: 0 });
  };
  return Object.assign(sql, { [Symbol.asyncDispose]: end });
}

/** Begins a transaction. Returns its now(), which is its xact_start, and its pid. */
async function begin(sql: Sql): Promise<{ start: string; pid: number }> {
  await sql.unsafe("begin");
  const [row] = await sql`select replace(now()::text, ' ', 'T') as start, pg_backend_pid() as pid`;
  return row as unknown as { start: string; pid: number };
}

/** What an application may do whose updated_at is now(): dates a row at the start of its transaction. */
async function writeWithNow(sql: Sql, status: string): Promise<void> {
  await sql.unsafe("set local session_replication_role = replica"); // without the trigger
  await sql`update public.orders set status = ${status}, updated_at = now() where id = 1`;
}

/** A role for one test: roles belong to the cluster, and other tests use those of sql/roles.sql at the same time. */
async function createRole(suffix: string, grants: string): Promise<{ name: string; url: string } & AsyncDisposable> {
  const name = `${shop.dataset}_${suffix}`;
  await shop.admin.unsafe(`create role ${name} login password 'secret'; ${grants.replaceAll("ROLE", name)}`);
  const url = Object.assign(new URL(adminUrl()), { username: name, password: "secret" }).href;
  const drop = (): Promise<unknown> => shop.admin.unsafe(`drop owned by ${name}; drop role ${name}`);
  return { name, url, [Symbol.asyncDispose]: async () => void (await drop()) };
}

/** The fields of the log's lines with this step, as written: text with spaces is JSON. */
function lines({ stderr }: Result, step: string): Record<string, string>[] {
  const matching = stderr.split("\n").filter((line) => line.includes(` step=${step} `));
  return matching.map((line) =>
    Object.fromEntries(
      [...line.matchAll(/(\w+)=("(?:[^"\\]|\\.)*"|\S*)/g)].map(([, key, value = ""]) => [
        key,
        value.startsWith('"') ? JSON.parse(value) : value,
      ]),
    ),
  );
}
const holder = (result: Result): string | undefined => lines(result, "held")[0]?.by;
const chunks = (result: Result): string[][] =>
  lines(result, "chunk").map(({ from = "", to = "", rows = "" }) => [from, to, rows]);

async function assertSynced(of = shop): Promise<void> {
  assert.deepEqual(await of.destinationRows(), await of.sourceRows());
}
const syncedIds = async (of = shop): Promise<number[]> => (await of.destinationRows()).map(({ id }) => Number(id));

for (const when of ["before", "after"]) {
  test(`an open transaction that writes ${when} the run holds the watermark at its start, and nothing is skipped`, async () => {
    await using checkout = open(adminUrl(), "check out");
    const { start, pid } = await begin(checkout);
    if (when === "before") await writeWithNow(checkout, when);
    await commitOrder();
    const rows = await shop.destinationRows();

    const held = await shop.succeed(orders);
    assert.equal(await shop.watermark(), start);
    assert.match(
      holder(held) ?? "",
      new RegExp(
        `^pid ${pid}, application "check out", role postgres, state idle in transaction, open for (PT\\S+|[\\d:]+)$`,
      ),
    );
    assert.deepEqual(await shop.destinationRows(), rows);

    const again = await shop.succeed(orders);
    assert.equal(await shop.watermark(), start);
    assert.deepEqual([holder(again)?.slice(0, 9 + `${pid}`.length), chunks(again)], [`pid ${pid}, app`, []]);

    if (when === "after") await writeWithNow(checkout, when);
    await checkout.unsafe("commit");
    const freed = await shop.succeed(orders);
    assert.equal(holder(freed), undefined);
    await assertSynced();
    assert.equal((await shop.destinationRows())[0]?.status, when);
  });
}

test("make status says who holds the watermark, and for programs too", async () => {
  await using checkout = open(adminUrl(), "check out");
  const { pid } = await begin(checkout);
  const holds = new RegExp(`pid ${pid}, application "check out", role postgres, state idle in transaction, open for `);
  assert.match((await shop.succeed("scripts/ops/status.ts")).stdout, holds);
  const [held] = JSON.parse((await shop.succeed("scripts/ops/status.ts", { JSON: "1" })).stdout);
  assert.match(held.held_by, holds);
  assert.ok(held.hold_seconds > 0);

  await checkout.unsafe("rollback");
  const [free] = JSON.parse((await shop.succeed("scripts/ops/status.ts", { JSON: "1" })).stdout);
  assert.deepEqual([free.held_by, free.hold_seconds], [null, 0]);
});

test("make status says unknown, not nobody, where the role may not see who holds the watermark", async () => {
  await using reader = await createRole("blind_status", "grant select on public.orders to ROLE");
  const variables = { SOURCE_DATABASE_URL: reader.url, JSON: "1" };
  const [status] = JSON.parse((await shop.succeed("scripts/ops/status.ts", variables)).stdout);
  assert.match(status.held_by, /^unknown: .*pg_read_all_stats/);
});

test("the bound's clock is fixed before pg_stat_activity is scanned", async () => {
  // In a transaction now() stands still, while clock_timestamp(), read after the scan, would be later.
  await using reader = open(readerUrl(), "test", { "etl.lag_seconds": "0" });
  const { start } = await begin(reader);
  const [row] = await reader.unsafe(readFileSync(join(root, "sql/safe_bound.sql"), "utf8"));
  assert.equal(row?.bound, start);
});

test("WATERMARK_LAG_SECONDS keeps the window back from the clock", async () => {
  await commitOrder();
  const rows = await shop.destinationRows();
  const waits = await shop.succeed(orders, { WATERMARK_LAG_SECONDS: "3600" });
  assert.deepEqual([chunks(waits), holder(waits)], [[], undefined]);
  assert.deepEqual(await shop.destinationRows(), rows);
  await shop.succeed(orders);
  await assertSynced();
});

test("a prepared transaction holds the watermark where it is, since its start is not known", async () => {
  const gid = shop.dataset;
  await using checkout = open(adminUrl(), "check out");
  const { start } = await begin(checkout);
  await writeWithNow(checkout, "prepared");
  await shop.succeed(orders);
  await checkout.unsafe(`prepare transaction '${gid}'`);
  try {
    await commitOrder();
    const rows = await shop.destinationRows();
    const held = await shop.succeed(orders);
    assert.equal(await shop.watermark(), start);
    assert.match(
      holder(held) ?? "",
      new RegExp(`^prepared transaction "${gid}" of role postgres, prepared (PT\\S+|[\\d:]+) ago$`),
    );
    assert.deepEqual(await shop.destinationRows(), rows);
    assert.match((await shop.succeed("scripts/ops/status.ts")).stdout, new RegExp(`prepared transaction "${gid}"`));
  } finally {
    await shop.admin.unsafe(`commit prepared '${gid}'`);
  }
  await shop.succeed(orders);
  await assertSynced();
  assert.equal((await shop.destinationRows())[0]?.status, "prepared");
});

/** An order committed after `others` began arrives at once. */
async function assertNotHeld(variables: Env = {}): Promise<void> {
  await commitOrder();
  const result = await shop.succeed(orders, variables);
  assert.equal(holder(result), undefined);
  await assertSynced();
}

test("open and prepared transactions of another database do not hold the watermark", async () => {
  const other = `${shop.dataset}_other`;
  await shop.admin.unsafe(`create database ${other}`);
  const url = Object.assign(new URL(adminUrl()), { pathname: `/${other}` }).href;
  try {
    await using reader = open(url, "report");
    await using writer = open(url, "writer");
    await begin(reader);
    await begin(writer);
    await writer.unsafe(`create table t (); prepare transaction '${other}'`);
    await assertNotHeld();
    await writer.unsafe(`rollback prepared '${other}'`);
  } finally {
    await shop.admin.unsafe(`drop database ${other} with (force)`);
  }
});

test("a walsender does not hold the watermark, streaming or in a transaction", async () => {
  // Postgres never shows a walsender's xact_start; it is left out by its backend_type all the same.
  await using exporting = open(adminUrl(), "export", { replication: "database" });
  await exporting.unsafe("begin read only").simple();
  await using streaming = open(adminUrl(), "stream", { replication: "database" });
  const [system] = await streaming.unsafe("IDENTIFY_SYSTEM").simple();
  const replication = streaming.unsafe(`START_REPLICATION PHYSICAL ${system?.xlogpos}`);
  const stream = (await replication.writable()) as Duplex; // postgres.js's types leave out that it can be read
  // It ends by being cut off; and it is read, for a walsender that waits for its client holds up every DROP DATABASE.
  stream.on("error", () => {}).resume();
  const senders = await until("both walsenders at work", async () => {
    const rows = await shop.admin<{ name: string; state: string }[]>`
      select application_name as name, state from pg_stat_activity
      where datname = current_database() and backend_type = 'walsender' order by 1`;
    return rows[1]?.state === "active" ? rows : undefined;
  });
  assert.deepEqual(
    senders.map(({ name, state }) => [name, state]),
    [
      ["export", "idle in transaction"],
      ["stream", "active"],
    ],
  );
  await assertNotHeld();
});

test("the reading role's own transaction and its COPY do not hold the watermark", async () => {
  await using reader = await createRole(
    "reader",
    "grant select on public.orders to ROLE; grant pg_read_all_stats to ROLE",
  );
  await using dump = open(reader.url, "pg_dump");
  await begin(dump);
  const copied = "select repeat('x', 1000) as x from generate_series(1, 1000000)";
  const session = { application: "etl:orders run=other", timeoutSeconds: 60 };
  await using rows = await copyJsonLines(reader.url, copied, session, { from: "2017-01-01", to: "2017-01-02" });
  await rows.lines[Symbol.asyncIterator]().next(); // and nobody reads on, so it stays in mid-COPY
  await until("the COPY waits for its reader", async () => {
    const { count } = await shop.admin`
      select from pg_stat_activity
      where application_name = ${session.application} and datname = current_database() and wait_event = 'ClientWrite'`;
    return count === 1;
  });
  await assertNotHeld({ SOURCE_DATABASE_URL: reader.url });
});

test("a role that could write is waited for, or refused, also where the pipeline runs as that role", async () => {
  await using own = await createShop();
  await own.insertRows(1, 2);
  await own.succeed(orders);
  await using app = await createRole("app", "grant pg_read_all_stats to ROLE");
  await own.admin.unsafe(`grant select, insert, update on public.orders to ${app.name}`);
  const url = Object.assign(new URL(app.url), { pathname: `/${own.dataset}` }).href;
  try {
    await using checkout = open(url, "check out");
    await begin(checkout);
    await checkout`update public.orders set status = 'own role' where id = 1`;
    await own.insertRows(3, 3);
    const { code, stderr } = await own.run(orders, { SOURCE_DATABASE_URL: url });
    await checkout.unsafe("commit");
    if (code !== 0) assert.deepEqual([code, /role \S+ may write/.test(stderr)], [2, true], stderr);
    await own.succeed(orders);
    await assertSynced(own);
  } finally {
    await own.admin.unsafe(`drop owned by ${app.name}`);
  }
});

/** The run refuses while `cause` stands: nothing moves, at the destination or of the watermark. After `cure` the next takes all. */
async function assertRefuses(
  expected: { code: number; says: RegExp; variables?: Env },
  cause: () => Promise<unknown>,
  cure: () => Promise<unknown>,
): Promise<void> {
  await commitOrder();
  const state = async (): Promise<unknown[]> => [await shop.watermark(), await shop.destinationRows()];
  const before = await state();
  try {
    await cause();
    const result = await shop.run(orders, expected.variables);
    assert.match(result.stderr, expected.says);
    assert.equal(result.code, expected.code);
    assert.deepEqual([await state(), await shop.stagingTables()], [before, []]);
  } finally {
    await cure();
  }
  await shop.succeed(orders, expected.variables);
  await assertSynced();
}

test("without pg_read_all_stats a run refuses and names the grant", async () => {
  await using reader = await createRole("blind", "grant select on public.orders to ROLE");
  const says = new RegExp(
    `role ${reader.name} may not see when .* no bound is safe\\. Run as a superuser: grant pg_read_all_stats to ${reader.name};`,
  );
  await assertRefuses(
    { code: 1, says, variables: { SOURCE_DATABASE_URL: reader.url } },
    async () => {},
    () => shop.admin.unsafe(`grant pg_read_all_stats to ${reader.name}`),
  );
});

test("track_activities off for another role: a run refuses and names the session", async () => {
  await using role = await createRole("dark", "alter role ROLE set track_activities = off");
  await using dark = open(role.url, "dark app");
  const { pid } = await begin(dark);
  await assertRefuses(
    {
      code: 1,
      says: new RegExp(
        `track_activities off, .* no bound is safe: pid ${pid}, application "dark app", role ${role.name}\\. Run: alter role … reset track_activities; then end that session`,
      ),
    },
    async () => {},
    async () => {
      // The remedy as the message gives it.
      await shop.admin.unsafe(`alter role ${role.name} reset track_activities; select pg_terminate_backend(${pid});`);
      await until("the session has ended", async () => {
        const { count } = await shop.admin`select from pg_stat_activity where pid = ${pid}`;
        return count === 0;
      });
    },
  );
});

test("track_activities off in one session, in mid-transaction too: a run refuses and names the session", async () => {
  await using checkout = open(adminUrl(), "silent");
  const { pid } = await begin(checkout);
  await assertRefuses(
    { code: 1, says: new RegExp(`track_activities off, .*: pid ${pid}, application "silent", role postgres\\.`) },
    () => checkout.unsafe("set track_activities = off"),
    () => checkout.unsafe("rollback"),
  );
});

test("row-level security on the table: a run refuses by name, also where its policy shows every row", async () => {
  await assertRefuses(
    { code: 2, says: /source table public\.orders: row-level security would hide rows .*disable row level security;/ },
    () => shop.admin`create policy everyone on public.orders using (true)`.then(enableRowSecurity),
    () => shop.admin`alter table public.orders disable row level security`,
  );
});
const enableRowSecurity = (): Promise<unknown> =>
  shop.admin`alter table public.orders enable row level security`.execute();

test("a nullable cursor column: a run refuses by name", async () => {
  await assertRefuses(
    {
      code: 2,
      says: /column public\.orders\.updated_at: expected NOT NULL.*found a nullable column/,
    },
    () => shop.admin`alter table public.orders alter updated_at drop not null`,
    () => shop.admin`alter table public.orders alter updated_at set not null`,
  );
});

for (const value of ["infinity", "-infinity"]) {
  test(`${value} in the cursor column: a run refuses by name`, async () => {
    await assertRefuses(
      {
        code: 2,
        says: /column public\.orders\.updated_at: .* found infinity or -infinity in at least one row, .*Give those rows a time/,
      },
      () => put(shop, [[9000, value]]),
      () => shop.admin`update public.orders set status = 'dated' where id = 9000`, // the trigger gives it a time
    );
  });
}

/** Inserts orders dated exactly so, past the trigger: [id, timestamptz, microseconds to add]. */
async function put(of: Shop, rows: [number, string, number?][]): Promise<void> {
  await of.admin.begin(async (sql) => {
    await sql`set local session_replication_role = replica`;
    for (const [id, at, microseconds = 0] of rows) {
      await sql`
        insert into public.orders (id, user_id, updated_at)
        values (${id}, 1, ${at}::text::timestamptz + ${microseconds}::int * interval '1 microsecond')
        on conflict (id) do update set updated_at = excluded.updated_at`;
    }
  });
}

test("a window is half-open to the microsecond: a row at the watermark is in, a row at the bound waits", async () => {
  await using own = await createShop();
  await put(own, [[1, "2020-01-01"]]);
  await own.succeed(orders);
  const watermark = (await own.watermark()) ?? "";
  await put(own, [
    [2, watermark, -1], // dated before the bound that was taken: this is what the bound prevents
    [3, watermark],
    [4, watermark, 1],
  ]);
  assert.equal(lines(await own.succeed(orders), "done")[0]?.rows, "2");
  assert.deepEqual(await syncedIds(own), [1, 3, 4]);

  const checkout = own.connect("check out");
  const { start } = await begin(checkout);
  await put(own, [
    [5, start, -1],
    [6, start],
    [7, start, 1],
  ]);
  assert.equal(lines(await own.succeed(orders), "done")[0]?.rows, "1");
  assert.deepEqual(await syncedIds(own), [1, 3, 4, 5]);
  assert.equal(await own.watermark(), start);
  await checkout.unsafe("rollback");
  assert.equal(lines(await own.succeed(orders), "done")[0]?.rows, "2");
  assert.deepEqual(await syncedIds(own), [1, 3, 4, 5, 6, 7]);
  assert.deepEqual(
    await own.destinationRows(),
    (await own.sourceRows()).filter(({ id }) => id !== "2"),
  );
});

test("more than CHUNK_ROWS rows of one timestamp, at a cut, at the watermark and at the end, arrive once each", async () => {
  await using own = await createShop();
  const variables = { CHUNK_ROWS: "3", RUN_TIMEOUT_SECONDS: "30" };
  const at = (second: number): string => `2020-01-01T00:00:0${second}.000001+00`;
  const seconds = [1, 2, 2, 2, 2, 2, 3, 3, 3, 3];
  await put(
    own,
    seconds.map((second, index) => [index, at(second)]),
  );
  const first = await own.succeed(orders, variables);
  const end = await own.watermark();
  assert.deepEqual(chunks(first), [
    ["-infinity", at(2), "1"], // the fourth row's timestamp; it is never split
    [at(2), at(3), "5"], // so all of its rows, to the next distinct one
    [at(3), end, "4"], // there is no next one
  ]);
  await assertSynced(own);

  await own.succeed("scripts/ops/rewind.ts", { PIPELINE: "orders", TO: at(3).replace("+00", "Z") });
  const again = await own.succeed(orders, variables);
  assert.deepEqual(chunks(again), [[at(3), await own.watermark(), "4"]]);
  assert.ok(lines(again, "chunk").every(({ inserted }) => inserted === "0"));
  await assertSynced(own);
});

test("FROM is inclusive and TO exclusive to the microsecond, and the watermark stays where it is", async () => {
  await using own = await createShop();
  const [from, to] = ["2020-06-01T10:00:00.000002+00", "2020-06-02T00:00:00+00"];
  await put(own, [
    [1, from, -1],
    [2, from],
    [3, to, -1],
    [4, to],
  ]);
  const byHand = await own.succeed(orders, { FROM: "2020-06-01T12:00:00.000002+02:00", TO: "2020-06-02" });
  assert.deepEqual(chunks(byHand), [[from, "2020-06-02T00:00:00.000000+00", "2"]]);
  assert.deepEqual(await syncedIds(own), [2, 3]);
  assert.equal(await own.watermark(), undefined);

  await own.succeed(orders);
  await assertSynced(own);
  const watermark = await own.watermark();
  await own.succeed(orders, { FROM: "2020-06-01", TO: "2020-06-02" });
  assert.equal(await own.watermark(), watermark);
  await assertSynced(own);
});

test("another TimeZone, DateStyle and IntervalStyle of the database or the roles change nothing", async () => {
  await using own = await createShop();
  for (const [name, value] of [
    ["timezone", "Asia/Kathmandu"],
    ["datestyle", "SQL, DMY"],
    ["intervalstyle", "sql_standard"],
  ]) {
    await own.admin.unsafe(`alter database ${own.dataset} set ${name} = '${value}'`);
    for (const role of ["etl_reader", "etl_metadata"])
      await own.admin.unsafe(`alter role ${role} in database ${own.dataset} set ${name} = '${value}'`);
  }
  const midnight = "2020-02-01T00:00:00+00";
  await put(own, [
    [1, midnight, -1],
    [2, midnight],
    [3, midnight, 1],
  ]);
  const byHand = await own.succeed(orders, { FROM: "2020-02-01", TO: "2020-02-02", CHUNK_ROWS: "1" });
  const cut = midnight.replace("+", ".000001+");
  assert.deepEqual(chunks(byHand), [
    [cut.replace("1+", "0+"), cut, "1"],
    [cut, "2020-02-02T00:00:00.000000+00", "1"],
  ]);
  const checkout = own.connect("check out");
  await checkout.unsafe("set datestyle = 'ISO'; begin");
  const [{ start } = {}] = await checkout`select replace((now() at time zone 'utc')::text, ' ', 'T') || '+00' as start`;
  const held = await own.succeed(orders);
  assert.match(holder(held) ?? "", /application "check out"/);
  assert.deepEqual(chunks(held), [["-infinity", start, "3"]]);
  await checkout.unsafe("rollback");
  await own.succeed("scripts/ops/rewind.ts", { PIPELINE: "orders", TO: "2020-02-01" });
  assert.equal(await own.watermark(), midnight);
  await own.insertRows(4, 4);
  await own.succeed(orders);
  await assertSynced(own);
});
