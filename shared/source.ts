/**
 * What a pipeline reads at the source, and whether it may: the table, its cursor column, and the columns that the SELECT returns.
 */
import { existsSync, readFileSync } from "node:fs";
import { join } from "node:path";
import type { PendingQuery, Row, Sql } from "postgres";
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
    throw new UsageError(`sql/${pipeline}.sql is not there: it holds the SELECT that reads the source`);
  return `${readFileSync(file, "utf8").replace(/;(\s|--.*(\n|$))*$/, "")}\n`;
}

interface ColumnType {
  /** Postgres's name of the type, or of an array's elements, without modifiers; enum for any enum. */
  type: string;
  array: boolean;
  /** The type as SQL writes it, for example integer[]. */
  sql: string;
}

/** A column of the source table. */
interface TableColumn extends ColumnType {
  relation: number;
  number: number;
  name: string;
  notnull: boolean;
  /** As declared, for example numeric(12,2). */
  declared: string;
}

/** A column that a SELECT returns. */
export interface Column extends ColumnType {
  name: string;
  /** The table's column that it is, unless it is an expression. */
  of: TableColumn | undefined;
}

/** What is needed of a run to compare its source. */
export type Comparing = Pick<Run, "pipeline" | "source" | "log" | "unknownColumns">;

/** What a SELECT has to return: a column, what is expected of it, and in what one that is there differs. */
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
export async function compareSource(
  run: Comparing,
  file: string,
  source: Source,
  wanted: Expected[],
): Promise<Column[]> {
  const { table, cursor, select } = source;
  const columns = await readColumns(run.source, table);
  const known = (name: string): boolean => wanted.some((column) => column.name === name);
  const { found, missing } = await describeSelect(run.source, select, columns, known);
  const faults: string[] = [];
  const fault = (column: string, expected: string, is: string): void =>
    void faults.push(`column ${table}.${column}: expected ${expected}, found ${is}`);
  for (const { name, expected, differs } of wanted) {
    const column = found.find((one) => one.name === name);
    const is = column ? differs(column) : "no such column";
    if (is) fault(name, `${expected} (${file})`, is);
  }
  for (const { name } of found) {
    if (!known(name)) fault(name, `no such field (${file})`, "it in the SELECT");
  }
  const at = columns.find(({ name }) => name === cursor);
  if (at?.type !== "timestamptz")
    fault(cursor, "timestamptz, since it is the cursor", at?.declared ?? "no such column");
  else if (!at.notnull) {
    fault(
      cursor,
      "NOT NULL, since it is the cursor and a row without it would never be read",
      `a nullable column. Run: alter table ${table} alter ${cursor} set not null;`,
    );
  } else {
    const infinite = await run.source.unsafe(
      `select from ${table} where ${quote(cursor)} in ('infinity', '-infinity') limit 1`,
    );
    if (infinite.count)
      fault(
        cursor,
        "finite times, since it is the cursor",
        "infinity or -infinity in at least one row, which no window ends after. Give those rows a time",
      );
  }
  const unknown = columns
    .map(({ name }) => name)
    .filter((name) => !known(name) && !found.some(({ of }) => of?.name === name));
  if (faults.length || missing) {
    if (!faults.length) faults.push(`sql/${run.pipeline}.sql: column "${missing}" does not exist`);
    throw new UsageError(schemaFaults(run.pipeline, file, "source", faults, unknown));
  }
  run.unknownColumns = unknown;
  if (unknown.length) {
    run.log("warning", {
      warning: `${table} has columns that are not in ${file}, and are not synced`,
      columns: unknown.join(),
    });
  }
  return found;
}

async function readColumns(source: Sql, table: string): Promise<TableColumn[]> {
  const [relation] = await source<{ oid: number | null; rls: boolean; readable: boolean; role: string }[]>`
    select oid, row_security_active(oid) as rls, has_table_privilege(oid, 'select') as readable, current_user as role
    from (select to_regclass(${table})::oid as oid) relation`;
  if (!relation?.oid)
    throw new UsageError(
      `source table ${table}: there is no such table, or it may not be seen. Is SOURCE_DATABASE_URL the right database?`,
    );
  const { role } = relation;
  if (!relation.readable)
    throw new UsageError(
      `source table ${table}: role ${role} may not read it. Run as a superuser: grant select on ${table} to ${role};`,
    );
  if (relation.rls) {
    throw new UsageError(
      `source table ${table}: row-level security would hide rows from role ${role}. Run as a superuser: alter role ${role} bypassrls; or alter table ${table} disable row level security;`,
    );
  }
  return await source<TableColumn[]>`
    select attrelid as relation, attnum as number, attname as name, attnotnull as notnull, format_type(atttypid, atttypmod) as declared, ${typeColumns(source)}
    from pg_attribute join pg_type t on t.oid = atttypid left join pg_type e on e.oid = t.typelem and t.typcategory = 'A'
    where attrelid = ${relation.oid} and attnum > 0 and not attisdropped order by attnum`;
}

/** The columns of ColumnType, from pg_type t and, for an array, pg_type e of its elements. */
const typeColumns = (sql: Sql): PendingQuery<Row[]> => sql`
  case coalesce(e.typtype, t.typtype) when 'e' then 'enum' else coalesce(e.typname, t.typname) end as type,
  e.oid is not null as array, format_type(t.oid, null) as sql`;

/** The columns that the SELECT returns, and which of the table's they are; or the one that it names and the table has not. */
async function describeSelect(
  source: Sql,
  select: string,
  columns: TableColumn[],
  known: (name: string) => boolean,
): Promise<{ found: Column[]; missing?: string }> {
  try {
    const described = await source.unsafe(select).describe();
    const oids = `{${described.columns.map(({ type }) => type).join()}}`;
    const types = await source<(ColumnType & { oid: number })[]>`
      select t.oid, ${typeColumns(source)} from pg_type t left join pg_type e on e.oid = t.typelem and t.typcategory = 'A'
      where t.oid = any(${oids}::text::oid[])`;
    const found = described.columns.map(({ name, type, table, number }) => ({
      ...(types.find(({ oid }) => oid === type) as ColumnType),
      name,
      of: columns.find((column) => column.relation === table && column.number === number),
    }));
    return { found };
  } catch (error) {
    const { code, message } = error as { code?: string; message: string };
    if (code !== "42703") throw error; // undefined_column
    // The other columns are still worth checking, as the table has them.
    const found = columns.filter(({ name }) => known(name)).map((of) => ({ ...of, of }));
    return { found, missing: /column "?(?:\w+\.)?(.*?)"? does not exist/.exec(message)?.[1] ?? message };
  }
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
