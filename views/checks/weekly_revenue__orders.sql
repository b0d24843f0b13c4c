-- Weeks whose counts or money differ from those of the raw orders, by a cent or more.
WITH raw AS (
  SELECT
    DATE_TRUNC(DATE(created_at), ISOWEEK) AS week,
    COUNT(*) AS order_count,
    SUM(IF(status = 'returned', 1, 0)) AS returned_count,
    IFNULL(SUM(IF(status IS DISTINCT FROM 'returned', total, 0)), 0) AS revenue,
    IFNULL(SUM(IF(status = 'returned', total, 0)), 0) AS refunds,
    IFNULL(SUM(IF(status IS DISTINCT FROM 'returned', discount, 0)), 0) AS discount
  FROM orders
  GROUP BY week
)
SELECT m.week, m.order_count, raw.order_count AS raw_count, m.revenue, raw.revenue AS raw_revenue
FROM weekly_revenue AS m
LEFT JOIN raw ON raw.week = m.week
WHERE m.order_count IS DISTINCT FROM IFNULL(raw.order_count, 0)
  OR m.returned_count IS DISTINCT FROM IFNULL(raw.returned_count, 0)
  OR m.revenue IS DISTINCT FROM IFNULL(raw.revenue, 0)
  OR m.refunds IS DISTINCT FROM IFNULL(raw.refunds, 0)
  OR m.gross_revenue IS DISTINCT FROM IFNULL(raw.revenue + raw.refunds, 0)
  OR m.discount IS DISTINCT FROM IFNULL(raw.discount, 0);
