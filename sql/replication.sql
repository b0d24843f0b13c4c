-- What Debezium needs at the source, for the sensors pipeline. Run it once as a superuser in the source database; it may be run
-- again at any time. Then give the role a password:
--   alter role etl_replicator password '…';
do $$
begin
  if not exists (select from pg_roles where rolname = 'etl_replicator') then
    create role etl_replicator login;
  end if;
end
$$;

-- It may replicate the server's WAL, which no grant can narrow to a database; of tables it may read the one for the snapshot.
alter role etl_replicator nosuperuser nocreatedb nocreaterole replication nobypassrls;
grant select on public.sensor_readings to etl_replicator;

-- Updates and deletes then carry the whole old row, which the destination needs to find it by its sorting key, and large
-- values that an update did not touch.
alter table public.sensor_readings replica identity full;

-- A slot advances only with changes of its publication: without one of its own, a quiet table would hold the whole server's WAL.
create table if not exists public.etl_heartbeat (
  id int primary key check (id = 1),
  at timestamptz not null
);
grant select, insert, update on public.etl_heartbeat to etl_replicator;

do $$
begin
  if not exists (select from pg_publication where pubname = 'etl_sensors') then
    create publication etl_sensors for table public.sensor_readings, public.etl_heartbeat;
  end if;
end
$$;
