-- Stores and weeks whose counts or money differ from those of the raw orders, and those that are missing.
WITH span AS (
  SELECT MIN(week) AS first_day, DATE_ADD(MAX(week), INTERVAL 6 DAY) AS last_day FROM weekly_revenue
),
raw AS (
  SELECT
    DATE_TRUNC(DATE(o.created_at), ISOWEEK) AS raw_week,
    IFNULL(o.store_id, -1) AS raw_store,
    COUNT(*) AS raw_count,
    SUM(IF(o.status = 'returned', 1, 0)) AS raw_returned,
    IFNULL(SUM(o.total), 0) AS raw_gross,
    IFNULL(SUM(IF(o.status = 'returned', 0, o.total)), 0) AS raw_revenue
  FROM orders AS o
  JOIN span ON DATE(o.created_at) BETWEEN span.first_day AND span.last_day
  GROUP BY raw_week, raw_store
)
SELECT m.week, m.store_id, m.order_count, m.revenue, raw_week, raw_store, raw_count, raw_revenue
FROM weekly_store_revenue AS m
FULL JOIN raw ON raw_week = m.week AND raw_store = m.store_id
WHERE m.week IS NULL
  OR m.order_count IS DISTINCT FROM IFNULL(raw_count, 0)
  OR m.returned_count IS DISTINCT FROM IFNULL(raw_returned, 0)
  OR m.gross_revenue IS DISTINCT FROM IFNULL(raw_gross, 0)
  OR m.revenue IS DISTINCT FROM IFNULL(raw_revenue, 0)
  OR m.refunds IS DISTINCT FROM IFNULL(raw_gross - raw_revenue, 0);
