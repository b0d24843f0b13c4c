-- The two roles that the pipelines use. Run it once as an administrator in the source database, and again in the metadata database if
-- that is another one; it may be run again at any time. An administrator is a superuser, or what a managed server has instead
-- (ops/managed-postgres.md): a role with CREATEROLE that may grant pg_monitor. Then give the roles passwords:
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

-- A role that was given powers loses them. Only then: who is no superuser may not even say NOSUPERUSER.
do $$
declare
  statement text;
begin
  for statement in
    select format('alter role %I %s', rolname, refusal) from pg_roles, unnest(
      array[rolsuper, rolcreatedb, rolcreaterole, rolreplication, rolbypassrls],
      array['nosuperuser', 'nocreatedb', 'nocreaterole', 'noreplication', 'nobypassrls']) power (has, refusal)
    where rolname in ('etl_reader', 'etl_metadata') and has
  loop
    execute statement;
  end loop;
end
$$;

-- The source: reads the pipelines' tables, and sees when others' transactions began (the safe upper bound needs it).
-- Nothing else: sessions of this role are not waited for, which is right only while it can write nothing.
alter role etl_reader set default_transaction_read_only = on;
do $$
declare
  source_table text;
begin
  begin
    grant pg_read_all_stats to etl_reader;
  exception when insufficient_privilege then
    grant pg_monitor to etl_reader; -- what a managed server lets its administrator grant; it includes pg_read_all_stats
  end;
  foreach source_table in array array['public.orders', 'public.users', 'public.events', 'public.sensor_readings'] loop
    continue when to_regclass(source_table) is null or has_table_privilege('etl_reader', source_table, 'select');
    begin
      execute format('grant usage on schema %s to etl_reader', split_part(source_table, '.', 1));
      execute format('grant select on %s to etl_reader', source_table);
    exception when insufficient_privilege then
      raise warning 'run as the owner of %: grant select on % to etl_reader;', source_table, source_table;
    end;
  end loop;
end
$$;

-- The metadata: owns schema etl, and nothing else. Who is no superuser may give a schema only to a role that it is a member of.
do $$
begin
  if to_regnamespace('etl') is not null then
    return;
  elsif (select rolsuper from pg_roles where rolname = current_user) then
    create schema etl authorization etl_metadata;
  else
    execute format('grant etl_metadata to %I', current_user);
    create schema etl authorization etl_metadata;
    execute format('revoke etl_metadata from %I', current_user);
  end if;
end
$$;
