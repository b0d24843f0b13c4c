/**
 * The contract: schemas/bigquery/NAME.json, a BigQuery Table resource as the API takes it. Before a run moves a row, what
 * the extraction SELECT really returns and what the destination really has are compared with it.
 */
import { readdirSync, readFileSync } from "node:fs";
import { join } from "node:path";
import type { TableField, TableMetadata } from "@google-cloud/bigquery";
import type { Sql } from "postgres";
import { root, UsageError } from "./env.ts";
import { quote, raise } from "./postgres.ts";
import type { Run } from "./run.ts";
import type { Source } from "./watermark.ts";

export interface Field extends TableField {
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
  const resource = JSON.parse(readFileSync(join(root, file), "utf8"));
  const fields = resource.schema.fields.map((field: TableField) => ({ mode: "NULLABLE", ...field }));
  return { pipeline, file, fields, key: resource.tableConstraints.primaryKey.columns, resource };
}

/**
 * Postgres type → the BigQuery types that hold every value of it → how the value is written into a JSON line.
 * INT64 and NUMERIC go as text, since a JSON number is exact only to 2^53; json goes through jsonb, since a json value may
 * hold raw newlines; jsonb's null becomes NULL in a JSON field, and stays 'null' in a STRING field.
 */
const asText = (column: string): string => `${column}::text`;
const asIs = (column: string): string => column;
const asBase64 = (column: string): string => `translate(encode(${column}, 'base64'), E'\n', '')`;
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
  date: { DATE: asText },
  time: { TIME: asText },
  timestamp: { DATETIME: asIs },
  timestamptz: { TIMESTAMP: asIs },
  json: { JSON: (column) => `${column}::jsonb`, STRING: asText },
  jsonb: { JSON: asIs, STRING: asText },
  bytea: { BYTES: asBase64 },
};

/** Types whose special values have no place in the BigQuery type; a row that holds one is refused by name. */
const refused: Record<string, string[]> = {
  numeric: ["NaN", "Infinity", "-Infinity"],
  float4: ["NaN", "Infinity", "-Infinity"],
  float8: ["NaN", "Infinity", "-Infinity"],
  date: ["infinity", "-infinity"],
  timestamp: ["infinity", "-infinity"],
  timestamptz: ["infinity", "-infinity"],
};

/** BigQuery's API answers with the legacy names; a contract may use the SQL ones. */
const apiNames: Record<string, string> = { INT64: "INTEGER", FLOAT64: "FLOAT", BOOL: "BOOLEAN" };
const apiType = (type: string): string => apiNames[type.toUpperCase()] ?? type.toUpperCase();

/** The pipelines that have a contract. */
export function pipelines(): string[] {
  const files = readdirSync(join(root, "schemas/bigquery")).sort();
  return files.map((file) => file.replace(/\.json$/, ""));
}

/** The SELECT of sql/NAME.sql. */
export function readSelect(pipeline: string): string {
  return readFileSync(join(root, `sql/${pipeline}.sql`), "utf8");
}

/**
 * Compares the source with the contract: the table and its cursor column, then what the SELECT returns. A column that the
 * contract does not know is a warning and a metric.
 * @returns the SELECT to copy: the contract's fields, each written as its BigQuery type reads it.
 * @throws UsageError naming column, expected and found, all of them at once.
 */
