/** What Postgres's catalogue says: the checks of sql/doctor.sql; a table of the source, and the fields and the file that it becomes. */
import type { Sql } from "postgres";
import { type Field, unmappable } from "../../../shared/bigquery/types.ts";
import { UsageError } from "../../../shared/env.ts";
import { queryWith, type Settings } from "../../../shared/session.ts";
import { type Column, readSelect } from "../../../shared/source.ts";

/** `remedy`: what to do where it is not ok, else what is worth knowing. */
export type CatalogueCheck = { check: string; ok: boolean; remedy: string | null };

/** @param part whose role asks. @param settings that the part reads. */
export const askCatalogue = (sql: Sql, part: "source" | "metadata" | "replication", settings: Settings = {}): Promise<CatalogueCheck[]> =>
  queryWith(sql, { "etl.part": part, ...settings }, readSelect("doctor"));

/** `field`: the one that holds every value of the column; or else `unfit`: why there is none. */
type SourceColumn = Column & { ident: string; comment: string | null; field?: Field; unfit?: string };

/** A row of sql/table.sql, which says what each is. */
export interface SourceTable extends Record<"faults" | "grants" | "key", string[]> {
  path: string;
  comment: string | null;
  columns: SourceColumn[];
}

/** @throws UsageError where there is no such table. */
export async function readTable(source: Sql, table: string, cursor = "", key = ""): Promise<SourceTable> {
  const settings = { "etl.source": table, "etl.cursor": cursor, "etl.key": key };
  const [found] = await queryWith<SourceTable>(source, settings, readSelect("table"));
  if (found) return { ...found, columns: found.columns.map((column) => ({ ...column, ...fieldOf(column) })) };
  throw new UsageError(`the source has no table ${table}. Is SOURCE_DATABASE_URL the right database? Next: make doctor`);
}

/** In the order in which they are tried. */
const types = "INTEGER NUMERIC BIGNUMERIC FLOAT BOOLEAN JSON DATE TIME DATETIME TIMESTAMP BYTES STRING".split(" ");

function fieldOf(column: SourceColumn): { field: Field } | { unfit: string } {
  const { name, array, notnull, comment } = column;
  if (!/^[A-Za-z_]\w*$/.test(name)) return { unfit: "a field's name holds letters, digits and _ only" };
  const mode = array ? "REPEATED" : notnull ? "REQUIRED" : "NULLABLE";
  const fields = types.map((type): Field => ({ name, type, mode, ...(comment && { description: comment }) }));
  const field = fields.find((one) => !unmappable(column, one));
  return field ? { field } : { unfit: `${column.declared} has no safe mapping` };
}

/** The column in the local stack's table, where an enum need not exist. */
export const declare = ({ ident, type, declared }: SourceColumn): string => `${ident} ${type === "enum" ? "text" : declared}`;

/** Of a column without a field: why, and how it is synced all the same. @param file the contract. */
export const unfitness = ({ unfit, ident, name }: SourceColumn, file: string): string =>
  `since ${unfit}. To sync it: ${ident}::text as ${name.replaceAll(/\W/g, "_")}, and a STRING in ${file}`;

/** A contract's file. What holds no other object is on one line, as each field. */
export function formatContract(contract: object): string {
  const inLine = (part: string): string => part.replaceAll(/(?<=\[)\n\s*|\n\s*(?=\])/g, "").replaceAll(/\n\s*/g, " ");
  return `${JSON.stringify(contract, null, 2).replaceAll(/\{[^{}]*\}/g, inLine)}\n`;
}
