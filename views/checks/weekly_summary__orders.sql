-- Weeks whose counts or money differ from those of the raw orders, by a cent or more.
WITH raw AS (
  SELECT
    DATE_TRUNC(DATE(created_at), ISOWEEK) AS week,
    COUNT(*) AS order_count,
    COUNT(DISTINCT user_id) AS active_users,
    COUNT(DISTINCT store_id) AS store_count,
    IFNULL(SUM(IF(status = 'returned', 0, total)), 0) AS revenue,
    IFNULL(SUM(IF(status = 'returned', total, 0)), 0) AS refunds
  FROM orders
  GROUP BY week
)
SELECT m.week, m.order_count, raw.order_count AS raw_count, m.revenue, raw.revenue AS raw_revenue
FROM weekly_summary AS m
LEFT JOIN raw ON raw.week = m.week
WHERE m.order_count IS DISTINCT FROM IFNULL(raw.order_count, 0)
  OR m.active_users IS DISTINCT FROM IFNULL(raw.active_users, 0)
  OR m.store_count IS DISTINCT FROM IFNULL(raw.store_count, 0)
  OR m.revenue IS DISTINCT FROM IFNULL(raw.revenue, 0)
  OR m.refunds IS DISTINCT FROM IFNULL(raw.refunds, 0);
