-- The first and the last week, where they are not those that follow from the orders' days.
WITH days AS (
  SELECT DATE(created_at) AS day FROM orders
),
ends AS (
  SELECT MIN(day) AS first_day, DATE_TRUNC(MAX(day), ISOWEEK) AS open_week FROM days
),
expected AS (
  SELECT
    -- The Monday of the first day's week, where that is not the first day itself the next one.
    DATE_ADD(
      DATE_TRUNC(MIN(ends.first_day), ISOWEEK),
      INTERVAL IF(DATE_TRUNC(MIN(ends.first_day), ISOWEEK) < MIN(ends.first_day), 7, 0) DAY
    ) AS first_week,
    DATE_TRUNC(MAX(days.day), ISOWEEK) AS last_week
  FROM ends
  JOIN days ON days.day < ends.open_week
),
found AS (
  SELECT MIN(week) AS first_week, MAX(week) AS last_week FROM weekly_revenue
)
SELECT expected.first_week, expected.last_week, found.first_week AS found_first, found.last_week AS found_last
FROM expected
CROSS JOIN found
WHERE IF(expected.first_week <= expected.last_week, expected.first_week, NULL) IS DISTINCT FROM found.first_week
  OR IF(expected.first_week <= expected.last_week, expected.last_week, NULL) IS DISTINCT FROM found.last_week;
