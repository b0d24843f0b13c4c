-- Users with another last week than weekly_revenue's, and averages that do not give the money again, but for half a cent each.
SELECT m.user_id, m.as_of_week, m.weeks_known, m.revenue, m.average_order, m.revenue_per_week
FROM lifetime_value AS m
CROSS JOIN (SELECT MAX(week) AS week FROM weekly_revenue) AS as_of
WHERE m.as_of_week IS DISTINCT FROM as_of.week
  OR m.weeks_known <> DATE_DIFF(m.as_of_week, DATE_TRUNC(m.first_order_on, ISOWEEK), DAY) / 7 + 1
  OR ABS(m.revenue_per_week * m.weeks_known - m.revenue) > m.weeks_known * NUMERIC '0.005'
  OR ABS(m.average_order * (m.order_count - m.returned_count) - m.revenue) > m.order_count * NUMERIC '0.005'
  OR (m.average_order IS NULL) <> (m.order_count = m.returned_count);
