-- What schema etl knows of each pipeline, for make status: a row each, times in UTC, ages in seconds. In psql:
--   set etl.pipelines = 'orders users events sensors views'; set etl.topic = 'shop.public.sensor_readings'; \i sql/status.sql
with pipelines as (
  select unnest(string_to_array(current_setting('etl.pipelines'), ' ')) as pipeline
), consumed as (
  -- Sensors have no runs: a commit of a batch is their success.
  select max(updated_at) as at from etl.topic_offsets where topic = current_setting('etl.topic', true)
)
select p.pipeline,
  -- Null before the first run, and where a pipeline has none: sensors, views.
  replace(w.watermark::text, ' ', 'T') as watermark,
  extract(epoch from now() - w.watermark)::float8 as watermark_age_seconds,
  -- By schedule, not by hand.
  replace(date_trunc('second', success)::text, ' ', 'T') as last_success,
  extract(epoch from now() - success)::float8 as last_success_age_seconds,
  replace(date_trunc('second', last.started_at)::text, ' ', 'T') as last_run,
  extract(epoch from now() - last.started_at)::float8 as last_run_age_seconds,
  -- succeeded, failed or running; make status calls running abandoned where nobody holds the lock.
  last.state as last_run_state, last.run_id as last_run_id, last.by_hand as last_run_by_hand, last.error as last_error,
  -- Of the last success.
  ok.rows::float8 as rows,
  -- Of events: the days that etl.chunks knows; at is the one at work.
  days
from pipelines p
left join etl.watermarks w using (pipeline)
left join lateral (
  select * from etl.runs r where r.pipeline = p.pipeline and r.state = 'succeeded' and not r.by_hand
  order by started_at desc limit 1) ok on true
left join lateral (
  select * from etl.runs r where r.pipeline = p.pipeline and r.state <> 'rewound'
  order by started_at desc limit 1) last on true
left join lateral (
  select json_build_object(
    'archived', count(*) filter (where state = 'succeeded'), 'failed', count(*) filter (where state = 'failed'),
    'running', count(*) filter (where state = 'running'), 'first', min(chunk_from)::date, 'last', max(chunk_from)::date,
    'at', (max(chunk_from) filter (where state = 'running'))::date) as days
  from etl.chunks c where c.pipeline = p.pipeline having count(*) > 0) progress on true
cross join lateral (
  select case p.pipeline when 'sensors' then (select at from consumed) else ok.finished_at end as success) s
order by p.pipeline collate "C";
