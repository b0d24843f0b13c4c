-- What schema etl knows of the past, for make report: one JSON document, times in UTC. In psql: \i sql/report.sql
with runs as (
  select *, row_number() over (partition by pipeline order by started_at desc) as age from etl.runs
), models as (
  select *, row_number() over (partition by model order by finished_at desc) as age from etl.models
), billed as (
  select started_at as at, bytes_billed from etl.runs
  union all select verified_at, bytes_billed from etl.verifications
)
select json_build_object(
  'at', to_char(now() at time zone 'UTC', 'YYYY-MM-DD HH24:MI'),
  'runs', (
    select coalesce(json_agg(json_build_object('pipeline', pipeline, 'run', run_id, 'state', state, 'by_hand', by_hand, 'rows', rows,
      'bytes_billed', bytes_billed, 'hold_seconds', hold_seconds, 'error', error, 'recent', started_at > now() - interval '7 days',
      'at', to_char(started_at at time zone 'UTC', 'YYYY-MM-DD HH24:MI'),
      'seconds', extract(epoch from finished_at - started_at)::float8) order by started_at), '[]')
    from runs where age <= 60),
  'days', (
    select coalesce(json_agg(json_build_object('day', (chunk_from at time zone 'UTC')::date,
      'next', (chunk_to at time zone 'UTC')::date, 'rows', rows, 'state', state, 'error', error)
      order by chunk_from), '[]')
    from etl.chunks where pipeline = 'events'),
  'models', (
    select coalesce(json_agg(json_build_object('model', model, 'rows', rows, 'checks', checks, 'error', error,
      'published', (select to_char(max(finished_at) at time zone 'UTC', 'YYYY-MM-DD HH24:MI')
        from etl.models p where p.model = models.model and p.error is null),
      'history', (select json_agg(rows order by finished_at) from models h where h.model = models.model and error is null and age <= 26))
      order by model), '[]')
    from models where age = 1),
  'verified', (
    select coalesce(json_agg(json_build_object('pipeline', pipeline, 'rows', rows, 'differences', differences, 'found', found,
      'at', to_char(verified_at at time zone 'UTC', 'YYYY-MM-DD HH24:MI'), 'age', extract(epoch from now() - verified_at)::float8)
      order by pipeline), '[]')
    from (select distinct on (pipeline) * from etl.verifications order by pipeline, verified_at desc) latest),
  'billed', (
    select json_agg(json_build_object('week', week::date, 'bytes', (
      select coalesce(sum(bytes_billed), 0) from billed where date_trunc('week', at at time zone 'UTC') = week)) order by week)
    from generate_series(date_trunc('week', now() at time zone 'UTC') - interval '11 weeks', now() at time zone 'UTC', '1 week') week)
) as report;
