/**
 * The contract: schemas/bigquery/NAME.json, a BigQuery Table resource as the API takes it, with the table and the cursor that
 * sql/NAME.sql reads as its `source`. Before a run moves a row, what that SELECT returns and what the destination has are compared with
 * it.
 */
import { readFileSync } from "node:fs";
import { join } from "node:path";
import type { TableField, TableMetadata } from "@google-cloud/bigquery";
import { root, UsageError } from "../env.ts";
import { checkColumns, driftError, readSelect, type SchemaCheck, type Source } from "../source.ts";
import { apiType, type Field, jsonLines, unmappable } from "./types.ts";

export interface Contract {
  pipeline: string;
  /** File name from the project's root, for messages. */
  file: string;
  source: Source;
  fields: Field[];
  /** Columns of the primary key. */
  key: string[];
  /** The Table resource, for creating the table. */
  resource: TableMetadata;
}

export function readContract(pipeline: string): Contract {
  const file = `schemas/bigquery/${pipeline}.json`;
  try {
    const { source, ...resource } = JSON.parse(readFileSync(join(root, file), "utf8"));
    const fields: Field[] = resource.schema.fields.map((field: TableField) => ({ mode: "NULLABLE", ...field }));
    const key: string[] = resource.tableConstraints.primaryKey.columns;
    const odd = [...fields.map(({ name }) => name), ...key].find((name) => !/^[A-Za-z_]\w*$/.test(name));
    if (odd !== undefined) throw new Error(`${JSON.stringify(odd)} may hold letters, digits and _ only`);
    const twice = fields.find(({ name }, at) => fields.slice(0, at).some((other) => sameName(other.name, name)));
    if (twice) throw new Error(`field ${twice.name} exists twice: BigQuery's names do not tell A from a`);
    const required = (name: string) => fields.some((field) => field.name === name && /^required$/i.test(field.mode));
    // A MERGE finds no row by a NULL: each run would insert it again.
    const nullable = key.find((name) => !required(name));
    if (nullable !== undefined)
      throw new Error(`field ${nullable} is part of the primary key: set its mode to REQUIRED`);
    if (!/^\w+\.\w+$/.test(source?.table)) throw new Error("source.table must be SCHEMA.TABLE, such as public.orders");
    if (!fields.some(({ name }) => name === source.cursor)) throw new Error("source.cursor must be one of the fields");
    return { pipeline, file, source: { ...source, key, select: readSelect(pipeline) }, fields, key, resource };
  } catch (error) {
    if (error instanceof UsageError) throw error;
    const form = "a BigQuery Table resource with schema.fields and tableConstraints.primaryKey";
    throw new UsageError(`${file} must be ${form}: ${(error as Error).message}`);
  }
}

const sameName = (a: string, b: string): boolean => a.toLowerCase() === b.toLowerCase();

/** A SELECT of JSON lines, as a function of the SELECT whose rows it writes, and of the fields, by default all. */
export type JsonSelect = (select: string, fields?: Field[]) => string;

/**
 * Compares the source with the contract: the table and its cursor column, then what the SELECT returns. A column that the contract does
 * not know is a warning and a metric.
 * @returns the SELECT around another of JSON lines with the contract's fields, each written as its BigQuery type reads it.
 * @throws UsageError naming column, expected and found, all of them at once.
 */
export async function checkSource(run: SchemaCheck, contract: Contract): Promise<JsonSelect> {
  const { pipeline, fields, key, file, source } = contract;
  const wanted = fields.map((field) => ({
    name: field.name,
    expected: describeField(field),
    differs: (column: Parameters<typeof unmappable>[0]) => unmappable(column, field),
  }));
  const columns = await checkColumns(run, file, source, wanted);
  return (select, some = fields) => jsonLines(pipeline, some, key, select, columns);
}

/**
 * Compares the destination table's fields with the contract.
 * @throws UsageError naming column, expected and found, all of them at once.
 */
export function checkDestination({ fields, file }: Contract, table: string, actual: TableField[]): void {
  const faults = fields.flatMap((field) => {
    const column = actual.find(({ name }) => name === field.name);
    const [expected, found] = [describeField(field), column ? describeField(column) : "no such column"];
    return found === expected ? [] : [`column ${table}.${field.name}: expected ${expected} (${file}), found ${found}`];
  });
  for (const { name } of actual)
    if (!fields.some((field) => field.name === name))
      faults.push(`column ${table}.${name}: exists, but ${file} has no such field`);
  if (faults.length)
    throw driftError("destination", faults, "For additions: make migrate. Anything else is your decision");
}

/** A field as messages name it: type, size and mode, for example NUMERIC(12,2) NULLABLE. */
export function describeField({ type, mode, precision, scale }: TableField): string {
  const size = precision ? `(${precision}${scale ? `,${scale}` : ""})` : "";
  return `${apiType(type ?? "")}${size} ${(mode ?? "NULLABLE").toUpperCase()}`;
}
