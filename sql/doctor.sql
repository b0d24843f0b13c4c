-- What make doctor asks Postgres about roles, indexes, triggers, and what Debezium needs: a row a check; remedy is what to do where it is
-- not ok, else what is worth knowing. It reads the catalogue only. etl.part is the URL whose role asks: source, metadata, or replication:
-- make connector asks that too, with etl.slot, and etl.resumes = '1' where Connect knows how far it was. In psql:
--   set etl.part = 'source'; set etl.tables = 'orders:public.orders:updated_at events:public.events:created_at'; \i sql/doctor.sql
with tables as (
  -- By the names in the catalogue: make new-pipeline asks before the role may use the schema.
  select split_part(one, ':', 1) as name, split_part(one, ':', 2) as path, split_part(one, ':', 3) as cursor, c.oid as relation,
    format('%I.%I', nspname, relname || '_set_' || split_part(one, ':', 3)) as function
  from unnest(string_to_array(current_setting('etl.tables', true), ' ')) as one
  join (pg_class c join pg_namespace n on n.oid = relnamespace)
    on split_part(one, ':', 2) in (nspname || '.' || relname, format('%I.%I', nspname, relname))
  where relkind in ('r', 'p') -- no other has an index or a trigger; the run says what it is
), relations as (
  select oid, relkind, relnamespace, oid::regclass::text as name from pg_class
  where relnamespace not in (select oid from pg_namespace where nspname ~ '^pg_' or nspname = 'information_schema')
), powers as (
  -- The safe bound does not wait for the reading role's sessions, which is right only while the role can write nothing.
  select array(
    select 'attribute ' || power from pg_roles, unnest(
      array[rolsuper, rolcreaterole, rolcreatedb, rolreplication, rolbypassrls],
      array['superuser', 'createrole', 'createdb', 'replication', 'bypassrls']) p (has, power)
    where rolname = current_user and has
    union all
    select 'member of ' || rolname from pg_roles
    where not exists (select from pg_roles where rolname = current_user and rolsuper) and pg_has_role(current_user, oid, 'member')
      and rolname not in (current_user, 'pg_monitor', 'pg_read_all_data', 'pg_read_all_settings', 'pg_read_all_stats',
        'pg_stat_scan_tables')
    union all
    select privilege || ' on ' || name from relations, unnest(array['insert', 'update', 'delete', 'truncate']) privilege
    where relkind in ('r', 'p', 'v', 'f') and (has_table_privilege(oid, privilege)
      or privilege in ('insert', 'update') and has_any_column_privilege(oid, privilege))
    union all
    select 'usage of sequence ' || name from relations where case when relkind = 'S' then has_sequence_privilege(oid, 'usage, update') end
    union all
    select 'create in schema ' || nspname from pg_namespace where has_schema_privilege(oid, 'create') and nspname !~ '^pg_'
    union all
    select 'create in database ' || datname from pg_database where datname = current_database() and has_database_privilege(oid, 'create')
  ) as list
), hidden as (
  -- safe_bound.sql refuses while a session without track_activities exists; these would begin without it.
  select string_agg(who || ' reset track_activities;', ' ') as statements from (
    select case when setrole = 0 then format('alter database %I', datname)
                else format('alter role %I', rolname) || coalesce(format(' in database %I', datname), '') end as who
    from pg_db_role_setting left join pg_roles r on r.oid = setrole left join pg_database d on d.oid = setdatabase
    where 'track_activities=off' = any(setconfig) and (setdatabase = 0 or datname = current_database())) off
), indexes as (
  -- Without an index that begins with the cursor, each chunk reads the whole table.
  select distinct on (name) name, indisvalid as valid, indexrelid::regclass::text as index
  from tables join pg_index on indrelid = relation join pg_attribute on attrelid = indrelid and attnum = indkey[0] and attname = cursor
  join pg_class i on i.oid = indexrelid join pg_am on pg_am.oid = i.relam and amname = 'btree'
  where indpred is null order by name, indisvalid desc
), triggers as (
  -- A row that an application dates itself can be older than the watermark, and lost; so can one that has a rounded time. What a trigger's
  -- function does cannot be known; that it names the column can. tgtype's bits, of pg_trigger.h: 1 row, 2 before, 4 insert, 16 update.
  select name, coalesce(bool_or(enabled and tgtype & 7 = 7), false) as inserts,
    coalesce(bool_or(enabled and tgtype & 19 = 19 and tgattr = ''::int2vector), false) as updates,
    min(tgname) filter (where not enabled) as disabled, min(tgname) filter (where enabled
      and source ~* ('\m' || cursor || '"?\s*:?=[^;]*(date_trunc|(stamp|stamptz|zone)\s*\([0-5]\))')) as rounding
  from tables left join (
    select *, tgenabled in ('O', 'A') as enabled, prosrc || ' ' || encode(tgargs, 'escape') as source
    from pg_trigger t join pg_proc on pg_proc.oid = tgfoid
    -- WHEN may leave rows out, unless it is that any column has changed.
    where not tgisinternal and (tgqual is null or pg_get_triggerdef(t.oid) ~ 'WHEN \(\(old\.\* IS DISTINCT FROM new\.\*\)\)')
  ) t on tgrelid = relation and strpos(source, cursor) > 0
  group by name
), dated as (
  select name from tables join pg_attrdef on adrelid = relation
  join pg_attribute on attrelid = adrelid and attnum = adnum and attname = cursor, lateral pg_get_expr(adbin, adrelid) as source
  where source ~* '[[:<:]](now|clock_timestamp|transaction_timestamp|statement_timestamp)[(][)]|current_timestamp'
    and source !~* 'date_trunc|stamp\([0-5]\)'
), needed (name, privileges) as (
  values ('public.sensor_readings', array['select']), ('public.etl_heartbeat', array['select', 'insert', 'update'])
), unready (fault) as (
  -- What keeps Debezium from reading the source.
  select format('wal_level is %s: alter system set wal_level = logical; and restart the server (managed: by its parameters)',
    current_setting('wal_level'))
  where current_setting('wal_level') <> 'logical'
  union all
  select format('role %s may not replicate', rolname) from pg_roles where rolname = current_user
    and not (rolreplication or rolsuper
      or coalesce(pg_has_role(to_regrole('rds_replication'), 'member'), false)) -- Amazon's stands for the attribute
  union all
  select format('table %s does not exist', name) from needed where to_regclass(name) is null
  union all
  select format('role %s may not %s table %s', current_user, privilege, name) from needed, unnest(privileges) privilege
  where not has_table_privilege(to_regclass(name), privilege)
  union all
  select format('table %s is not REPLICA IDENTITY FULL', oid::regclass) from pg_class
  where relreplident <> 'f' and (oid in (select to_regclass(name) from needed)
    or oid in (select relid from pg_partition_tree(to_regclass('public.sensor_readings')))) -- none where it is not partitioned
  union all
  select format('table %s lacks the trigger etl_row_by_row: rows of a COPY would be lost where Debezium restarts among them', name)
  from (select to_regclass('public.sensor_readings') as name) readings
  where name is not null and not exists (select from pg_trigger where tgrelid = name and tgname = 'etl_row_by_row' and tgenabled <> 'D')
  union all
  select 'function public.etl_write_heartbeat() does not exist' where to_regprocedure('public.etl_write_heartbeat()') is null
  union all
  select 'publication etl_sensors leaves changes out: by its parameter publish, a row filter or a list of columns'
  from pg_publication p where pubname = 'etl_sensors' and (not (pubinsert and pubupdate and pubdelete and pubtruncate) or exists (
    select from pg_publication_rel r, to_jsonb(r) as of where prpubid = p.oid
      and (of ->> 'prqual' is not null or of ->> 'prattrs' is not null))) -- neither exists before Postgres 15
  union all
  select format('publication etl_sensors does not exist, or lacks %s', name) from needed
  where name not in (select schemaname || '.' || tablename from pg_publication_tables where pubname = 'etl_sensors')
), slot as (
  select s.*, current_setting('etl.slot', true) as name from (select) one
  left join pg_replication_slots s on slot_name = current_setting('etl.slot', true)
), checks (part, check_name, ok, remedy) as (
  select 'source', 'track_activities is on', statements is null and current_setting('track_activities') = 'on', case
    when statements is not null then
      'it is off for some sessions, whose open transactions no bound would see. Run as an administrator: ' || statements
    when current_setting('track_activities') <> 'on' then
      'it is off for the server. Run as an administrator: alter system set track_activities = on; select pg_reload_conf();' end
  from hidden
  union all
  select 'source', 'role can write nothing', list = '{}' and current_setting('default_transaction_read_only') = 'on', case
    when list <> '{}' then format(
      '%s has %s. Revoke that, or use the role of sql/roles.sql: run that file as an administrator in the source database',
      current_user, array_to_string(list[1:10], ', ') || coalesce(' and ' || nullif(greatest(cardinality(list) - 10, 0), 0) || ' more', ''))
    when current_setting('default_transaction_read_only') <> 'on' then format('its transactions are not read-only to begin with. '
      'Run as an administrator: alter role %I set default_transaction_read_only = on;', current_user) end
  from powers
  union all
  select 'source', format('%s: index on %s', name, cursor), valid is true, case
    when index is null then format('no index of %s begins with %s. Run: create index concurrently on %1$s (%2$I);', path, cursor)
    when not valid then format('%s is not valid. Run: drop index %1$s; create index concurrently on %s (%I);', index, path, cursor) end
  from tables left join indexes using (name)
  union all
  select 'source', format('%s: the database sets %s', name, cursor), ok, case
    when ok then null
    when name = 'events' then format('%s.%s has no default of now(), and no trigger. '
      'Run as its owner: alter table %1$s alter %2$I set default now();', path, cursor)
    when disabled is not null then
      format('its trigger %I is disabled. Run as its owner: alter table %s enable trigger %1$I;', disabled, path)
    else format('%1$s has no trigger that sets %2$s, to the microsecond, before each insert and update of a row. Run as its owner: %4$s'
      'create or replace function %3$s() returns trigger language plpgsql as '
      '$x$begin new.%2$I := clock_timestamp(); return new; end$x$; '
      'create or replace trigger set_%2$s before insert or update on %1$s for each row execute function %3$s();',
      path, cursor, function, 'drop trigger ' || quote_ident(rounding) || ' on ' || path || '; ') end
  from tables join triggers using (name), lateral (
    select rounding is null and (inserts or exists (select from dated where dated.name = tables.name))
      and (updates or name = 'events') as ok) judged
  union all
  select 'metadata', 'role may write them', tables is null,
    case when tables is not null then format(
      '%s may not write %s. Run as an administrator: grant select, insert, update, delete on %2$s to %1$s;', current_user, tables) end
  from (
    select string_agg(name, ', ' order by name) as tables from relations where relnamespace = to_regnamespace('etl') and relkind = 'r'
      and not (has_table_privilege(oid, 'select') and has_table_privilege(oid, 'insert')
        and has_table_privilege(oid, 'update') and has_table_privilege(oid, 'delete'))) unwritable
  union all
  select 'replication', 'wal_level, role and publication', count(*) = 0, E'the source is not ready for Debezium:\n  '
    || string_agg(fault, E'\n  ') || E'\nRun sql/replication.sql in that database as an administrator, then: make connector'
  from unready
  union all
  select 'replication', 'slot ' || name, not elsewhere and not lost and not gone and not none_free, case
    when elsewhere then format('it is of database %s. Choose another prefix in SENSORS_TOPIC, then: make connector', database)
    when lost then 'it is lost, and with it the changes since. Run: make resnapshot'
    when gone then 'it is gone, and with it the changes since. Run: make resnapshot'
    when none_free then 'it does not exist, and the server has no free replication slot. Raise max_replication_slots and restart'
    else coalesce('its WAL is ' || wal_status, 'it does not exist yet: make connector creates it')
      || case when current_setting('max_slot_wal_keep_size') = '-1'
        then '; max_slot_wal_keep_size is not set: it may fill the source''s disk' else '' end
      || case when to_jsonb(slot) ->> 'failover' = 'false' -- null before Postgres 17
        then '; a failover to a standby loses it: see slot.failover in ops/README.md' else '' end end
  from slot, lateral (
    select coalesce(database <> current_database(), false) as elsewhere, coalesce(wal_status = 'lost', false) as lost,
      slot_name is null and current_setting('etl.resumes', true) = '1' as gone,
      slot_name is null and (select count(*) from pg_replication_slots) >= current_setting('max_replication_slots')::int as none_free) state
)
select check_name as "check", ok, remedy from checks where part = current_setting('etl.part') order by check_name;
