/**
 * The contract: schemas/bigquery/NAME.json, a BigQuery Table resource as the API takes it. Before a run moves a row, what
 * the extraction SELECT really returns and what the destination really has are compared with it.
 */
import { readFileSync } from "node:fs";
import { join } from "node:path";
import type { TableField, TableMetadata } from "@google-cloud/bigquery";
import { root, UsageError } from "../env.ts";
import { type Column, checkColumns, differs, type SchemaCheck, type Source } from "../source.ts";
import { apiType, type Field, jsonLines, unmappable } from "./types.ts";

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
    const names: string[] = [...fields.map(({ name }: Field) => name), ...resource.tableConstraints.primaryKey.columns];
    const odd = names.find((name) => !/^[A-Za-z_]\w*$/.test(name));
    if (odd !== undefined) throw new Error(`${JSON.stringify(odd)} may hold letters, digits and _ only`);
    const { columns: key } = resource.tableConstraints.primaryKey;
    const required = fields
      .filter(({ mode }: Field) => mode.toUpperCase() === "REQUIRED")
      .map(({ name }: Field) => name);
    // A MERGE finds no row by a NULL: each run would insert it again.
    const nullable = key.find((name: string) => !required.includes(name));
    if (nullable !== undefined)
      throw new Error(`field ${nullable} is part of the primary key: set its mode to REQUIRED`);
    return { pipeline, file, fields, key, resource };
  } catch (error) {
    throw new UsageError(
      `${file} must be a BigQuery Table resource with schema.fields and tableConstraints.primaryKey: ${(error as Error).message}`,
    );
  }
}

/** A SELECT of JSON lines, as a function of the SELECT whose rows it writes, and of the fields, by default all. */
export type JsonSelect = (select: string, fields?: Field[]) => string;

/**
 * Compares the source with the contract: the table and its cursor column, then what the SELECT returns. A column that the
 * contract does not know is a warning and a metric.
 * @returns the SELECT around source.select of JSON lines with the contract's fields, each written as its BigQuery type reads it.
 * @throws UsageError naming column, expected and found, all of them at once.
 */
export async function checkSource(run: SchemaCheck, contract: Contract, source: Source): Promise<JsonSelect> {
  const { pipeline, fields, key, file } = contract;
  const wanted = fields.map((field) => ({
    name: field.name,
    expected: describeField(field),
    differs: (column: Column) => unmappable(column, field),
  }));
  const columns = await checkColumns(run, file, source, wanted);
  return (select, some = fields) => jsonLines(pipeline, some, key, select, columns);
}

/**
 * Compares the destination table's fields with the contract.
 * @throws UsageError naming column, expected and found, all of them at once.
 */
export function checkDestination(contract: Contract, table: string, actual: TableField[]): void {
  const { fields, file } = contract;
  const faults = fields.flatMap((field) => {
    const column = actual.find(({ name }) => name === field.name);
    const [expected, found] = [describeField(field), column ? describeField(column) : "no such column"];
    return found === expected ? [] : [`column ${table}.${field.name}: expected ${expected} (${file}), found ${found}`];
  });
  for (const { name } of actual)
    if (!fields.some((field) => field.name === name))
      faults.push(`column ${table}.${name}: exists, but ${file} has no such field`);
  if (faults.length)
    throw differs("destination", faults, "For additions: make migrate. Anything else is your decision");
}

/** A field as messages name it: type, size and mode, for example NUMERIC(12,2) NULLABLE. */
export function describeField({ type, mode, precision, scale }: TableField): string {
  const size = precision ? `(${precision}${scale ? `,${scale}` : ""})` : "";
  return `${apiType(type ?? "")}${size} ${(mode ?? "NULLABLE").toUpperCase()}`;
}
