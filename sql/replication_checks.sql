-- What keeps Debezium from reading the source, a row a fault. Run it as the role of REPLICATION_DATABASE_URL. In psql:
--   \i sql/replication_checks.sql
with needed (name, privileges) as (
  values ('public.sensor_readings', array['select']), ('public.etl_heartbeat', array['select', 'insert', 'update'])
)
select format('wal_level is %s: alter system set wal_level = logical; and restart the server (managed: by its parameters)',
  current_setting('wal_level')) as fault
where current_setting('wal_level') <> 'logical'
union all
select format('role %s may not replicate', rolname) from pg_roles where rolname = current_user
  and not (rolreplication or rolsuper
    or coalesce(pg_has_role(to_regrole('rds_replication'), 'member'), false)) -- Amazon's stands for the attribute
union all
select format('table %s does not exist', name) from needed where to_regclass(name) is null
union all
select format('role %s may not %s table %s', current_user, privilege, name) from needed, unnest(privileges) privilege
where to_regclass(name) is not null and not has_table_privilege(name, privilege)
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
where name not in (select schemaname || '.' || tablename from pg_publication_tables where pubname = 'etl_sensors');
