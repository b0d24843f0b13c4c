-- Why a topic cannot be read on in its epoch, a row a fault: rows could be missing, or lose to older ones. etl.partitions is where the
-- topic and the group are, etl.before how far each partition was inserted before that was asked: both go on meanwhile, so the topic must
-- reach as far as before, and the group no further than now. etl.readings is the UUID of ClickHouse's sensor_readings, or ''. In psql:
--   set etl.topic = 'shop.public.sensor_readings'; set etl.readings = ''; set etl.before = '[{"partition": 0, "next": "7"}]';
--   set etl.partitions = '[{"partition": 0, "low": "0", "end": "9", "committed": "7"}]'; \i sql/epoch_faults.sql
with epoch as (
  -- The table that the epoch's rows are in, from the first consumer on that says it.
  update etl.topics set readings = coalesce(readings, nullif(current_setting('etl.readings'), '')::uuid)
  where topic = current_setting('etl.topic') returning *
), known as (
  select partition, next_offset as now, coalesce(began, 0) as began from epoch join etl.topic_offsets using (topic)
), partitions as (
  select format('partition %s of topic %s', partition, current_setting('etl.topic')) as partition, low, "end", committed,
    coalesce(next, 0) as next, coalesce(now, 0) as now, coalesce(began, 0) as began
  from jsonb_to_recordset(current_setting('etl.partitions')::jsonb) as p (partition int, low bigint, "end" bigint, committed bigint)
  left join jsonb_to_recordset(current_setting('etl.before')::jsonb) as b (partition int, next bigint) using (partition)
  left join known using (partition)
)
select format('ClickHouse''s sensor_readings was made again, and lacks what epoch %s of %s had inserted', epoch, topic) as fault
from epoch where readings::text <> nullif(current_setting('etl.readings'), '')
union all
select format('topic %s has %s partitions, and had %s when epoch %s began', topic, has, had, epoch)
from epoch, (select count(*) as has from partitions) p, (select count(*) as had from known) k where has <> had
union all
select format('%s ends at offset %s, but was inserted up to offset %s: the topic was created again', partition, "end", next)
from partitions where "end" < next
union all
select format('%s begins at offset %s, but was inserted up to offset %s: messages expired unread (retention.ms)', partition, low, next)
from partitions where low > next
union all
select format('%s was inserted up to offset %s, but the group has none: the topic was created again, or the group''s offset expired',
              partition, next)
from partitions where committed < 0 and next > 0
union all
select format('%s was inserted up to offset %s, but the group''s offset is %s: somebody set it ahead', partition, now, committed)
from partitions where committed > now
union all
select format('%s has this epoch from %s on, but the group''s offset is %s: somebody set it back', partition, began, committed)
from partitions where committed >= 0 and committed < began;
