-- Users whose baskets or money differ from those of the raw orders up to the last complete week, and those that are missing.
WITH raw AS (
  SELECT
    o.user_id AS raw_user,
    SUM(IF(o.status = 'returned', 0, 1)) AS raw_count,
    SUM(IF(o.status IS DISTINCT FROM 'returned' AND o.discount > 0, 1, 0)) AS raw_discounted,
    IFNULL(SUM(IF(o.status = 'returned', 0, o.total)), 0) AS raw_revenue,
    IFNULL(SUM(IF(o.status = 'returned', 0, o.discount)), 0) AS raw_discount
  FROM orders AS o
  WHERE o.user_id IS NOT NULL
    AND o.created_at < (SELECT TIMESTAMP(DATE_ADD(MAX(week), INTERVAL 7 DAY)) FROM weekly_revenue)
  GROUP BY raw_user
)
SELECT m.user_id, m.basket_count, m.revenue, m.discount, raw_user, raw_count, raw_revenue, raw_discount
FROM discount_dependence AS m
FULL JOIN raw ON raw_user = m.user_id
WHERE m.basket_count IS DISTINCT FROM raw_count
  OR m.discounted_count IS DISTINCT FROM raw_discounted
  OR m.revenue IS DISTINCT FROM raw_revenue
  OR m.discount IS DISTINCT FROM raw_discount;
