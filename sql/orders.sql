-- What `make orders` reads: the window [etl.from, etl.to) of updated_at. Its columns are the fields of
-- schemas/bigquery/orders.json. In psql:
--   set etl."from" = '2017-01-01'; set etl."to" = '2017-01-02'; \i sql/orders.sql
select
  id,
  user_id,
  store_id,
  status,
  item_count,
  total,
  discount,
  created_at,
  updated_at
from public.orders
where updated_at >= current_setting('etl.from')::timestamptz
  and updated_at < current_setting('etl.to')::timestamptz;
