-- What the pipelines need of the source's tables: an index on each cursor, and a trigger that sets updated_at. Adapt it to your tables, and
-- run it once as their owner in the source database; it may be run again at any time. On a large table that is written to, create each
-- index before, by hand: create index concurrently.
create index if not exists orders_updated_at on public.orders (updated_at);
create index if not exists users_updated_at on public.users (updated_at);
create index if not exists events_created_at on public.events (created_at, id);

-- The database sets updated_at, not the application: the safe upper bound of a window rests on that.
create or replace function public.set_updated_at() returns trigger language plpgsql as $$
begin
  new.updated_at := clock_timestamp();
  return new;
end
$$;

create or replace trigger set_updated_at before insert or update on public.orders
  for each row execute function public.set_updated_at();
create or replace trigger set_updated_at before insert or update on public.users
  for each row execute function public.set_updated_at();
