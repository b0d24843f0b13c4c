/** What Postgres's catalogue says: the checks of sql/doctor.sql; a table of the source, and the fields that it becomes. */
import type { Sql } from "postgres";
import { type Field, mapped, unmappable } from "../../../shared/bigquery/types.ts";
import { UsageError } from "../../../shared/env.ts";
import { queryFile, type Settings } from "../../../shared/session.ts";
import type { Column } from "../../../shared/source.ts";

/** `remedy`: what to do where it is not ok, else what is worth knowing. */
export type CatalogueCheck = { check: string; ok: boolean; remedy: string | null };

/** @param part whose role asks. @param settings that the part reads. */
export const askCatalogue = (sql: Sql, part: "source" | "metadata" | "replication", settings: Settings = {}): Promise<CatalogueCheck[]> =>
  queryFile(sql, "doctor", { "etl.part": part, ...settings });

/** `field`: the one that holds every value of the column, if there is one. */
type SourceColumn = Column & { ident: string; declaration: string; mode: string; comment: string | null; field?: Field | undefined };

/** A row of sql/table.sql, which says what each is. */
export type SourceTable = Record<"path" | "created", string> &
  Record<"faults" | "grants" | "key", string[]> & { comment: string | null; columns: SourceColumn[] };

/** @throws UsageError where there is no such table. */
export async function readTable(source: Sql, table: string, cursor = "", key = ""): Promise<SourceTable> {
  const settings = { "etl.source": table, "etl.cursor": cursor, "etl.key": key };
  const [found] = await queryFile<SourceTable>(source, "table", settings);
  if (found) return { ...found, columns: found.columns.map((column) => ({ ...column, field: fieldOf(column) })) };
  throw new UsageError(`the source has no table ${table}. Is SOURCE_DATABASE_URL the right database? Next: make doctor`);
}

function fieldOf(column: SourceColumn): Field | undefined {
  const { name, mode, comment } = column;
  const types = mapped(column.type).flatMap(([, to]) => to.split(" "));
  const fields = types.map((type): Field => ({ name, type, mode, ...(comment && { description: comment }) }));
  return fields.find((field) => /^[A-Za-z_]\w*$/.test(name) && !unmappable(column, field));
}

/** Of a column without a field: why, and how it is synced all the same. @param file the contract. */
export const unfitness = ({ ident, name, declared }: SourceColumn, file: string): string =>
  `since no field has such a name and type, ${declared}. To sync it: ${ident}::text as ${name.replaceAll(/\W/g, "_")}, a STRING in ${file}`;

/** An object of a contract's file, on one line. */
export const inLine = (part: object): string => JSON.stringify(part, null, 1).replaceAll(/\n\s*/g, " ");
