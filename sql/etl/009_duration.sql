-- 93784 → 1d 2h, 125 → 2m 5s: the two largest units of a duration in seconds, as shared/table.ts writes them. For sql/status.sql and
-- sql/report.sql.
create function etl.duration(seconds float8) returns text language sql immutable strict as $$
  select coalesce(substring(format('%sd %sh %sm %ss', s / 86400, s / 3600 % 24, s / 60 % 60, s % 60)
    from '\m([1-9]\d*\w(?: \d+\w)?)'), '0s')
  from (select greatest(0, round(seconds))::bigint as s) whole
$$;
