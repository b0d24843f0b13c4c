-- Users whose orders, days or money differ from those of the raw orders up to the last complete week, and those that are missing.
WITH raw AS (
  SELECT
    o.user_id AS raw_user,
    COUNT(*) AS raw_count,
    MIN(o.created_at) AS raw_first,
    MAX(o.created_at) AS raw_last,
    IFNULL(SUM(o.total), 0) AS raw_gross,
    IFNULL(SUM(IF(o.status = 'returned', 0, o.total)), 0) AS raw_revenue
  FROM orders AS o
  WHERE o.user_id IS NOT NULL
    AND o.created_at < (SELECT TIMESTAMP(DATE_ADD(MAX(week), INTERVAL 7 DAY)) FROM weekly_revenue)
  GROUP BY raw_user
)
SELECT m.user_id, m.order_count, m.revenue, raw_user, raw_count, raw_revenue
FROM lifetime_value AS m
FULL JOIN raw ON raw_user = m.user_id
WHERE m.order_count IS DISTINCT FROM raw_count
  OR m.first_order_on IS DISTINCT FROM DATE(raw_first)
  OR m.last_order_on IS DISTINCT FROM DATE(raw_last)
  OR m.gross_revenue IS DISTINCT FROM raw_gross
  OR m.revenue IS DISTINCT FROM raw_revenue
  OR m.refunds IS DISTINCT FROM raw_gross - raw_revenue;
