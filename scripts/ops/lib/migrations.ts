/**
 * Applies numbered files of SQL to Postgres or ClickHouse. One at a time: the caller holds a lock, or is alone with the database.
 */
import type { ClickHouseClient } from "@clickhouse/client";
import type { Sql } from "postgres";
import { type Applied, type Migration, pendingMigrations } from "../../../shared/migrations.ts";

/** Where files are applied and recorded. */
interface Target {
  applied(): Promise<Applied[]>;
  apply(migration: Migration): Promise<void>;
}
/** Says what is to be done, and does it unless this is a dry run. */
export type Step = (what: string, work: () => Promise<unknown>) => Promise<void>;

export async function applyMigrations(folder: string, target: Target, step: Step): Promise<void> {
  for (const migration of pendingMigrations(folder, await target.applied()))
    await step(`${folder}/${migration.file}`, () => target.apply(migration));
}

/** A file and its record are one transaction. */
export const inPostgres = (etl: Sql): Target => ({
  applied: async () => {
    const [table] = await etl`select to_regclass('etl.migrations') as oid`;
    if (!table?.oid) return [];
    return await etl<Applied[]>`select file, sha256, date_trunc('second', applied_at)::text as at from etl.migrations`;
  },
  apply: async ({ file, sql, sha256 }) => {
    await etl.begin(async (transaction) => {
      await transaction`create table if not exists etl.migrations (
        file text primary key, sha256 text not null, applied_at timestamptz not null default now())`;
      await transaction.unsafe(sql);
      await transaction`insert into etl.migrations (file, sha256) values (${file}, ${sha256})`;
    });
  },
});

/** A statement ends with a semicolon at the end of a line. */
export const statementsOf = (sql: string): string[] =>
  sql.split(/;[ \t]*$/m).filter((statement) => /^\w/m.test(statement));

/**
 * ClickHouse has no transactions for this: a file that was killed halfway is applied again, so each of its statements must allow that.
 * @param applied reads the record (appliedMigrations of shared/sensors/clickhouse.ts, which is loaded only where ClickHouse is used).
 */
export const inClickHouse = (client: ClickHouseClient, applied: Target["applied"]): Target => ({
  applied,
  apply: async ({ file, sql, sha256 }) => {
    await client.command({
      query: `CREATE TABLE IF NOT EXISTS etl_migrations (file String, sha256 String, applied_at DateTime('UTC') DEFAULT now())
        ENGINE = MergeTree ORDER BY file`,
    });
    for (const query of statementsOf(sql)) await client.command({ query });
    await client.insert({ table: "etl_migrations", values: [{ file, sha256 }], format: "JSONEachRow" });
  },
});
