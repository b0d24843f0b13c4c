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
  current_database() as database,
  -- Why no bound is safe, and what to do; null where one is.
  case
    when pg_is_in_recovery() then
      'it is a standby, and transactions open on its primary are not visible there. Point SOURCE_DATABASE_URL at the primary'
    -- Without pg_read_all_stats others' rows are there but empty, and the bound would silently be the clock alone.
    when not pg_has_role(current_user, 'pg_read_all_stats', 'usage') or exists (select from others where backend_type is null)
      then format('role %1$I may not see when other sessions'' transactions began. '
                  'Run as an administrator: grant pg_monitor to %1$I;', current_user)
    else (
      select format('pid %1$s, application "%2$s", role %3$s hides when its transaction began: track_activities is or was off, or it '
                    'writes over a replication connection. Run: alter role %3$I reset track_activities; then end that session: '
                    'select pg_terminate_backend(%1$s);', pid, application_name, usename)
      from pg_stat_activity
      where datname = current_database() and pid <> pg_backend_pid()
        and (state = 'disabled' and backend_type is distinct from 'walsender'
          -- track_activities was switched on in the middle of a transaction,
          or state like 'idle in transaction%' and xact_start is null and backend_type is distinct from 'walsender'
          -- or the transaction writes over a replication connection: it has an id, and no start.
          or state <> 'idle' and xact_start is null and backend_xid is not null and query_start < now() - interval '1 s')
      limit 1)
  end as refusal,
  coalesce(
    (select format('prepared transaction "%s" of role %s, prepared %s ago', gid, owner, to_char(now() - prepared, 'HH24:MI:SS'))
     from prepared),
    (select format('pid %s, application "%s", role %s, state %s, open for %s', pid, application_name, usename, state,
                   to_char(now() - xact_start, 'HH24:MI:SS'))
     from oldest where xact_start < now() - lag)) as holder,
  to_char(now() at time zone 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"+00"') as now,
  -- Of a prepared transaction only the time of PREPARE is known, not its start: nothing can be taken past the watermark.
  case when exists (select from prepared) then '-infinity'
    else to_char(least(now() - lag, (select xact_start from oldest)) at time zone 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"+00"')
  end as bound,
  greatest(0, extract(epoch from now() - lag
    - coalesce((select prepared from prepared), (select xact_start from oldest))))::float8 as hold_seconds,
  (select oid::text from pg_database where datname = current_database()) as database_oid
from settings;