export async function checkSource(run: Run, contract: Contract, { table, cursor, select }: Source): Promise<string> {
  const { source } = run;
  const faults: string[] = [];
  const [relation] = await source<{ oid: number | null; rls: boolean; readable: boolean }[]>`
    select to_regclass(${table})::oid as oid, row_security_active(to_regclass(${table})::oid) as rls,
           has_table_privilege(to_regclass(${table})::oid, 'select') as readable`;
  if (!relation?.oid)
    throw new UsageError(
      `source table ${table}: there is no such table, or it may not be seen. Is SOURCE_DATABASE_URL the right database?`,
    );
  if (relation.rls) {
    throw new UsageError(
      `source table ${table}: row-level security would hide rows from this role. Run as a superuser: alter role … bypassrls; or alter table ${table} disable row level security;`,
    );
  }
  const columns = await source<{ name: string; notnull: boolean; type: string }[]>`
    select attname as name, attnotnull as notnull, format_type(atttypid, atttypmod) as type
    from pg_attribute where attrelid = ${relation.oid} and attnum > 0 and not attisdropped order by attnum`;
  const unknown = columns
    .filter(({ name }) => !contract.fields.some((field) => field.name === name))
    .map(({ name }) => name);
  const named = new Map(columns.map((column) => [column.name, column]));

  const found = await describe(source, table, select, named, contract, unknown);
  for (const field of contract.fields) {
    const type = found.get(field.name);
    const writable = type && types[type]?.[apiType(field.type)];
    if (!type)
      faults.push(
        `column ${table}.${field.name}: expected ${field.type} (${contract.file}), found no such column in the SELECT`,
      );
    else if (!writable)
      faults.push(
        `column ${table}.${field.name}: expected ${field.type} (${contract.file}), found ${type}, which it cannot hold`,
      );
    else if (field.mode === "REQUIRED" && named.get(field.name)?.notnull === false) {
      faults.push(
        `column ${table}.${field.name}: expected NOT NULL (mode REQUIRED in ${contract.file}), found a nullable column`,
      );
    }
  }
  for (const name of found.keys()) {
    if (!contract.fields.some((field) => field.name === name)) {
      faults.push(`column ${table}.${name}: the SELECT returns it, but ${contract.file} has no such field`);
    }
  }
  const cursorColumn = named.get(cursor);
  if (cursorColumn && cursorColumn.type !== "timestamp with time zone") {
    faults.push(`cursor column ${table}.${cursor}: expected timestamp with time zone, found ${cursorColumn.type}`);
  } else if (cursorColumn && !cursorColumn.notnull) {
    faults.push(
      `cursor column ${table}.${cursor}: expected NOT NULL, found a nullable column; a row without it would never be read. Run: alter table ${table} alter ${cursor} set not null;`,
    );
  } else if (cursorColumn) {
    const infinite = await source.unsafe(`select from ${table} where "${cursor}" in ('infinity', '-infinity') limit 1`);
    if (infinite.count)
      faults.push(
        `cursor column ${table}.${cursor}: holds infinity or -infinity in at least one row, which no window ends after. Give those rows a time.`,
      );
  }
  if (faults.length) throw new UsageError(schemaFaults(contract, "source", faults, unknown));
  run.unknownColumns = unknown;
  if (unknown.length) {
    run.log("warning", {
      warning: `${table} has columns that are not in ${contract.file}, and are not synced`,
      columns: unknown.join(),
    });
  }
  return castSelect(contract, select, found);
}

/** Name → Postgres type of the columns that the SELECT returns. */
async function describe(
  source: Sql,
  table: string,
  select: string,
  named: Map<string, unknown>,
  contract: Contract,
  unknown: string[],
): Promise<Map<string, string>> {
  try {
    const { columns } = await source.unsafe(select).describe();
    const oids = columns.map((column) => column.type);
    const names = await source<{ oid: number; name: string }[]>`
      select oid, typname as name from pg_type where oid = any(${`{${oids.join()}}`}::text::oid[])`;
    const byOid = new Map(names.map(({ oid, name }) => [oid, name]));
    return new Map(columns.map((column) => [column.name, byOid.get(column.type) ?? `type ${column.type}`]));
  } catch (error) {
    const { code, message } = error as { code?: string; message: string };
    if (code !== "42703") throw error; // undefined_column
    const missing = contract.fields.filter((field) => !named.has(field.name));
    const faults = missing.map(
      (field) => `column ${table}.${field.name}: expected ${field.type} (${contract.file}), found no such column`,
    );
    throw new UsageError(
      schemaFaults(contract, "source", faults.length ? faults : [`sql/${contract.pipeline}.sql: ${message}`], unknown),
    );
  }
}

function castSelect(contract: Contract, select: string, found: Map<string, string>): string {
  const key = contract.key.map((name) => `'${name}=' || ${quote(name)}`).join(" || ', ' || ");
  const columns = contract.fields.map((field) => {
    const type = found.get(field.name) as string;
    const write = types[type]?.[apiType(field.type)] as (column: string) => string;
    const column = quote(field.name);
    const values = refused[type]?.map((value) => `'${value}'`).join(", ");
    if (!values || apiType(field.type) === "STRING") return `${write(column)} as ${column}`;
    const message = `'column ${field.name.replaceAll("'", "''")} of ${contract.pipeline}, row ' || ${key} || ': ' || ${column}::text`;
    return `${write(`(case when ${column} in (${values}) then ${raise(message, type)} else ${column} end)`)} as ${column}`;
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

function describeField({ type, mode, precision, scale }: TableField): string {
  const size = precision ? `(${precision}${scale ? `,${scale}` : ""})` : "";
  return `${apiType(type ?? "")}${size} ${(mode ?? "NULLABLE").toUpperCase()}`;
}

function schemaFaults(contract: Contract, side: string, faults: string[], unknown: string[]): string {
  const renamed = unknown.length ? `\n  not in the contract: ${unknown.join(", ")} (was a column renamed?)` : "";
  const next =
    side === "source"
      ? `Bring the source, sql/${contract.pipeline}.sql and ${contract.file} together`
      : "For additions: make migrate. Anything else is yours to decide";
  return `the ${side} differs from the contract, nothing was moved:\n${faults.map((fault) => `  ${fault}`).join("\n")}${renamed}\n${next}; README, "When the schema changes".`;
}
