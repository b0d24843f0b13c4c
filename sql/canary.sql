-- Keeps what a canary says of its topic: a change of public.etl_heartbeat (sql/replication.sql) as Debezium wrote it, which has the row's
-- previous state and the new one. They come in order; one that comes again changes nothing. In psql:
--   set etl.topic = 'shop.public.sensor_readings'; set etl.canary = '{"before": null, "after": null}'; \i sql/canary.sql
with message as (
  select current_setting('etl.canary')::jsonb as canary
), said as (
  select (canary -> 'before' ->> 'at')::timestamptz as previous, (canary -> 'after' ->> 'at')::timestamptz as at,
    canary -> 'before' ->> 'publication' as publication_before, canary -> 'after' ->> 'publication' as publication,
    (canary -> 'source' ->> 'lsn')::bigint as lsn
  from message
)
update etl.topics set canary_at = at, canary_seen = least(at, now()),
  -- Before there is a snapshot, the canary's position, negative: the snapshot that it came behind lies before it.
  snapshot_lsn = coalesce(snapshot_lsn, -lsn),
  canary_gap = coalesce(canary_gap, case
    when canary_at <> coalesce(previous, '-infinity') then format('changes between %s and %s never came', canary_at, at)
    when publication_before <> publication
      then format('the publication was changed or made again before %s, and changes may be missing', at) end)
from said where topic = current_setting('etl.topic') and (canary_at is null or canary_at < at);
