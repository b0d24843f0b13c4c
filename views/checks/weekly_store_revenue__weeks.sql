-- Stores with a gap between their first week and the last one of weekly_revenue, or without an order in their first.
SELECT s.store_id, MIN(s.week) AS first_week, MAX(s.week) AS last_week, COUNT(DISTINCT s.week) AS week_count
FROM weekly_store_revenue AS s
CROSS JOIN (SELECT MIN(week) AS first_week, MAX(week) AS last_week FROM weekly_revenue) AS span
GROUP BY s.store_id, span.first_week, span.last_week
HAVING MAX(s.week) <> span.last_week
  OR COUNT(DISTINCT s.week) <> DATE_DIFF(MAX(s.week), MIN(s.week), DAY) / 7 + 1
  OR (MIN(s.week) > span.first_week AND SUM(s.order_count) = 0);
