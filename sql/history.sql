-- What tells one history of a server from another: where it differs from what it was, a watermark may mean nothing.
-- shared/watermark.ts runs it after sql/safe_bound.sql; in psql: \i sql/history.sql
select
  -- System identifier and timeline. By the WAL's name: after a promotion the control file keeps the old timeline until the
  -- first checkpoint is done, which takes minutes.
  system_identifier || '/' || left(pg_walfile_name(pg_current_wal_lsn()), 8) as server,
  -- A number of 20 digits, so that two of them compare as text. The WAL that is on disk: a crash does not take that back.
  lpad((pg_current_wal_flush_lsn() - '0/0')::text, 20, '0') as wal
from pg_control_system();
