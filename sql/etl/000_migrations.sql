-- Which files of sql/etl were applied: make migrate writes a row in the transaction that applies the file.
create table if not exists etl.migrations (
  file text primary key,
  sha256 text not null,
  applied_at timestamptz not null default now()
);
