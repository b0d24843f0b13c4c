-- What Debezium needs at the source, for the sensors pipeline. Run it once as an administrator (as sql/roles.sql) that owns
-- public.sensor_readings, in the source database; it may be run again at any time. Then give the role a password:
--   alter role etl_replicator password '…';
do $$
begin
  if not exists (select from pg_roles where rolname = 'etl_replicator') then
    create role etl_replicator login;
  end if;
end
$$;

-- It may replicate the server's WAL, which no grant can narrow to a database; of tables it may read the one for the snapshot.
-- A role that was given powers loses them. Amazon's servers have a role in place of the attribute.
do $$
declare
  statement text;
begin
  for statement in
    select format('alter role etl_replicator %s', refusal) from pg_roles, unnest(
      array[rolsuper, rolcreatedb, rolcreaterole, rolbypassrls],
      array['nosuperuser', 'nocreatedb', 'nocreaterole', 'nobypassrls']) power (has, refusal)
    where rolname = 'etl_replicator' and has
  loop
    execute statement;
  end loop;
  if to_regrole('rds_replication') is not null then
    grant rds_replication to etl_replicator;
  elsif not (select rolreplication from pg_roles where rolname = 'etl_replicator') then
    alter role etl_replicator replication;
  end if;
end
$$;
grant select on public.sensor_readings to etl_replicator;

-- Updates and deletes then carry the whole old row, which the destination needs to find it by its sorting key, and large
-- values that an update did not touch. Of a partitioned table each partition needs it, a new one too: an event trigger sees to that
-- (where only a superuser may create one: make connector and the consumer refuse a partition without it).
create or replace function public.etl_identify() returns void language plpgsql as $$
declare
  part regclass;
begin
  for part in
    select oid from pg_class where relreplident <> 'f'
      and (oid = to_regclass('public.sensor_readings')
        or oid in (select relid from pg_partition_tree(to_regclass('public.sensor_readings'))))
  loop
    execute format('alter table %s replica identity full', part);
  end loop;
end
$$;
create or replace function public.etl_identify_partition() returns event_trigger language plpgsql
  as 'begin perform public.etl_identify(); end';
select public.etl_identify(); -- where this fails, run the file as the table's owner
do $$
begin
  drop event trigger if exists etl_identify_partition;
  if (select relkind from pg_class where oid = to_regclass('public.sensor_readings')) = 'p' then
    create event trigger etl_identify_partition on ddl_command_end when tag in ('CREATE TABLE', 'ALTER TABLE')
      execute function public.etl_identify_partition();
  end if;
exception when insufficient_privilege then
  raise notice 'no event trigger: run this file again after each new partition of public.sensor_readings';
end
$$;

-- Rows of one COPY share a position in the WAL, and Debezium, restarted among them, takes all of them for done (debezium/dbz#1554, not
-- fixed in 3.6.1). Where a table has a row trigger before inserts, Postgres writes a COPY row by row, each with its own position. Its
-- condition is false: it never runs. Partitions inherit it.
create or replace trigger etl_row_by_row before insert on public.sensor_readings
  for each row when (false) execute function suppress_redundant_updates_trigger();

-- The canary: a row that Debezium and each consumer write every ten seconds, and that has to come out at the consumer. It carries its
-- previous state, so that one that is missing shows, and which publication it came by. Its changes also let the slot advance while
-- sensor_readings is quiet.
create table if not exists public.etl_heartbeat (
  id int primary key check (id = 1),
  at timestamptz not null
);
alter table public.etl_heartbeat add if not exists publication text;
alter table public.etl_heartbeat replica identity full;
grant select, insert, update on public.etl_heartbeat to etl_replicator;

-- Debezium waits for it before it reads on: not for whoever holds the row.
create or replace function public.etl_write_heartbeat() returns void language sql set lock_timeout = '1s' as $$
  insert into public.etl_heartbeat (id, at, publication)
  select 1, clock_timestamp(), (
    -- A publication, or the table's place in it, that was changed, or dropped and made again (then with another oid), is another one.
    select hashtextextended(concat(p, r), 0)::text from pg_publication p
    left join pg_publication_rel r on r.prpubid = p.oid and r.prrelid = to_regclass('public.sensor_readings')
    where pubname = 'etl_sensors')
  on conflict (id) do update set publication = excluded.publication,
    at = greatest(excluded.at, etl_heartbeat.at + interval '1 microsecond') -- also where the clock was set back
$$;

-- Whole tables, without a row filter or a list of columns; of a partitioned one the changes come as the root's. What is so already stays
-- as it is.
do $$
begin
  if not exists (select from pg_publication where pubname = 'etl_sensors') then
    create publication etl_sensors;
  end if;
  alter publication etl_sensors set (publish = 'insert, update, delete, truncate', publish_via_partition_root = true);
  if not (select puballtables from pg_publication where pubname = 'etl_sensors') then
    alter publication etl_sensors set table public.sensor_readings, public.etl_heartbeat;
  end if;
end
$$;
