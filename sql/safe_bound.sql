-- The safe upper bound of a window: how far a watermark may go. shared/watermark.ts runs it before each run; in psql:
--   set etl.lag_seconds = '5'; \i sql/safe_bound.sql
--
-- A transaction that is still open may yet commit rows whose cursor is older than now; a watermark that had passed them
-- would lose them for ever. So the bound is least(now() - lag, the start of the oldest open transaction here). Open
-- transactions that have not written yet count too: they may write later with their early now().
--
-- It has to be a statement of its own, in autocommit, before the one that reads rows: then every transaction it does not
-- see has committed or begins later. now() is fixed before pg_stat_activity is scanned; clock_timestamp() would be read
-- after it, and lose rows. The lag covers the instant between a transaction's start and its being listed.
--
-- Left out: autovacuum workers and walsenders, which write no rows, and sessions of the reading role, if it may not.
with settings as (
  select
    make_interval(secs => current_setting('etl.lag_seconds')::float8) as lag,
    exists (
      select from pg_class
      where relkind in ('r', 'p', 'v', 'f') and relnamespace not in ('pg_catalog'::regnamespace, 'information_schema'::regnamespace)
        and has_any_column_privilege(session_user, oid, 'insert, update')
    ) as role_writes
), others as (
  select pid, application_name, usename, state, backend_type, xact_start
  from pg_stat_activity, settings
  where datname = current_database()
    and pid <> pg_backend_pid()
    and (role_writes or usename is distinct from session_user)
    and backend_type is distinct from 'autovacuum worker'
    and backend_type is distinct from 'walsender'
), oldest as (
  select * from others where xact_start is not null order by xact_start limit 1
), prepared as (
  select gid, owner, prepared from pg_prepared_xacts
  -- Without columns, so tested first: one that is prepared in between must be in the one or the other.
  where (select count(*) from others) >= 0
    and database = current_database() order by prepared limit 1
)
select
  current_user as role,
  current_database() as database,
  pg_is_in_recovery() as standby,
  -- Without pg_read_all_stats others' rows are there but empty, and the bound would silently be the clock alone.
  pg_has_role(current_user, 'pg_read_all_stats', 'usage')
    and not exists (select from others where backend_type is null) as sees_all,
  (select format('pid %s, application "%s", role %s', pid, application_name, usename)
   from pg_stat_activity
   where datname = current_database() and pid <> pg_backend_pid()
     and (state = 'disabled' and backend_type is distinct from 'walsender'
       -- track_activities was switched on in mid-transaction,
       or state like 'idle in transaction%' and xact_start is null and backend_type is distinct from 'walsender'
       -- or the transaction writes over a replication connection: it has an id, and no start.
       or state <> 'idle' and xact_start is null and backend_xid is not null and query_start < now() - interval '1 s')
   limit 1) as untracked,
  (select format('prepared transaction "%s" of role %s, prepared %s ago', gid, owner, to_char(now() - prepared, 'HH24:MI:SS'))
   from prepared) as prepared,
  (select format('pid %s, application "%s", role %s, state %s, open for %s', pid, application_name, usename, state,
                 to_char(now() - xact_start, 'HH24:MI:SS'))
   from oldest where xact_start < now() - lag) as holder,
  replace(now()::text, ' ', 'T') as now,
  replace(least(now() - lag, (select xact_start from oldest))::text, ' ', 'T') as bound,
  greatest(0, extract(epoch from now() - lag
    - coalesce((select prepared from prepared), (select xact_start from oldest))))::float8 as hold_seconds,
  (select system_identifier::text from pg_control_system()) as system_identifier,
  -- After a promotion the control file keeps the old timeline until the first checkpoint is done, which takes minutes.
  case when pg_is_in_recovery() then (select timeline_id from pg_control_checkpoint())
    else ('x' || left(pg_walfile_name(pg_current_wal_lsn()), 8))::bit(32)::int end as timeline
from settings;
