/**
 * The contract: schemas/bigquery/NAME.json, a BigQuery Table resource as the API takes it. Before a run moves a row, what
 * the extraction SELECT really returns and what the destination really has are compared with it.
 */
import { existsSync, readdirSync, readFileSync } from "node:fs";
import { join } from "node:path";
import type { TableField, TableMetadata } from "@google-cloud/bigquery";
import type { Sql } from "postgres";
import { root, UsageError } from "./env.ts";
import { quote, raise } from "./postgres.ts";
import type { Run } from "./run.ts";
import type { Source } from "./watermark.ts";

interface Field extends TableField {
  name: string;
  type: string;
  mode: string;
}

export interface Contract {
  pipeline: string;
  /** File name from the project's root, for messages. */
  file: string;
  fields: Field[];
  /** Columns of the primary key. */
  key: string[];
  /** The whole Table resource, for creating the table. */
  resource: TableMetadata;
}

export function readContract(pipeline: string): Contract {
  const file = `schemas/bigquery/${pipeline}.json`;
  try {
    const resource = JSON.parse(readFileSync(join(root, file), "utf8"));
    const fields = resource.schema.fields.map((field: TableField) => ({ mode: "NULLABLE", ...field }));
    return { pipeline, file, fields, key: resource.tableConstraints.primaryKey.columns, resource };
  } catch (error) {
    throw new UsageError(
      `${file} must be a BigQuery Table resource with schema.fields and tableConstraints.primaryKey: ${(error as Error).message}`,
    );
  }
}

const asText = (column: string): string => `${column}::text`;
const asIs = (column: string): string => column;
const asBase64 = (column: string): string => `translate(encode(${column}, 'base64'), E'\n', '')`;
/**
 * Postgres type → the BigQuery types that hold every value of it → how the value is written into a JSON line.
 * INT64 and NUMERIC go as text, since a JSON number is exact only to 2^53; json goes through jsonb, since a json value may
 * hold raw newlines; jsonb's null becomes NULL in a JSON field, and stays 'null' in a STRING field.
 */
const types: Record<string, Record<string, (column: string) => string>> = {
  int2: { INTEGER: asText },
  int4: { INTEGER: asText },
  int8: { INTEGER: asText },
  numeric: { NUMERIC: asText, BIGNUMERIC: asText, STRING: asText },
  float4: { FLOAT: asIs },
  float8: { FLOAT: asIs },
  bool: { BOOLEAN: asIs },
  text: { STRING: asIs },
  varchar: { STRING: asIs },
  bpchar: { STRING: asIs },
  uuid: { STRING: asText },
  enum: { STRING: asText },
  inet: { STRING: asText },
  cidr: { STRING: asText },
  interval: { STRING: asText },
  date: { DATE: asText },
  time: { TIME: asText },
  timestamp: { DATETIME: asIs },
  timestamptz: { TIMESTAMP: asIs },
  json: { JSON: (column) => `${column}::jsonb`, STRING: asText },
  jsonb: { JSON: asIs, STRING: asText },
  bytea: { BYTES: asBase64 },
};

const special = (column: string): string => `${column} in ('NaN', 'Infinity', '-Infinity')`;
const outside = (column: string): string => `not ${column} >= '0001-01-01' or not ${column} < '10000-01-01'`;
/**
 * Postgres type → the condition under which a value has no place in the field's type, where BigQuery would round it, or
 * refuse it without naming the row. A row that holds one is refused by name.
 */
const refused: Record<string, (column: string, field: Field, declared?: string) => string> = {
  numeric: (column, field, declared) => {
    if (declared && declared !== "numeric") return `${column} = 'NaN'`; // fits() has compared what it is declared as
    const [digits, decimals] = numericSize(field);
    return `not abs(${column}) < 1e${digits - decimals} or ${column} <> round(${column}, ${decimals})`; // NaN is above every number
  },
  float4: special,
  float8: special,
  date: outside,
  time: (column) => `${column} = '24:00:00'`,
  timestamp: outside,
  timestamptz: outside,
  json: (column) => String.raw`${column}::text ~ '(^|[^\\])(\\\\)*\\u0000'`,
};

/** Digits in all and after the point that a NUMERIC or BIGNUMERIC field holds. */
function numericSize({ type, precision, scale }: Field): [number, number] {
  if (precision) return [Number(precision), Number(scale ?? 0)];
  return apiType(type) === "NUMERIC" ? [38, 9] : [76, 38];
}

