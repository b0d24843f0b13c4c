/**
 * What a pipeline reads at the source, and whether it may: the table, its cursor column, and the columns that the SELECT returns.
 */
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
}

/** The SELECT of sql/NAME.sql, such that it can stand in parentheses: psql needs the semicolon at its end. */
export function readSelect(pipeline: string): string {
  const file = join(root, `sql/${pipeline}.sql`);
  if (!existsSync(file))
    throw new UsageError(`sql/${pipeline}.sql does not exist: it holds the SELECT that reads the source`);
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
  /** The table's column that it is; null for an expression. */
  of: string | null;
}

/** What is needed of a run to check its source. */
export type SchemaCheck = Pick<Run, "pipeline" | "source" | "log" | "unknownColumns">;

/** What a SELECT has to return: a column, what is expected of it, and in what one that exists differs. */
export interface Expected {
  name: string;
  expected: string;
  differs(column: Column): string | undefined;
}

/**
 * Compares the table and its cursor column, and what the SELECT returns, with what is expected of them by `file`. A column of the table
 * that is not expected is a warning and a metric.
 * @returns the columns that the SELECT returns.
 * @throws UsageError naming column, expected and found, all of them at once.
 */
export async function checkColumns(
  run: SchemaCheck,
  file: string,
  { table, cursor, select }: Source,
  wanted: Expected[],
): Promise<Column[]> {
  const { source, pipeline } = run;
  const checks = readFileSync(join(root, "sql/source_checks.sql"), "utf8");
  const faulty = await source.begin("read only", async (sql) => {
    await sql`select set_config('etl.source', ${table}, true), set_config('etl.source_cursor', ${cursor}, true)`;
    return await sql.unsafe<{ fault: string }[]>(checks);
  });
  const faults = faulty.map(({ fault }) => fault);
  if (faults[0]?.startsWith("source table")) throw new UsageError(faults[0]);
  const columns = await describe(source, `select * from ${table}`);
  const known = (name: string): boolean => wanted.some((column) => column.name === name);
  let missing: string | undefined;
  const found = await describe(source, select).catch(({ code, message }: Error & { code?: string }) => {
    if (code !== "42703") throw Object.assign(new Error(message), { code }); // undefined_column
    missing = message;
    return columns.filter(({ name }) => known(name)); // the others are still worth checking, as the table has them
  });
  const fault = (column: string, expected: string, is: string): void =>
    void faults.push(`column ${table}.${column}: expected ${expected}, found ${is}`);
  for (const { name, expected, differs } of wanted) {
    const column = found.find((one) => one.name === name);
    const is = column ? differs(column) : "no such column";
    if (is) fault(name, `${expected} (${file})`, is);
  }
  for (const { name } of found) if (!known(name)) fault(name, `no such field (${file})`, "it in the SELECT");
  if (
    !faults.length &&
    (await source.unsafe(`select from ${table} where ${quote(cursor)} in ('infinity', '-infinity') limit 1`)).count
  )
    fault(
      cursor,
      "finite times, since it is the cursor",
      "infinity or -infinity in at least one row, which no window ends after. Give those rows a time",
    );
  const unknown = columns
    .map(({ name }) => name)
    .filter((name) => !known(name) && !found.some(({ of }) => of === name));
  if (missing && !faults.length) faults.push(`sql/${pipeline}.sql: ${missing}`);
  if (faults.length) {
    if (unknown.length) faults.push(`not in the contract: ${unknown.join(", ")} (was a column renamed?)`);
    const next = `Bring the source, sql/${pipeline}.sql and ${file} together`;
    throw differs("source", faults, next);
  }
  run.unknownColumns = unknown;
  const warning = `${table} has columns that are not in ${file}, and are not synced`;
  if (unknown.length) run.log("warning", { warning, columns: unknown.join() });
  return found;
}

/** What a SELECT returns: each column's type, and the table's column that it is, if it is one. */
async function describe(source: Sql, select: string): Promise<Column[]> {
  const { columns } = await source.unsafe(select).describe();
  return await source<Column[]>`
    select d.name, case coalesce(e.typtype, t.typtype) when 'e' then 'enum' else coalesce(e.typname, t.typname) end as type,
      e.oid is not null as array, format_type(t.oid, null) as sql,
      format_type(t.oid, a.atttypmod) as declared, coalesce(a.attnotnull, false) as notnull, a.attname as of
    from jsonb_to_recordset(${JSON.stringify(columns)}::text::jsonb) as d (name text, type oid, "table" oid, number int)
    join pg_type t on t.oid = d.type
    left join pg_type e on e.oid = t.typelem and t.typcategory = 'A'
    left join pg_attribute a on a.attrelid = d."table" and a.attnum = d.number`;
}

/** All faults of one side, in one error. */
export const differs = (side: string, faults: string[], next: string): UsageError =>
  new UsageError(
    `the ${side} differs from the contract, nothing was moved:\n${faults.map((fault) => `  ${fault}`).join("\n")}\n${next}; README, "When the schema changes".`,
  );
