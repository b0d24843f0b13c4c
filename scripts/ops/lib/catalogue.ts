/** The checks of sql/doctor.sql, which make doctor prints, make connector requires, and make new-pipeline takes its SQL from. */
import type { Sql } from "postgres";
import { queryWith, type Settings } from "../../../shared/session.ts";
import { readSelect } from "../../../shared/source.ts";

/** `remedy`: what to do where it is not ok, else what is worth knowing. */
export interface CatalogueCheck {
  check: string;
  ok: boolean;
  remedy: string | null;
}

/** @param part whose role asks. @param settings that the part reads. */
export const askCatalogue = (sql: Sql, part: "source" | "metadata" | "replication", settings: Settings = {}): Promise<CatalogueCheck[]> =>
  queryWith(sql, { "etl.part": part, ...settings }, readSelect("doctor"));
