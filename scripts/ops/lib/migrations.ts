/** Applies numbered files of SQL to Postgres or ClickHouse. One at a time: the caller holds a lock, or is alone with the database. */
import type { ClickHouseClient } from "@clickhouse/client";
import type { Sql } from "postgres";
import { type Applied, pendingMigrations } from "../../../shared/migrations.ts";
import { appliedMigrations } from "../../../shared/sensors/clickhouse.ts";

/** Says what is to be done, and does it unless this is a dry run. */
export type Step = (what: string, work: () => Promise<unknown>) => Promise<void>;
const silently: Step = async (_, work) => void (await work());

/** The record of sql/etl. */
export async function appliedInPostgres(etl: Sql): Promise<Applied[]> {
  const [table] = await etl`select to_regclass('etl.migrations') as oid`;
  if (!table?.oid) return [];
  return await etl<Applied[]>`select file, sha256, date_trunc('second', applied_at)::text as at from etl.migrations`;
}

/** Applies sql/etl: a file and its record are one transaction. */
export async function migratePostgres(etl: Sql, step: Step = silently): Promise<void> {
  for (const { folder, file, sql, sha256 } of pendingMigrations("sql/etl", await appliedInPostgres(etl)))
    await step(`${folder}/${file}`, () =>
      etl.begin(async (transaction) => {
        await transaction`create table if not exists etl.migrations (
          file text primary key, sha256 text not null, applied_at timestamptz not null default now())`;
        await transaction.unsafe(sql);
        await transaction`insert into etl.migrations (file, sha256) values (${file}, ${sha256})`;
      }),
    );
}

/** A statement ends with a semicolon at the end of a line. */
export const statementsOf = (sql: string): string[] => sql.split(/;[ \t]*$/m).filter((statement) => /^\w/m.test(statement));

/** Applies schemas/clickhouse, without transactions: a file that was killed halfway is applied again, and its statements allow that. */
export async function migrateClickHouse(client: ClickHouseClient, step = silently): Promise<void> {
  const record = `CREATE TABLE IF NOT EXISTS etl_migrations
    (file String, sha256 String, applied_at DateTime('UTC') DEFAULT now()) ENGINE = MergeTree ORDER BY file`;
  for (const { folder, file, sql, sha256 } of pendingMigrations("schemas/clickhouse", await appliedMigrations(client)))
    await step(`${folder}/${file}`, async () => {
      for (const query of [record, ...statementsOf(sql)]) await client.command({ query });
      await client.insert({ table: "etl_migrations", values: [{ file, sha256 }], format: "JSONEachRow" });
    });
}
