-- The days with events before etl.to, which the first make events leaves out, and the commands that archive them: one for each stretch of
-- days; between two of them is a month without events. In psql: set etl."to" = '2018-01-01'; \i sql/older_days.sql
with recursive days as (
  -- By the index, a row a day.
  select min(created_at)::date as day from public.events where created_at >= '0001-01-01' and created_at < current_setting('etl.to')::date
  union all
  select (select min(created_at)::date from public.events where created_at >= day + 1 and created_at < current_setting('etl.to')::date)
  from days where day is not null
), gaps as (
  select day, day - lag(day) over (order by day) > 31 as gap from days where day is not null
), stretches as (
  select day, count(*) filter (where gap) over (order by day) as stretch from gaps
), commands as (
  select count(*) as days, format('make backfill-events FROM=%s TO=%s', min(day), max(day) + 1) as command from stretches group by stretch
)
select sum(days)::int as older_days, string_agg(command, '; ' order by command) as next from commands;
