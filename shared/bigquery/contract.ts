/**
 * The contract: schemas/bigquery/NAME.json, a BigQuery Table resource as the API takes it. Before a run moves a row, what
 * the extraction SELECT really returns and what the destination really has are compared with it.
 */
import { readdirSync, readFileSync } from "node:fs";
import { join } from "node:path";
import type { TableField, TableMetadata } from "@google-cloud/bigquery";
import { root, UsageError } from "../env.ts";
import { type Column, type Comparing, compareSource, type Source, schemaFaults } from "../source.ts";
import { apiType, castSelect, type Field, misfit } from "./types.ts";

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

/** The pipelines that have a contract. */
export function pipelines(): string[] {
  const files = readdirSync(join(root, "schemas/bigquery")).filter((file) => /^\w.*\.json$/.test(file));
  const names = files.sort().map((file) => file.replace(/\.json$/, ""));
  const odd = names.find((name) => !/^[\w-]+$/.test(name));
  if (odd !== undefined)
    throw new UsageError(`schemas/bigquery: ${JSON.stringify(odd)} may hold letters, digits, _ and - only`);
  return names;
}

/** The pipelines that have a watermark. */
export const watermarked = (): string[] => [...pipelines(), "events"].sort();

/**
 * Compares the source with the contract: the table and its cursor column, then what the SELECT returns. A column that the
 * contract does not know is a warning and a metric.
 * @returns a SELECT of JSON lines with the contract's fields, each written as its BigQuery type reads it.
 * @throws UsageError naming column, expected and found, all of them at once.
 */
export async function checkSource(run: Comparing, contract: Contract, source: Source): Promise<string> {
  const { pipeline, fields, key } = contract;
  return castSelect(pipeline, fields, key, source.select, await sourceColumns(run, contract, source));
}

/** The columns that the SELECT returns, compared with the contract as checkSource does. */
export async function sourceColumns(run: Comparing, { file, fields }: Contract, source: Source): Promise<Column[]> {
  const expected = fields.map((field) => ({
    name: field.name,
    expected: describeField(field),
    differs: (column: Column) => misfit(column, field),
  }));
  return await compareSource(run, file, source, expected);
}

/**
 * Compares the destination table's fields with the contract.
 * @throws UsageError naming column, expected and found, all of them at once.
 */
export function checkDestination(contract: Contract, table: string, actual: TableField[]): void {
  const faults: string[] = [];
  for (const field of contract.fields) {
    const there = actual.find(({ name }) => name === field.name);
    const [expected, found] = [describeField(field), there ? describeField(there) : "no such column"];
    if (found !== expected)
      faults.push(`column ${table}.${field.name}: expected ${expected} (${contract.file}), found ${found}`);
  }
  for (const { name } of actual) {
    if (!contract.fields.some((field) => field.name === name))
      faults.push(`column ${table}.${name}: is there, but ${contract.file} has no such field`);
  }
  if (faults.length) throw new UsageError(schemaFaults(contract.pipeline, contract.file, "destination", faults, []));
}

/** A field as messages name it: type, size and mode, for example NUMERIC(12,2) NULLABLE. */
export function describeField({ type, mode, precision, scale }: TableField): string {
  const size = precision ? `(${precision}${scale ? `,${scale}` : ""})` : "";
  return `${apiType(type ?? "")}${size} ${(mode ?? "NULLABLE").toUpperCase()}`;
}
