-- Where `make restore-events` puts archived days. Its columns are the archive's contract: `make events` refuses to archive
-- what it could not restore.
create table etl.events_restored (
  id bigint primary key,
  user_id bigint,
  type text,
  payload jsonb,
  created_at timestamptz not null
);
create index events_restored_created_at on etl.events_restored (created_at);
