/** What a pipeline reads at the source, and whether it may: the table, its cursor column, and the columns that the SELECT returns. */
import { existsSync, readFileSync } from "node:fs";
import { join } from "node:path";
import type { Sql } from "postgres";
import { root, UsageError } from "./env.ts";
import type { Run } from "./run.ts";
import { quote } from "./session.ts";

/** What a pipeline reads: a table, the column that says when a row last changed, and the SELECT of sql/NAME.sql. */
export interface Source {
  /** Schema-qualified, for example public.orders. */
  table: string;
  /** timestamptz, NOT NULL, indexed, set by the database to now() or clock_timestamp(). */
  cursor: string;
  /** Bounds the cursor by the settings etl.from (inclusive) and etl.to (exclusive). */
  select: string;
  /** What the SELECT calls the columns of a unique key of the table, where rows are upserted by it. */
  key?: string[];
}

/** The SELECT of sql/NAME.sql, such that it can stand in parentheses: psql needs the semicolon at its end. */
export function readSelect(pipeline: string): string {
  const file = join(root, `sql/${pipeline}.sql`);
  if (!existsSync(file)) throw new UsageError(`sql/${pipeline}.sql does not exist: it holds the SELECT that reads the source`);
  return `${readFileSync(file, "utf8").replace(/;(\s|--.*(\n|$))*$/, "")}\n`;
}

/** A column of the table, or one that a SELECT returns. */
export interface Column {
  name: string;
  /** Postgres's name of the type, or of an array's elements, without modifiers; enum for any enum. */
  type: string;
  array: boolean;
  /** The type as SQL writes it, for example integer[]; and with its modifiers, for example numeric(12,2). */
  sql: string;
  declared: string;
  notnull: boolean;
  /** The column of the source's table that it is; null for an expression, and for another table's. */
  of: string | null;
}

/** What is needed of a run to check its source. */
export type SchemaCheck = Pick<Run, "pipeline" | "source" | "log" | "metrics">;

/** What a SELECT has to return: a column, what is expected of it, and in what one that exists differs. */
export interface Expected {
  name: string;
  expected: string;
  differs(column: Column): string | undefined;
}

/**
 * Compares the table and its cursor column, and what the SELECT returns, with what `file` expects. A column of the table that is not
 * expected, and rows that no run reads, are a warning and a metric.
 * @returns the columns that the SELECT returns.
 * @throws UsageError naming column, expected and found, all of them at once.
 */
export async function checkColumns(run: SchemaCheck, file: string, of: Source, wanted: Expected[]): Promise<Column[]> {
  const { source, pipeline } = run;
  const { table, cursor, select, key = [] } = of;
  const known = (name: string): boolean => wanted.some((column) => column.name === name);
  const refused: string[] = [];
  const columns = await describe(source, `select * from ${table}`, table).catch(() => []);
  const found = await describe(source, select, table).catch((error: Error & { code?: string }) => {
    if (!error.code?.startsWith("42")) throw error; // a name that is not there, or may not be used
    refused.push(`sql/${pipeline}.sql: ${error.message}`);
    return columns.filter(({ name }) => known(name)); // the others are still worth checking, as the table has them
  });
  const own = found.map((column) => column.of).filter((name) => name !== null);
  const keyColumns = found.filter(({ name }) => key.includes(name)).map((column) => column.of ?? column.name);
  const faults = await findFaults(source, of, keyColumns, own);
  if (faults[0]?.startsWith("source table")) throw new UsageError(faults[0]);
  const fault = (column: string, expected: string, is: string): void =>
    void faults.push(`column ${table}.${column}: expected ${expected}, found ${is}`);
  for (const { name, expected, differs } of wanted) {
    const column = found.find((one) => one.name === name);
    const is = column ? differs(column) : "no such column";
    if (is) fault(name, `${expected} (${file})`, is);
    else if (column?.of === null && (name === cursor || key.includes(name)))
      fault(name, "a column of this table, since rows are found by it", `something else in sql/${pipeline}.sql`);
  }
  for (const { name } of found) if (!known(name)) fault(name, `no such field (${file})`, "it in the SELECT");
  if (!faults.length) faults.push(...refused);
  const unreachable = faults.length ? { infinite: 0, future: 0 } : await findUnreachable(source, of, keyColumns);
  const correct = `update ${table} set ${cursor} = now() where ${cursor}`;
  if (unreachable.infinite)
    fault(cursor, "finite times, since it is the cursor", `infinity. Run: ${correct} in ('infinity', '-infinity');`);
  const unknown = columns.map(({ name }) => name).filter((name) => !known(name) && !own.includes(name));
  if (faults.length) {
    if (unknown.length) faults.push(`not in the contract: ${unknown.join(", ")} (was a column renamed?)`);
    throw driftError("source", faults, `Bring the source, sql/${pipeline}.sql and ${file} together`);
  }
  const { future, first } = unreachable;
  Object.assign(run.metrics, { etl_unknown_source_columns: unknown.length, etl_future_rows: future });
  const warning = `${table} has columns that are not in ${file}, and are not synced`;
  if (unknown.length) run.log("warning", { warning, columns: unknown.join() });
  const ahead = `${future} rows of ${table} lie in the future, and no run reads them before. Run: ${correct} > now();`;
  if (future) run.log("warning", { warning: ahead, rows: future, first });
  return found;
}

