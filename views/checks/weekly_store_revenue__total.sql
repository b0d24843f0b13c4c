-- Weeks in which the stores together do not have the revenue of weekly_revenue, or their shares not the whole (each is rounded
-- to four decimals).
SELECT r.week, r.revenue, SUM(s.revenue) AS store_revenue, SUM(s.revenue_share) AS shares
FROM weekly_revenue AS r
LEFT JOIN weekly_store_revenue AS s ON s.week = r.week
GROUP BY r.week, r.revenue
HAVING IFNULL(SUM(s.revenue), 0) <> r.revenue
  OR (r.revenue <> 0 AND ABS(IFNULL(SUM(s.revenue_share), 0) - 1) > COUNT(*) * NUMERIC '0.00005');
