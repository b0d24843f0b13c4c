-- What make status says: a row for each pipeline, times in UTC, ages in seconds. Schema etl knows of its runs; what other servers say is
-- in etl.facts, an array with an object for each pipeline, which scripts/ops/status.ts asks for. etl.limits has those of ops/alerts.yml.
-- In psql:
--   set etl.facts = '[{"pipeline": "orders", "interval_seconds": 3600}]'; set etl.limits = '{}'; \i sql/status.sql
with facts as (
  select * from jsonb_to_recordset(current_setting('etl.facts')::jsonb) as f (pipeline text, interval_seconds float8, lock text,
    lock_since text, held_by text, hold_seconds float8, found jsonb, future_rows bigint, sensors jsonb)
), limits as (
  select * from jsonb_to_record(current_setting('etl.limits')::jsonb) as l (etl_watermark_hold_seconds float8, etl_sensors_lag float8,
    etl_sensors_canary_timestamp_seconds float8, etl_sensors_slot_retained_bytes float8)
), consumed as (
  -- Sensors have no runs: a commit of a batch is their success.
    select f.pipeline, max(updated_at) as at from facts f join etl.topic_offsets on topic = f.sensors ->> 'topic' group by 1
  ), states (severity, state) as (
    values (0, 'ok'), (1, 'new'), (2, 'warn'), (3, 'red')
  ), status as (
  select f.pipeline, coalesce(judged.state, 'ok') as state,
    -- Why it is not ok, the worst first.
    judged.reasons,
    -- Null before the first run, and where a pipeline has none: sensors, views.
    replace(w.watermark::text, ' ', 'T') as watermark, extract(epoch from now() - w.watermark)::float8 as watermark_age_seconds,
    -- How often it is meant to succeed.
    f.interval_seconds,
    -- By schedule, not by hand.
    replace(date_trunc('second', success)::text, ' ', 'T') as last_success, age as last_success_age_seconds,
    replace(date_trunc('second', last.started_at)::text, ' ', 'T') as last_run,
    extract(epoch from now() - last.started_at)::float8 as last_run_age_seconds, run as last_run_state, last.run_id as last_run_id,
    last.by_hand as last_run_by_hand, last.error as last_error,
    -- Of the last success.
    ok.rows::float8 as rows,
    -- Who holds the pipeline's lock now, a run's id or an application, and since when.
    f.lock, f.lock_since,
    -- Who holds the watermark: an open transaction of the source, in words.
    f.held_by, coalesce(f.hold_seconds, 0) as hold_seconds,
    -- Of events: the days that etl.chunks knows; at is the one at work.
    days,
    -- Null is what does not answer, and a reason says why.
    case when f.sensors is not null then row_to_json(s) end as sensors
  from facts f cross join limits
  left join etl.watermarks w using (pipeline)
  left join consumed using (pipeline)
  left join lateral (
    select * from etl.runs r where r.pipeline = f.pipeline and r.state = 'succeeded' and not r.by_hand
    order by started_at desc limit 1) ok on true
  left join lateral (
    select * from etl.runs r where r.pipeline = f.pipeline and r.state <> 'rewound'
    order by started_at desc limit 1) last on true
  left join lateral (
    select json_build_object(
      'archived', count(*) filter (where state = 'succeeded'), 'failed', count(*) filter (where state = 'failed'),
      'running', count(*) filter (where state = 'running'), 'first', min(chunk_from)::date, 'last', max(chunk_from)::date,
      'at', (max(chunk_from) filter (where state = 'running'))::date) as days
    from etl.chunks c where c.pipeline = f.pipeline having count(*) > 0) progress on true
  -- It says running, and another session has the lock, or none: it was killed, and could not say so.
  cross join lateral (
    select coalesce(consumed.at, ok.finished_at) as success,
      case when last.state = 'running' and f.lock is distinct from last.run_id then 'abandoned' else last.state end as run) ended
  cross join lateral (select extract(epoch from now() - success)::float8 as age, f.sensors ->> 'slot_wal' as slot_wal,
    'the changes since are lost to Debezium. Next: systemctl stop etl-sensors, then: make resnapshot' as lost) a
  left join lateral (
    select topic, epoch, lag, consumers, dead_letters, connector_running, slot_active, slot_retained_bytes,
      extract(epoch from now() - coalesce(canary_seen, t.started_at))::float8 as canary_age_seconds, canary_gap
    from jsonb_to_record(f.sensors) as kafka (topic text, lag float8, consumers int, dead_letters float8,
      connector_running boolean, slot_active boolean, slot_retained_bytes float8) join etl.topics t using (topic)) s on true
  cross join lateral (
    select (array_agg(state order by severity desc))[1] as state,
      coalesce(json_agg(reason order by severity = 3 desc, number), '[]') as reasons
    from (
      select row_number() over () as number, rule.* from (
        select state, true as holds, reason from jsonb_to_recordset(f.found) as found (state text, reason text)
        union all values
        -- The same rules as the alerts': two intervals without a success, a last run that failed; nothing yet is new, not red.
        ('red', f.pipeline <> 'sensors' and f.interval_seconds is null,
          'ops/alerts.yml has no etl_expected_interval_seconds for it: nobody is told if it goes quiet'),
        (case when last.by_hand then 'new' else 'red' end, f.pipeline <> 'sensors' and success is null and run <> 'running',
          'it never succeeded by its schedule'),
        ('red', age > 2 * f.interval_seconds,
          format('its last success is %s ago, and its interval %s', etl.duration(age), etl.duration(f.interval_seconds))),
        ('new', f.pipeline <> 'sensors' and run is null, 'it never ran'),
        (case when last.by_hand then 'warn' else 'red' end, run = 'failed', 'its last run failed: ' || coalesce(last.error, '')),
        (case when last.by_hand then 'warn' else 'red' end, run = 'abandoned',
          format('its last run, %s, was abandoned: it was killed, and the next run resumes', last.run_id)),
        ('warn', (days ->> 'failed')::int > 0, 'days that failed in a backfill, or are to be archived again: ' || (days ->> 'failed')),
        (case when f.hold_seconds > etl_watermark_hold_seconds then 'red' else 'warn' end,
          f.hold_seconds is not null and f.held_by is not null,
          format('its watermark is held for %s by %s', etl.duration(f.hold_seconds), f.held_by)),
        ('warn', f.future_rows > 0, to_char(f.future_rows, 'FM999,999,999,999') || ' rows of its source lie in the future'),
        -- Sensors are always on, so that lag, connector, slot and canary tell what an interval would.
        ('red', s.lag > etl_sensors_lag, format('ClickHouse is %s messages behind Kafka', to_char(s.lag, 'FM999,999,999,999'))),
        ('red', consumers = 0, 'no consumer runs. Next: systemctl status etl-sensors (local stack: make sensors)'),
        ('red', not connector_running, 'Debezium''s connector does not run. Next: make connector'),
        ('red', slot_wal = 'none', format('the source has no slot %s (any more): %s', f.sensors ->> 'slot', lost)),
        ('red', slot_wal = 'lost', format('the source has removed WAL that slot %s needs: %s', f.sensors ->> 'slot', lost)),
        ('warn', not slot_active, format('nobody reads the slot %s. Next: make connector', f.sensors ->> 'slot')),
        ('red', canary_gap is not null,
          canary_gap || '. Next: make verify PIPELINE=sensors, and where rows differ: make resnapshot'),
        (case when canary_age_seconds > 300 then 'red' else 'warn' end, canary_age_seconds > etl_sensors_canary_timestamp_seconds,
          format('no canary has come from the source for %s. Next: ops/runbook.md#etlsensorscanarystale',
            etl.duration(canary_age_seconds))),
        ('red', slot_retained_bytes > etl_sensors_slot_retained_bytes,
          format('the source keeps %s MB of WAL for the slot', to_char(slot_retained_bytes / 1e6, 'FM999,999,999,990'))),
        ('warn', dead_letters > 0, to_char(dead_letters, 'FM999,999,999,999') || ' dead letters. Next: make dead-letters')
      ) rule (state, holds, reason)
    ) rules join states using (state) where holds
  ) judged
)
-- line is what the table shows, and said what stands below it: why it is not ok, and what has no column.
select *,
  json_build_object('pipeline', pipeline, 'watermark', coalesce(watermark, 'none'),
    'age', coalesce(etl.duration(watermark_age_seconds), '-'),
    'last success', coalesce(etl.duration(last_success_age_seconds) || ' ago', 'never'),
    'every', coalesce(regexp_replace(etl.duration(interval_seconds), ' 0[hms]$', ''), '-'),
    'last run', coalesce(last_run_state || ' ' || etl.duration(last_run_age_seconds) || ' ago', 'never'),
    'rows', coalesce(to_char(rows, 'FM999,999,999,990'), '-'), 'lock held by', coalesce(lock, 'nobody'), 'state', state) as line,
  (select string_agg(format(E'%s: %s\n', pipeline, said), '') from (
    select json_array_elements_text(reasons) as said
    union all select format('its lock is held by %s since %s', lock, lock_since) where lock is not null
    union all select format('%s days archived of %s to %s, %s failed%s', to_char((days ->> 'archived')::int, 'FM999,990'), days ->> 'first',
      days ->> 'last', days ->> 'failed', ', at ' || (days ->> 'at')) where days is not null
    union all select format('lag %s · consumers %s · dead letters %s · WAL kept for the slot %s',
      coalesce(to_char((sensors ->> 'lag')::float8, 'FM999,999,999,990'), 'unknown'), coalesce(sensors ->> 'consumers', 'unknown'),
      coalesce(to_char((sensors ->> 'dead_letters')::float8, 'FM999,999,999,990'), 'unknown'),
      coalesce(to_char((sensors ->> 'slot_retained_bytes')::float8 / 1e6, 'FM999,999,990 "MB"'), 'unknown')) where sensors is not null
  ) below) as said
from status order by pipeline collate "C";
