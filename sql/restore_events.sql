-- Puts the archived rows of temp table lines, a row as JSON each, in the place of those of a day in etl.events_restored. For make
-- restore-events, which has checked them. In psql, after: create temp table lines (line text); \copy lines from …
--   set etl."from" = '2017-01-18'; set etl."to" = '2017-01-19'; \i sql/restore_events.sql
do $$
declare
  day_start timestamptz := current_setting('etl.from');
  day_end timestamptz := current_setting('etl.to');
  command text := format('FROM=%s TO=%s', day_start::date, day_end::date);
  lost text;
  moved record;
begin
  if to_regclass('pg_temp.lines') is null then create temp table lines (line text); end if; -- make check has none
  lock table etl.events_restored in share row exclusive mode; -- another restore waits
  delete from etl.events_restored where created_at >= day_start and created_at < day_end;
  execute (
    -- jsonb_populate_record takes JSON's null for NULL.
    select format('insert into etl.events_restored (%s) select %s from (select line::jsonb as line from lines) l, '
        'jsonb_populate_record(null::etl.events_restored, line) r', string_agg(quote_ident(attname), ', ' order by attnum),
      string_agg(format(case atttypid when 'jsonb'::regtype then 'line -> %L' else 'r.%I' end, attname), ', ' order by attnum))
    from pg_attribute where attrelid = 'etl.events_restored'::regclass and attnum > 0 and not attisdropped);
  select key into lost from lines, json_object_keys(line::json) key
  where key not in (select attname from pg_attribute where attrelid = 'etl.events_restored'::regclass) limit 1;
  if found then
    raise exception using message = format('etl.events_restored has no column "%s", and its rows do. Run: alter table etl.events_restored '
      'add "%1$s" text; (or another type) then: make restore-events %2$s', lost, command);
  end if;
exception
  when not_null_violation then
    get stacked diagnostics lost = column_name;
    raise exception using message = format('its rows were archived without column "%s", which is NOT NULL in etl.events_restored. '
      'Run: alter table etl.events_restored alter "%1$s" drop not null; then: make restore-events %2$s', lost, command);
  when unique_violation then
    select id, created_at::date as day into moved from etl.events_restored
    where id in (select (line::jsonb ->> 'id')::bigint from lines) and not (created_at >= day_start and created_at < day_end) limit 1;
    if not found then raise; end if;
    raise exception using message = format('row id=%s is restored with %s already: its created_at changed between the two archives. '
      'Next: make verify-events FROM=%2$s TO=%3$s; make verify-events %4$s. Archive again the day that differs, as that says, '
      'and restore both',
      moved.id, moved.day, moved.day + 1, command);
end $$;
