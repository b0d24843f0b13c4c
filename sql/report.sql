-- What make report shows, as a JSON array of the page's blocks, or arrays of them: etl.status, which is what make status JSON=1 printed,
-- and what schema etl knows of the past. A block with rows is a table, whose text folds it up; one with cells is a chart, each cell with
-- its column and row (from 1), its kind, its share (0 to 1: how high, or how dark), and a title to hover on, of a label its word. Any other
-- is a heading or a paragraph. Times are in UTC. etl.long_hold is from how many seconds on a held watermark is an alert. In psql:
--   set etl.status = '[{"pipeline": "orders", "state": "ok", "reasons": []}]'; set etl.long_hold = '1800'; \i sql/report.sql
with status as (
  select * from jsonb_to_recordset(current_setting('etl.status')::jsonb) as s (pipeline text, state text, reasons jsonb, watermark text,
    last_success text, last_success_age_seconds float8, interval_seconds float8, lock text, rows float8, sensors jsonb)
), last_runs as (
  -- It says running, and nobody holds its lock: it was killed.
  select r.*, row_number() over (partition by pipeline order by started_at desc) as age,
    case when r.state = 'running' and lock is distinct from run_id then 'abandoned' else r.state end as became
  from etl.runs r left join status using (pipeline)
), runs as (
  select pipeline, run_id, rows, bytes_billed, hold_seconds, error, started_at, became, 61 - age as column,
    to_char(started_at at time zone 'UTC', 'YYYY-MM-DD HH24:MI') as at, split_part(error, E'\n', 1) as why,
    became || case when by_hand then ', by hand' else '' end as state,
    coalesce(round(extract(epoch from finished_at - started_at)::numeric, 1) || ' s', 'no end') as took,
    -- Logarithmic: the first run must not hide the others.
    ln(1 + rows) / ln(1 + greatest(1, max(rows) over (partition by pipeline))) as share
  from last_runs where age <= 60
), kinds (state, kind) as (
  values ('succeeded', 'done'), ('rewound', 'done'), ('failed', 'failed'), ('abandoned', 'gone'), ('running', 'gone'), ('missing', 'gone')
), charts as (
  select pipeline, format('Runs of %s since %s, the last 60 at most: %s', pipeline, min(at), (
      select string_agg(format('%s %s', count, became), ', ')
      from (select became, count(*) from runs r where r.pipeline = runs.pipeline group by 1 order by 1) counts)) as label,
    json_agg(json_build_object('column', "column", 'row', 1, 'kind', kind, 'share', share,
      'title', format('%s %s, %s rows, %s %s', at, runs.state, to_char(rows, 'FM999,999,999,999'), took, why)) order by at) as cells,
    json_agg(json_build_array(at, runs.state, rows, took, to_char(nullif(bytes_billed, 0) / 1e6, 'FM999,999,990 "MB"'),
      etl.duration(nullif(hold_seconds, 0)), error) order by started_at desc) as runs
  from runs join kinds on kinds.state = became group by 1
), chunks as (
  select (chunk_from at time zone 'UTC')::date as day, rows, state, split_part(error, E'\n', 1) as why from etl.chunks
  where pipeline = 'events'
), days as (
  -- Each day from the first to the last. One that nobody archived is missing.
  select at::date as day, extract(year from at) as year, coalesce(rows, 0) as rows, coalesce(chunks.state, 'missing') as state, kind, why,
    rows / greatest(1, max(rows) over ())::float8 as share
  from (select min(day) as first, max(day) as last from chunks) span, generate_series(first, last, '1 day') at
  left join chunks on day = at join kinds on kinds.state = coalesce(chunks.state, 'missing')
), years as (
  -- A square a day, a column a week, and the months' names above.
  select year, json_agg(json_build_object(
    'column', (extract(doy from at)::int + extract(isodow from date_trunc('year', at))::int - 2) / 7 + 1,
    'row', "row" + 1, 'kind', cell.kind, 'share', coalesce(share, 0), 'title', title)) as cells
  from days, lateral (
    values (day::timestamp, extract(isodow from day)::int, kind,
        format('%s %s, %s rows %s', day, state, to_char(rows, 'FM999,999,999,999'), why)),
      (case when extract(day from day) = 1 then day::timestamp end, 0, 'label', to_char(day, 'Mon'))) cell (at, "row", kind, title)
  where at is not null group by 1 having not bool_and(days.kind = 'gone')
), stretches as (
  select state, case when count(*) > 5 then format('%s days, %s to %s', count(*), min(day), max(day))
                     else string_agg(day::text, ', ' order by day) end as days
  from (select day, case kind when 'gone' then 'missing' else kind end as state from days) d group by 1
), models as (
  select distinct on (model) model, coalesce(past.rows, m.rows) as rows, checks, split_part(error, E'\n', 1) as why, trend, published
  from etl.models m left join lateral (
    -- Of each of the last 26 that were published a bar, as high as its rows among them.
    select (array_agg(rows order by finished_at desc))[1] as rows,
      to_char(max(finished_at) at time zone 'UTC', 'YYYY-MM-DD HH24:MI') as published,
      string_agg(substr('▁▂▃▄▅▆▇█', coalesce(1 + 7 * (rows - low) / nullif(high - low, 0), 4)::int, 1), '' order by finished_at) as trend
    from (
      select *, min(rows) over () as low, max(rows) over () as high
      from (select * from etl.models p where p.model = m.model and error is null order by finished_at desc limit 26) latest) p
  ) past on true order by model, m.finished_at desc
), proofs as (
  select distinct on (pipeline) *, extract(epoch from now() - verified_at)::float8 as age,
    case pipeline when 'events' then 'make verify-events' else 'make verify PIPELINE=' || pipeline end as again
  from etl.verifications order by pipeline, verified_at desc
), now_wrong (part, of, what) as (
  -- The worst first; one line for all the pipelines that one thing holds up.
  select case state when 'red' then 1 when 'warn' then 6 else 7 end, string_agg(pipeline, ', ' order by pipeline),
    split_part(reason, E'\n', 1)
  from status, jsonb_array_elements_text(reasons) reason where state <> 'ok' group by state, reason
  union all select 2, 'model ' || model, 'was not published: ' || why from models where why is not null
  union all select 3, pipeline, format('differs from its source: %s. Next: %s (it names the keys, and how to repair)', found, again)
  from proofs where differences > 0
  union all select 4, 'archive of ' || day, format('%s. Next: make backfill-events FROM=%s TO=%s', why, day, day + 1)
  from days where state = 'failed'
  union all select 5, 'archive', format('%s missing, from %s on. Next: make backfill-events FROM=%s TO=%s', count(*), min(day), min(day),
    max(day) + 1)
  -- A month and more between two archived days is a time that nobody asked for.
  from (select day, day - row_number() over (order by day)::int as hole from days where state = 'missing') holes
  group by hole having count(*) <= 31
  union all select 5, pipeline, format('was last verified %s ago. Next: %s', etl.duration(age), again) from proofs where age > 604800
), week_wrong (part, of, what) as (
  select part, pipeline, format('%s of %s runs %s, %s: %s%s', count(*) filter (where holds), count(*), what,
    concat_ws(' to ', min(at) filter (where holds), nullif(max(at) filter (where holds), min(at) filter (where holds))),
    (array_agg(detail order by at desc) filter (where holds))[1],
    case when max(started_at) filter (where became = 'succeeded') > max(started_at) filter (where holds)
      then ' (it has succeeded since)' end)
  from runs, lateral (values
    (1, 'failed', became = 'failed', why),
    (2, 'were abandoned', became = 'abandoned', 'killed, or its machine was'),
    (3, 'found the watermark held', hold_seconds > current_setting('etl.long_hold')::float8,
      'an open transaction of ' || etl.duration(hold_seconds))) event (part, what, holds, detail)
  where started_at > now() - interval '7 days' group by part, pipeline, what having bool_or(holds)
), billed as (
  select week::date as week, sum(bytes)::float8 as bytes
  from generate_series(date_trunc('week', now() at time zone 'UTC') - interval '11 weeks', now() at time zone 'UTC', '1 week') week
  left join (
    select started_at as at, bytes_billed as bytes from etl.runs union all select verified_at, bytes_billed from etl.verifications
  ) jobs on date_trunc('week', at at time zone 'UTC') = week group by 1
)
select json_build_array(
  json_build_object('kind', 'p', 'look', 'soft', 'text',
    to_char(now() at time zone 'UTC', 'YYYY-MM-DD HH24:MI "UTC, by make report. All times are UTC."')),
  '{"kind": "h2", "text": "Needs a person"}'::json,
  '{"kind": "h3", "text": "Now"}'::json,
  json_build_object('rows', coalesce(
    (select json_agg(json_build_array(of || ':', what) order by part, of) from now_wrong), '[["Nothing."]]')),
  '{"kind": "h3", "text": "In the last seven days"}'::json,
  json_build_object('rows', coalesce(
    (select json_agg(json_build_array(of || ':', what) order by part, of) from week_wrong), '[["Nothing."]]')),
  '{"kind": "h2", "text": "Pipelines"}'::json,
  (select json_agg(json_build_array(
      json_build_object('kind', 'h3', 'look', state, 'text', pipeline || ' ' || state),
      json_build_object('kind', 'p', 'text', concat_ws(' · ',
        case when last_success is null then 'never succeeded'
          else format('last success %s, %s ago', last_success, etl.duration(last_success_age_seconds)) end,
        to_char(rows, 'FM999,999,999,990') || ' rows in it', 'watermark ' || watermark, 'expected every ' || etl.duration(interval_seconds),
        case when sensors is not null then format('lag %s, dead letters %s', coalesce(sensors ->> 'lag', 'unknown'),
          coalesce(sensors ->> 'dead_letters', 'unknown')) end)),
      (select json_agg(json_build_object('kind', 'p', 'look', state, 'text', reason)) from jsonb_array_elements_text(reasons) reason),
      json_build_object('kind', 'bars', 'cells', cells, 'text',
        label || '. Height: rows, logarithmic. A cross failed; dashes: abandoned (killed), or still running.'),
      json_build_object('text', 'The runs as text', 'names', '["at", "state", "rows", "took", "billed", "watermark held", "error"]'::json,
        'rows', runs)) order by pipeline)
    from status left join charts using (pipeline)),
  '{"kind": "h2", "text": "Archive of events"}'::json,
  json_build_object('kind', 'p', 'text', coalesce((select format('%s to %s, %s rows. Failed: %s. Missing: %s.', min(day), max(day),
      to_char(sum(rows), 'FM999,999,999,990'), coalesce((select days from stretches where state = 'failed'), 'none'),
      coalesce((select days from stretches where state = 'missing'), 'none')) from days having count(*) > 0),
    'None yet. Next: make events')),
  (select json_agg(json_build_object('kind', 'calendar', 'cells', cells, 'text',
      year || '. The stronger the colour, the more rows. A cross failed; dashes: missing, or being archived.') order by year) from years),
  '{"kind": "h2", "text": "Models"}'::json,
  json_build_object(
    'names', '["model", "rows", "checks", "last published", "rows, run by run", "why it was not published"]'::json,
    'rows', coalesce((select json_agg(json_build_array(model, rows,
      case when why is not null then 'failed' when checks = 0 then 'none' else checks || ' passed' end,
      coalesce(published, 'never'), trend, why) order by model) from models), '[["None yet. Next: make views"]]')),
  '{"kind": "h2", "text": "Proof that source and destination agree"}'::json,
  json_build_object('names', '["pipeline", "verified", "rows compared", "differences", "found"]'::json, 'rows', coalesce(
    (select json_agg(json_build_array(pipeline, format('%s, %s ago', to_char(verified_at at time zone 'UTC', 'YYYY-MM-DD HH24:MI'),
      etl.duration(age)), rows, differences, found) order by pipeline) from proofs), '[["None yet. Next: make verify"]]')),
  '{"kind": "h2", "text": "Bytes billed by BigQuery"}'::json,
  json_build_object('rows', (select json_agg(json_build_array('week of ' || week,
      coalesce(to_char(bytes / 1e6, 'FM999,999,990 "MB"'), 'no job'),
      repeat('█', ceil(30 * bytes / (select greatest(1, max(bytes)) from billed))::int)) order by week desc) from billed))
)::text as report;
