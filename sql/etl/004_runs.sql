-- by_hand: a part was asked for (FROM and TO, ONLY, a backfill); it says nothing of the schedule.
-- The others: where the source's history was when the run began. On the same server and timeline it never goes back, unless the
-- source was restored from an older backup: rows that were synced since are gone there then, and the watermark is ahead of it.
alter table etl.runs
  add column by_hand boolean not null default false,
  add column source_server text,
  add column source_database text,
  add column source_wal pg_lsn;
