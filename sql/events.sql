-- What `make events` reads, a part at a time: at most etl.rows rows of [etl.from, etl.to) of created_at, in the order of
-- created_at and id; of those at etl.from itself only the ids after etl.after, so that the next part starts at the last
-- row of the one before. Its columns are those of etl.events_restored (sql/etl/002_events_restored.sql). In psql:
--   set etl."from" = '2017-01-01'; set etl."to" = '2017-01-02'; set etl.after = '-1'; set etl.rows = '10'; \i sql/events.sql
select
  id,
  user_id,
  type,
  payload,
  created_at
from public.events
where created_at >= current_setting('etl.from')::timestamptz
  and created_at < current_setting('etl.to')::timestamptz
  -- Sub-selects, so that the settings are read once and not for each row.
  and (created_at > (select current_setting('etl.from')::timestamptz) or id > (select current_setting('etl.after')::numeric))
order by created_at, id
limit current_setting('etl.rows')::bigint;
