-- Users who are here and have an order in the last 56 complete days, users who have none and are missing, and those whose
-- last day or revenue is not that of the raw orders.
WITH raw AS (
  SELECT
    o.user_id AS raw_user,
    DATE(MAX(o.created_at)) AS raw_day,
    IFNULL(SUM(IF(o.status = 'returned', 0, o.total)), 0) AS raw_revenue
  FROM orders AS o
  CROSS JOIN (SELECT MAX(week) AS week FROM weekly_revenue) AS as_of
  WHERE o.user_id IS NOT NULL AND o.created_at < TIMESTAMP(DATE_ADD(as_of.week, INTERVAL 7 DAY))
  GROUP BY o.user_id, as_of.week
  HAVING MAX(o.created_at) < TIMESTAMP(DATE_SUB(as_of.week, INTERVAL 49 DAY))
)
SELECT m.user_id, m.last_order_on, m.revenue, raw_user, raw_day, raw_revenue
FROM churned_users AS m
FULL JOIN raw ON raw_user = m.user_id
WHERE m.last_order_on IS DISTINCT FROM raw_day OR m.revenue IS DISTINCT FROM raw_revenue;
