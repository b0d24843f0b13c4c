/**
 * The contract: schemas/bigquery/NAME.json, a BigQuery Table resource as the API takes it, with the table and cursor that sql/NAME.sql
 * reads as its `source`. Before a run moves a row, what that SELECT returns and what the destination has are compared with it.
 */
import { readFileSync } from "node:fs";
import { join } from "node:path";
import type { TableField, TableMetadata } from "@google-cloud/bigquery";
import { root, UsageError } from "../env.ts";
import { type Column, checkColumns, readSelect, type SchemaCheck, type Source } from "../source.ts";
import { apiType, type Field, unmappable } from "./types.ts";

export type Contract = ReturnType<typeof readContract>;

/** `file` is named in messages; `key` has the columns of the primary key; `resource` creates the table. */
export function readContract(pipeline: string) {
  const file = `schemas/bigquery/${pipeline}.json`;
  try {
    const { source, ...resource } = JSON.parse(readFileSync(join(root, file), "utf8"));
    const fields: Field[] = resource.schema.fields.map((field: TableField) => ({ mode: "NULLABLE", ...field }));
    const key: string[] = resource.tableConstraints.primaryKey.columns;
    const names = fields.map(({ name }) => name.toLowerCase());
    const odd = fields.find(({ name }, at) => !/^(?!etl__)\w+$/i.test(name) || names.indexOf(names[at] ?? "") < at);
    const rule = "a name holds letters, digits and _ only, does not begin with etl__, and comes once: BigQuery does not tell A from a";
    if (odd) throw new Error(`field ${JSON.stringify(odd.name)}: ${rule}`);
    const required = fields.flatMap(({ name, mode }) => (/^required$/i.test(mode) ? name : []));
    const nullable = key.find((name) => !required.includes(name));
    // A MERGE finds no row by a NULL: each run would insert it again.
    if (nullable !== undefined) throw new Error(`field ${nullable} is part of the primary key: set its mode to REQUIRED`);
    if (!source?.table || !fields.some(({ name }) => name === source.cursor))
      throw new Error("source needs table, such as public.orders, and cursor, one of the fields");
    const from: Source = { ...source, key, select: readSelect(pipeline) };
    return { pipeline, file, source: from, fields, key, resource: resource as TableMetadata };
  } catch (error) {
    const form = "a BigQuery Table resource with schema.fields and tableConstraints.primaryKey";
    throw new UsageError(`${file} must be ${form}: ${(error as Error).message}`);
  }
}

/** Compares the source with the contract: see checkColumns. @returns the columns that the SELECT returns. @throws UsageError. */
export function checkSource(run: SchemaCheck, { fields, file, source }: Contract): Promise<Column[]> {
  const wanted = fields.map((field) => ({
    name: field.name,
    expected: describeField(field),
    differs: (column: Column) => unmappable(column, field),
  }));
  return checkColumns(run, file, source, wanted);
}

/** The columns that contract and table do not have alike, as describeField names them; "" where there is none. @param name of the table. */
export function differingColumns({ fields, file }: Contract, name: string, { schema }: TableMetadata) {
  const described = (list: TableField[] = []) => new Map(list.map((field) => [field.name ?? "", describeField(field)]));
  const [wanted, there] = [described(fields), described(schema?.fields)];
  return [...new Set([...wanted.keys(), ...there.keys()])].flatMap((column) => {
    const [expected = "", found = ""] = [wanted.get(column), there.get(column)];
    const fault = `column ${name}.${column}: expected ${expected || "no such field"} (${file}), found ${found || "no such column"}`;
    return expected === found ? [] : [{ column, expected, found, fault }];
  });
}

/** What else a table can be, or have set, that loses rows or lets no upsert pass, each with what to do. @param hidden: by a policy. */
export function optionFaults(name: string, { type = "TABLE", expirationTime, ...table }: TableMetadata, hidden = false): string[] {
  const reset = (option: string): string => `Run in BigQuery: ALTER TABLE ${name} SET OPTIONS (${option})`;
  const at = new Date(Number(expirationTime ?? 0)).toISOString();
  const faults: [found: unknown, fault: string][] = [
    [type !== "TABLE", `expected a table, found a ${type}. Drop or rename it, then: make migrate`],
    [expirationTime, `expires at ${at}, with all its rows. ${reset("expiration_timestamp = NULL")}`],
    [table.timePartitioning?.expirationMs, `each partition expires, with its rows. ${reset("partition_expiration_days = NULL")}`],
    [table.requirePartitionFilter, `requires a partition filter, and an upsert has none. ${reset("require_partition_filter = FALSE")}`],
    [hidden, `a row access policy hides rows from an upsert. Run in BigQuery: DROP ALL ROW ACCESS POLICIES ON ${name}`],
  ];
  return faults.flatMap(([found, fault]) => (found ? `table ${name}: ${fault}` : []));
}

/** A field as messages name it: type, size and mode, for example NUMERIC(12,2) NULLABLE. */
function describeField({ type, mode, precision, scale }: TableField): string {
  const size = precision ? `(${precision}${scale ? `,${scale}` : ""})` : "";
  return `${apiType(type ?? "")}${size} ${(mode ?? "NULLABLE").toUpperCase()}`;
}