async function findFaults(sql: Sql, { table, cursor }: Source, key: string[], columns: string[]): Promise<string[]> {
  await sql`select set_config('etl.source', ${table}, false), set_config('etl.source_cursor', ${cursor}, false),
    set_config('etl.source_key', ${key.join()}, false), set_config('etl.source_columns', ${columns.join()}, false)`;
  const rows = await sql.unsafe<{ fault: string }[]>(readFileSync(join(root, "sql/source_checks.sql"), "utf8"));
  return rows.map(({ fault }) => fault);
}

/** Rows whose cursor is infinite or lies in the future: how many, and the first one's key. No window ends after them. */
export async function findUnreachable(
  sql: Sql,
  { table, cursor }: Source,
  key: string[],
): Promise<{ infinite: number; future: number; first?: string }> {
  const column = quote(cursor);
  const name = key.length ? rowName(key) : `${column}::text`;
  const [row] = await sql.unsafe<{ infinite: number; future: number; first: string }[]>(`
    select count(*) filter (where not isfinite(${column}))::int as infinite, count(*) filter (where isfinite(${column}))::int as future,
      min(${name}) as first
    from ${table} where ${column} > clock_timestamp() or ${column} = '-infinity'`);
  return row ?? { infinite: 0, future: 0 };
}

/** SQL: a row's key as text, for example id=17. */
export const rowName = (key: string[]): string =>
  key.map((name) => `'${name}=' || coalesce(${quote(name)}::text, 'NULL')`).join(" || ', ' || ");

/** What a SELECT returns: each column's type, and the table's column that it is, if it is one. */
async function describe(source: Sql, select: string, table: string): Promise<Column[]> {
  const { columns } = await source.unsafe(select).describe();
  return await source<Column[]>`
    select d.name, case coalesce(e.typtype, t.typtype) when 'e' then 'enum' else coalesce(e.typname, t.typname) end as type,
      e.oid is not null as array, format_type(t.oid, null) as sql, format_type(t.oid, a.atttypmod) as declared,
      coalesce(a.attnotnull, false) as notnull, case when a.attrelid = to_regclass(${table}) then a.attname end as of
    from jsonb_to_recordset(${JSON.stringify(columns)}::text::jsonb) as d (name text, type oid, "table" oid, number int)
    join pg_type t on t.oid = d.type
    left join pg_type e on e.oid = t.typelem and t.typcategory = 'A'
    left join pg_attribute a on a.attrelid = d."table" and a.attnum = d.number`;
}

/** All differences of one side, in one error. */
export const driftError = (side: string, faults: string[], next: string): UsageError =>
  new UsageError(
    `the ${side} differs from the contract, nothing was moved:\n  ${faults.join("\n  ")}\n${next}; ` +
      'schemas/README.md, "When the schema changes".',
  );
