-- Weeks and bands whose users, counts or money differ from those of the raw orders.
WITH raw AS (
  SELECT
    DATE_TRUNC(DATE(o.created_at), ISOWEEK) AS week,
    IFNULL((SELECT MAX(u.income_band) FROM users AS u WHERE u.id = o.user_id), 'unknown') AS band,
    o.user_id,
    o.status,
    o.total
  FROM orders AS o
),
expected AS (
  SELECT
    week,
    band,
    COUNT(DISTINCT user_id) AS active_users,
    COUNT(*) AS order_count,
    IFNULL(SUM(total), 0) AS gross_revenue,
    IFNULL(SUM(IF(status = 'returned', 0, total)), 0) AS revenue
  FROM raw
  GROUP BY week, band
)
SELECT m.week, m.income_band, m.order_count, e.order_count AS raw_count, m.revenue, e.revenue AS raw_revenue
FROM income_band_revenue AS m
LEFT JOIN expected AS e ON e.week = m.week AND e.band = m.income_band
WHERE m.active_users IS DISTINCT FROM IFNULL(e.active_users, 0)
  OR m.order_count IS DISTINCT FROM IFNULL(e.order_count, 0)
  OR m.gross_revenue IS DISTINCT FROM IFNULL(e.gross_revenue, 0)
  OR m.revenue IS DISTINCT FROM IFNULL(e.revenue, 0)
  OR m.refunds IS DISTINCT FROM IFNULL(e.gross_revenue - e.revenue, 0);
