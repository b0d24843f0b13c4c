/** Applies numbered files of SQL to Postgres or ClickHouse. One at a time: the caller holds a lock, or is alone with the database. */
import type { ClickHouseClient } from "@clickhouse/client";
import type { Sql } from "postgres";
import { type Applied, pendingMigrations } from "../../../shared/migrations.ts";
import { appliedMigrations } from "../../../shared/sensors/clickhouse.ts";

/** Says what is to be done, and does it unless this is a dry run. */
export type Step = (what: string, work: () => Promise<unknown>) => Promise<unknown>;
const silently: Step = (_, work) => work();

/** The record of sql/etl, which its first file makes. */
export async function appliedInPostgres(etl: Sql): Promise<Applied[]> {
  const [table] = await etl`select to_regclass('etl.migrations') as oid`;
  if (!table?.oid) return [];
  return await etl<Applied[]>`select file, sha256, date_trunc('second', applied_at)::text as at from etl.migrations`;
}

/** Applies sql/etl: a file and its record are one transaction. */
export async function migratePostgres(etl: Sql, step = silently): Promise<void> {
  for (const { folder, file, sql, sha256 } of pendingMigrations("sql/etl", await appliedInPostgres(etl)))
    await step(`${folder}/${file}`, () =>
      etl.begin(async (transaction) => {
        await transaction.unsafe(sql);
        await transaction`insert into etl.migrations (file, sha256) values (${file}, ${sha256})`;
      }),
    );
}

/** A statement ends with a semicolon at the end of a line. */
export const statementsOf = (sql: string): string[] => sql.split(/;[ \t]*$/m).filter((statement) => /^\w/m.test(statement));

/** Applies schemas/clickhouse, without transactions: a file that was killed halfway is applied again, and its statements allow that. */
export async function migrateClickHouse(client: ClickHouseClient, step = silently): Promise<void> {
  for (const { folder, file, sql, sha256 } of pendingMigrations("schemas/clickhouse", await appliedMigrations(client)))
    await step(`${folder}/${file}`, async () => {
      for (const query of statementsOf(sql)) await client.command({ query });
      await client.insert({ table: "etl_migrations", values: [{ file, sha256 }], format: "JSONEachRow" });
    });
}
