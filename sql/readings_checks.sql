-- What is wrong with the source's readings for ClickHouse's sensor_readings, in words, and which of their columns that does not have.
-- etl.wanted are its columns; plain is a type without LowCardinality and Nullable. In psql:
--   set etl.source = 'public.sensor_readings'; set etl.wanted = '[{"name": "id", "type": "Int64", "plain": "Int64"}]';
--   \i sql/readings_checks.sql
with source as (
  select current_setting('etl.source') as name, to_regclass(current_setting('etl.source')) as oid
), fitting (plain, types) as (
  -- Postgres's types that a column of ClickHouse holds every value of, as Debezium writes them.
  values ('Int64', '{bigint,integer,smallint}'::text[]), ('String', '{text,character varying,uuid}'),
    ('Float64', '{double precision,real}'), ('Bool', '{boolean}'), ('DateTime64(6, ''UTC'')', '{timestamp with time zone}')
), wanted as (
  select * from jsonb_to_recordset(current_setting('etl.wanted')::jsonb) as w (name text, type text, plain text)
), found as (
  select attnum, attname as name, format_type(atttypid, null) as type
  from source, pg_attribute where attrelid = oid and attnum > 0 and not attisdropped
), faults as (
  select format('column %s.%s: expected one for %s (ClickHouse''s sensor_readings), found %s',
                source.name, w.name, w.type, coalesce(f.type, 'no such column')) as fault
  from source, wanted w left join found f on f.name = w.name left join fitting on fitting.plain = w.plain
  where not coalesce(f.type = any (types), false)
  union all
  -- And each of its partitions, where it is partitioned.
  select format('table %s: its changes lack the old row. Run as its owner: alter table %1$s replica identity full;', c.oid::regclass)
  from source, pg_class c
  where relreplident <> 'f' and (c.oid = source.oid or c.oid in (select relid from pg_partition_tree(source.oid)))
)
select (select coalesce(json_agg(fault), '[]') from faults) as faults,
  (select coalesce(json_agg(name order by attnum), '[]') from found where name not in (select name from wanted)) as unknown;