/** BigQuery's API answers with the legacy names; a contract may use the SQL ones. */
const apiNames: Record<string, string> = { INT64: "INTEGER", FLOAT64: "FLOAT", BOOL: "BOOLEAN" };
const apiType = (type: string): string => apiNames[type.toUpperCase()] ?? type.toUpperCase();

/** The pipelines that have a contract. */
export function pipelines(): string[] {
  const files = readdirSync(join(root, "schemas/bigquery")).filter((file) => /^\w.*\.json$/.test(file));
  return files.sort().map((file) => file.replace(/\.json$/, ""));
}

/** The SELECT of sql/NAME.sql, such that it can stand in parentheses: psql needs the semicolon at its end. */
export function readSelect(pipeline: string): string {
  const file = join(root, `sql/${pipeline}.sql`);
  if (!existsSync(file))
    throw new UsageError(`sql/${pipeline}.sql is not there: it holds the SELECT that reads the source`);
  return `${readFileSync(file, "utf8").replace(/;(\s|--.*(\n|$))*$/, "")}\n`;
}

/** A column of the source table. */
interface TableColumn {
  relation: number;
  number: number;
  name: string;
  /** Postgres's name of the type, without modifiers, for example numeric. */
  type: string;
  notnull: boolean;
  /** As declared, for example numeric(12,2). */
  declared: string;
}

/** A column that the SELECT returns, and the table's column that it is, unless it is an expression. */
interface Column {
  name: string;
  type: string;
  of: TableColumn | undefined;
}

/**
 * Compares the source with the contract: the table and its cursor column, then what the SELECT returns. A column that the
 * contract does not know is a warning and a metric.
 * @returns the SELECT to copy: the contract's fields, each written as its BigQuery type reads it.
 * @throws UsageError naming column, expected and found, all of them at once.
 */
export async function checkSource(run: Run, contract: Contract, source: Source): Promise<string> {
  const { table, cursor, select } = source;
  const columns = await readColumns(run.source, table);
  const known = (name: string): boolean => contract.fields.some((field) => field.name === name);
  const { found, missing } = await describeSelect(run.source, select, columns, known);
  const faults: string[] = [];
  const fault = (column: string, expected: string, is: string): void =>
    void faults.push(`column ${table}.${column}: expected ${expected}, found ${is}`);
  for (const field of contract.fields) {
    const column = found.find(({ name }) => name === field.name);
    const expected = `${describeField(field)} (${contract.file})`;
    if (!column) fault(field.name, expected, "no such column");
    else if (!types[column.type]?.[apiType(field.type)])
      fault(field.name, expected, `${column.type}, which it cannot hold`);
    else if (!fits(column, field))
      fault(field.name, expected, `${column.of?.declared ?? column.type}, which it cannot hold`);
    else if (field.mode === "REQUIRED" && column.of?.notnull === false)
      fault(field.name, expected, "a nullable column");
  }
  for (const { name } of found) {
    if (!known(name)) fault(name, `no such field (${contract.file})`, "it in the SELECT");
  }
  const at = columns.find(({ name }) => name === cursor);
  if (at?.type !== "timestamptz") fault(cursor, "timestamptz, since it is the cursor", at?.type ?? "no such column");
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
    if (!faults.length) faults.push(`sql/${contract.pipeline}.sql: column "${missing}" does not exist`);
    throw new UsageError(schemaFaults(contract, "source", faults, unknown));
  }
  run.unknownColumns = unknown;
  if (unknown.length) {
    run.log("warning", {
      warning: `${table} has columns that are not in ${contract.file}, and are not synced`,
      columns: unknown.join(),
    });
  }
  return castSelect(contract, select, found);
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
    select attrelid as relation, attnum as number, attname as name, case typtype when 'e' then 'enum' else typname end as type, attnotnull as notnull, format_type(atttypid, atttypmod) as declared
    from pg_attribute join pg_type on pg_type.oid = atttypid
    where attrelid = ${relation.oid} and attnum > 0 and not attisdropped order by attnum`;
}

/** The columns that the SELECT returns, and which of the table's they are; or the one that it names and the table has not. */
async function describeSelect(
  source: Sql,
  select: string,
  columns: TableColumn[],
  known: (name: string) => boolean,
): Promise<{ found: Column[]; missing?: string }> {
  try {
    const described = await source.unsafe(select).describe();
    const names = await source<{ oid: number; name: string }[]>`
      select oid, case typtype when 'e' then 'enum' else typname end as name from pg_type where oid = any(${`{${described.columns.map(({ type }) => type).join()}}`}::text::oid[])`;
    const found = described.columns.map(({ name, type, table, number }) => ({
      name,
      type: names.find(({ oid }) => oid === type)?.name ?? `type ${type}`,
      of: columns.find((column) => column.relation === table && column.number === number),
    }));
    return { found };
  } catch (error) {
    const { code, message } = error as { code?: string; message: string };
    if (code !== "42703") throw error; // undefined_column
    // The other columns are still worth checking, as the table has them.
    const found = columns.filter(({ name }) => known(name)).map((of) => ({ name: of.name, type: of.type, of }));
    return { found, missing: /column "?(?:\w+\.)?(.*?)"? does not exist/.exec(message)?.[1] ?? message };
  }
}

/** Whether a NUMERIC field holds every value of the column, as declared; one declared without a size is looked at row by row. */
function fits({ type, of }: Column, field: Field): boolean {
  const declared = /^numeric\((\d+),(-?\d+)\)$/.exec(of?.declared ?? "");
  if (type !== "numeric" || !declared || apiType(field.type) === "STRING") return true;
  const [digits, decimals] = numericSize(field);
  return Number(declared[2]) <= decimals && Number(declared[1]) - Number(declared[2]) <= digits - decimals;
}

function castSelect(contract: Contract, select: string, found: Column[]): string {
  const key = contract.key.map((name) => `'${name}=' || ${quote(name)}`).join(" || ', ' || ");
  const columns = contract.fields.map((field) => {
    const from = found.find(({ name }) => name === field.name);
    const type = from?.type ?? "";
    const write = types[type]?.[apiType(field.type)] as (column: string) => string;
    const column = quote(field.name);
    const homeless = refused[type]?.(column, field, from?.of?.declared);
    if (!homeless || apiType(field.type) === "STRING") return `${write(column)} as ${column}`;
    const message = `'column ${field.name.replaceAll("'", "''")} of ${contract.pipeline}, row ' || ${key} || ': ' || ${column}::text`;
    return `${write(`(case when ${homeless} then ${raise(message, type)} else ${column} end)`)} as ${column}`;
  });
  return `select ${columns.join(", ")} from (${select}) source`;
}

