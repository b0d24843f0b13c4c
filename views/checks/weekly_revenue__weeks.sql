-- Weeks that do not begin on a Monday, or not seven days after the one before.
SELECT week, previous_week
FROM (SELECT week, LAG(week) OVER (ORDER BY week) AS previous_week FROM weekly_revenue)
WHERE EXTRACT(DAYOFWEEK FROM week) <> 2 OR DATE_DIFF(week, previous_week, DAY) <> 7;
