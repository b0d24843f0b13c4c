-- What `make users` reads: the window [etl.from, etl.to) of updated_at. Its columns are the fields of
-- schemas/bigquery/users.json. In psql:
--   set etl."from" = '2017-01-01'; set etl."to" = '2017-01-02'; \i sql/users.sql
select
  id,
  age_band,
  income_band,
  home_ownership,
  marital_status,
  household_size,
  kids_count,
  created_at,
  updated_at
from public.users
where updated_at >= current_setting('etl.from')::timestamptz
  and updated_at < current_setting('etl.to')::timestamptz;