/**
 * Compares the destination table's fields with the contract.
 * @throws UsageError naming column, expected and found, all of them at once.
 */
export function checkDestination(contract: Contract, table: string, actual: TableField[]): void {
  const faults: string[] = [];
  for (const field of contract.fields) {
    const there = actual.find(({ name }) => name === field.name);
    const expected = describeField(field);
    if (!there)
      faults.push(`column ${table}.${field.name}: expected ${expected} (${contract.file}), found no such column`);
    else if (describeField(there) !== expected) {
      faults.push(
        `column ${table}.${field.name}: expected ${expected} (${contract.file}), found ${describeField(there)}`,
      );
    }
  }
  for (const { name } of actual) {
    if (!contract.fields.some((field) => field.name === name))
      faults.push(`column ${table}.${name}: is there, but ${contract.file} has no such field`);
  }
  if (faults.length) throw new UsageError(schemaFaults(contract, "destination", faults, []));
}

/** A field as messages name it: type, size and mode, for example NUMERIC(12,2) NULLABLE. */
export function describeField({ type, mode, precision, scale }: TableField): string {
  const size = precision ? `(${precision}${scale ? `,${scale}` : ""})` : "";
  return `${apiType(type ?? "")}${size} ${(mode ?? "NULLABLE").toUpperCase()}`;
}

function schemaFaults(contract: Contract, side: string, faults: string[], unknown: string[]): string {
  const renamed = unknown.length
    ? `\n  not in the contract: ${unknown.join(", ")}${faults.some((fault) => fault.endsWith("no such column")) ? " (was a column renamed?)" : ""}`
    : "";
  const next =
    side === "source"
      ? `Bring the source, sql/${contract.pipeline}.sql and ${contract.file} together`
      : "For additions: make migrate. Anything else is yours to decide";
  return `the ${side} differs from the contract, nothing was moved:\n${faults.map((fault) => `  ${fault}`).join("\n")}${renamed}\n${next}; README, "When the schema changes".`;
}
