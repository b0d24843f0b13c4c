/**
 * Numbered files of SQL (sql/etl, schemas/clickhouse), each applied once, in the order of its number, and recorded by name and checksum
 * where its objects are.
 */
import { hash } from "node:crypto";
import { readdirSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { root, UsageError } from "./env.ts";

/** A file as it was recorded. `at`: when, for messages. */
export type Applied = Record<"file" | "sha256" | "at", string>;

/** The files of a folder, "sql/etl", in the order of their numbers. @throws UsageError for a name without one. */
export function readMigrations(folder: string) {
  const files = readdirSync(join(root, folder)).filter((file) => /^[^.].*\.sql$/.test(file));
  return files.sort().map((file) => {
    if (!/^\d{3}_\w+\.sql$/.test(file)) throw new UsageError(`${folder}/${file} must be named NNN_NAME.sql, as 010_quality.sql`);
    const sql = readFileSync(join(root, folder, file), "utf8");
    return { folder, file, sql, sha256: hash("sha256", sql) };
  });
}

/** The files that are not applied yet. @throws UsageError for one that was edited after it was applied. */
export function pendingMigrations(folder: string, applied: Applied[]) {
  return readMigrations(folder).filter(({ file, sha256 }) => {
    const before = applied.find((one) => one.file === file);
    const edited = `${folder}/${file} was applied at ${before?.at} and has been edited since. Run: git checkout ${folder}/${file}`;
    if (before && before.sha256 !== sha256) throw new UsageError(`${edited}, and put the change into a new file with the next number`);
    return !before;
  });
}
