-- Weeks whose counts differ from those of the raw orders, or whose mean value does not give their money: times the baskets it
-- is the raw orders' total, but for half a cent a basket.
WITH raw AS (
  SELECT
    DATE_TRUNC(DATE(created_at), ISOWEEK) AS week,
    COUNT(*) AS order_count,
    SUM(IF(status = 'returned', 0, 1)) AS basket_count,
    SUM(IF(status = 'no_charge', 1, 0)) AS no_charge_count,
    IFNULL(SUM(IF(status = 'returned', 0, item_count)), 0) AS item_count,
    IFNULL(SUM(IF(status = 'returned', 0, total)), 0) AS revenue
  FROM orders
  GROUP BY week
)
SELECT m.week, m.order_count, m.basket_count, m.item_count, m.basket_value, raw.revenue
FROM weekly_baskets AS m
LEFT JOIN raw ON raw.week = m.week
WHERE m.order_count IS DISTINCT FROM IFNULL(raw.order_count, 0)
  OR m.basket_count IS DISTINCT FROM IFNULL(raw.basket_count, 0)
  OR m.no_charge_count IS DISTINCT FROM IFNULL(raw.no_charge_count, 0)
  OR m.item_count IS DISTINCT FROM IFNULL(raw.item_count, 0)
  OR (raw.basket_count > 0 AND m.basket_value IS NULL)
  OR ABS(m.basket_value * m.basket_count - IFNULL(raw.revenue, 0)) > m.basket_count * NUMERIC '0.005';
