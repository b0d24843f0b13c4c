/**
 * Whether the source went back: it was restored from an older backup, by a copy of its files or by a database made anew, in
 * which case system identifier and timeline, which the watermark remembers (shared/watermark.ts), may still be the same.
 */
import type { Sql } from "postgres";

/** Where the source's history is. */
export interface Position {
  /** System identifier and timeline: positions of two servers cannot be compared. */
  server: string;
  /** Its oid: a database that was dropped and made anew has another. */
  database: string;
  /** The WAL that is on disk, so that a crash does not take it back. */
  wal: string;
  name: string;
}

/** Undefined where the server does not tell: a standby, or a service that hides its WAL. */
export async function readPosition(source: Sql): Promise<Position | undefined> {
  const rows = source<Position[]>`
    select (select system_identifier from pg_control_system()) || '/' || left(pg_walfile_name(pg_current_wal_lsn()), 8) as server,
      oid::text as database, pg_current_wal_flush_lsn()::text as wal, datname as name
    from pg_database where datname = current_database() and not pg_is_in_recovery()`;
  const [position] = await rows.catch((error: { code?: string }) => {
    if (["0A000", "55000", "42501"].includes(error.code ?? "")) return [];
    throw error;
  });
  return position;
}

/**
 * Compares the source with where the pipeline's last run found it. A rewind in between has taken over what is there now.
 * @returns in what it went back, in words with the next command, or undefined.
 */
export async function wentBack(etl: Sql, pipeline: string, now: Position): Promise<string | undefined> {
  const [before] = await etl<{ run: string; server: string; database: string; wal: string; back: boolean }[]>`
    select run_id as run, source_server as server, source_database as database, source_wal::text as wal, source_wal > ${now.wal}::text::pg_lsn as back
    from etl.runs where pipeline = ${pipeline} and (state = 'rewound' or source_wal is not null)
    order by started_at desc limit 1`;
  if (before?.server !== now.server) return undefined;
  const other = before.database !== now.database;
  if (!other && !before.back) return undefined;
  const what = other
    ? `is another one than run ${before.run} read (its oid is ${now.database}, and was ${before.database})`
    : `is behind what run ${before.run} read (its WAL ends at ${now.wal}, and was at ${before.wal})`;
  return `source database ${now.name} ${what}: it was restored from an older backup, rows that were synced since may be gone there, and the watermark is ahead of it. Next: ops/runbook.md, "After a restore, a failover or a clock set back", with make rewind PIPELINE=${pipeline} TO=…`;
}
