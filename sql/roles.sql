-- The two roles that the pipelines use. Run it once as a superuser in the source database, and again in the
-- metadata database if that is another one; it may be run again at any time. Then give them passwords:
--   alter role etl_reader password '…'; alter role etl_metadata password '…';
do $$
begin
  if not exists (select from pg_roles where rolname = 'etl_reader') then
    create role etl_reader login;
  end if;
  if not exists (select from pg_roles where rolname = 'etl_metadata') then
    create role etl_metadata login;
  end if;
end
$$;

-- The source: reads the pipelines' tables, and sees when others' transactions began (the safe upper bound needs it).
-- Nothing else: sessions of this role are not waited for, which is right only while it can write nothing.
alter role etl_reader nosuperuser nocreatedb nocreaterole noreplication nobypassrls;
alter role etl_reader set default_transaction_read_only = on;
grant pg_read_all_stats to etl_reader;
do $$
declare
  source_table text;
begin
  foreach source_table in array array['public.orders', 'public.users', 'public.events', 'public.sensor_readings'] loop
    if to_regclass(source_table) is not null then
      execute format('grant select on %s to etl_reader', source_table);
    end if;
  end loop;
end
$$;

-- The metadata: owns schema etl, and nothing else.
alter role etl_metadata nosuperuser nocreatedb nocreaterole noreplication nobypassrls;
create schema if not exists etl authorization etl_metadata;
