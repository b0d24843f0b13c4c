-- Weeks in which the bands together do not have the orders and the revenue of weekly_revenue, or their shares not the whole
-- (each is rounded to four decimals).
SELECT r.week, r.revenue, SUM(m.revenue) AS band_revenue, SUM(m.revenue_share) AS shares
FROM weekly_revenue AS r
LEFT JOIN income_band_revenue AS m ON m.week = r.week
GROUP BY r.week, r.revenue, r.order_count
HAVING IFNULL(SUM(m.revenue), 0) <> r.revenue
  OR IFNULL(SUM(m.order_count), 0) <> r.order_count
  OR (r.revenue <> 0 AND ABS(IFNULL(SUM(m.revenue_share), 0) - 1) > COUNT(*) * NUMERIC '0.00005');
