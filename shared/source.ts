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
 * Compares the table and its cursor column, and what the SELECT returns, with what is expected of them by `file`.
 * @returns the columns that the SELECT returns.
 * @throws UsageError naming column, expected and found, all of them at once.
 */
export async function checkColumns(
  run: SchemaCheck,
  file: string,
  source: Source,
  wanted: Expected[],
): Promise<Column[]> {
  const { table, select } = source;
  await checkReadable(run.source, table);
  const columns = await describe(run.source, `select * from ${table}`);
  const known = (name: string): boolean => wanted.some((column) => column.name === name);
  let missing: string | undefined;
  const found = await describe(run.source, select).catch(({ code, message }: Error & { code?: string }) => {
    if (code !== "42703") throw Object.assign(new Error(message), { code }); // undefined_column
    missing = message;
    return columns.filter(({ name }) => known(name)); // the others are still worth checking, as the table has them
  });
  const faults: string[] = [];
  const fault = (column: string, expected: string, is: string): void =>
    void faults.push(`column ${table}.${column}: expected ${expected}, found ${is}`);
  for (const { name, expected, differs } of wanted) {
    const column = found.find((one) => one.name === name);
    const is = column ? differs(column) : "no such column";
    if (is) fault(name, `${expected} (${file})`, is);
  }
  for (const { name } of found) if (!known(name)) fault(name, `no such field (${file})`, "it in the SELECT");
  await checkCursor(run.source, source, columns, fault);
  const unknown = columns
    .map(({ name }) => name)
    .filter((name) => !known(name) && !found.some(({ of }) => of === name));
  if (missing && !faults.length) faults.push(`sql/${run.pipeline}.sql: ${missing}`);
  if (faults.length) throw new UsageError(schemaFaults(run.pipeline, file, "source", faults, unknown));
  run.unknownColumns = unknown;
  const warning = `${table} has columns that are not in ${file}, and are not synced`;
  if (unknown.length) run.log("warning", { warning, columns: unknown.join() });
  return found;
}

async function checkReadable(source: Sql, table: string): Promise<void> {
  const [relation] = await source<{ exists: boolean; hidden: boolean; readable: boolean; role: string }[]>`
    select oid is not null as exists, row_security_active(oid) as hidden, has_table_privilege(oid, 'select') as readable,
      current_user as role
    from (select to_regclass(${table})::oid as oid) relation`;
  const { exists, hidden, readable, role } = relation ?? {};
  let fault: string | undefined;
  if (!exists) fault = "there is no such table, or it may not be seen. Is SOURCE_DATABASE_URL the right database?";
  else if (!readable) fault = `role ${role} may not read it. Run as a superuser: grant select on ${table} to ${role};`;
  else if (hidden)
    fault = `row-level security would hide rows from role ${role}. Run as a superuser: alter role ${role} bypassrls; or alter table ${table} disable row level security;`;
  if (fault) throw new UsageError(`source table ${table}: ${fault}`);
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

/** A row whose cursor is NULL or infinite would never be read. */
async function checkCursor(
  source: Sql,
  { table, cursor }: Source,
  columns: Column[],
  fault: (column: string, expected: string, is: string) => void,
): Promise<void> {
  const column = columns.find(({ name }) => name === cursor);
  const because = "since it is the cursor";
  if (column?.type !== "timestamptz")
    return fault(cursor, `timestamptz, ${because}`, column?.declared ?? "no such column");
  if (!column.notnull)
    return fault(
      cursor,
      `NOT NULL, ${because} and a row without it would never be read`,
      `a nullable column. Run: alter table ${table} alter ${quote(cursor)} set not null;`,
    );
  const { count } = await source.unsafe(
    `select from ${table} where ${quote(cursor)} in ('infinity', '-infinity') limit 1`,
  );
  if (count)
    fault(
      cursor,
      `finite times, ${because}`,
      "infinity or -infinity in at least one row, which no window ends after. Give those rows a time",
    );
}

/** All faults of one side, in one text. */
export function schemaFaults(
  pipeline: string,
  file: string,
  side: string,
  faults: string[],
  unknown: string[],
): string {
  const renamed = unknown.length
    ? `\n  not in the contract: ${unknown.join(", ")}${faults.some((fault) => fault.endsWith("no such column")) ? " (was a column renamed?)" : ""}`
    : "";
  const next =
    side === "source"
      ? `Bring the source, sql/${pipeline}.sql and ${file} together`
      : "For additions: make migrate. Anything else is yours to decide";
  return `the ${side} differs from the contract, nothing was moved:\n${faults.map((fault) => `  ${fault}`).join("\n")}${renamed}\n${next}; README, "When the schema changes".`;
}
