-- Of the users who ordered lately, how many ordered more than once?
-- Grain: one row per ISO week, from the eighth complete week on, without a gap. "Lately" is the eight weeks that end with it,
-- so all weeks compare, and one week's rate shares seven eighths of its orders with its neighbour's.
-- Any order counts, a returned one too, and two on one day are two. Orders without a user are in nobody's count.
-- A row a week is too little for partitions or clusters to pay.
CREATE OR REPLACE TABLE repeat_rate (
  week DATE OPTIONS (description = "The Monday of the last of the eight ISO weeks, UTC. Key."),
  user_count INT64 OPTIONS (description = "Users with an order in the eight weeks."),
  repeat_count INT64 OPTIONS (description = "Of these, users with two orders or more in the eight weeks."),
  repeat_share NUMERIC OPTIONS (description = "repeat_count by user_count, 0 to 1, four decimals. NULL where nobody ordered.")
)
OPTIONS (description = "The share of users with a second order within eight weeks, per ISO week. Complete weeks only, without a gap.")
AS
WITH visits AS (
  SELECT user_id, DATE_TRUNC(DATE(created_at), WEEK(MONDAY)) AS week, COUNT(*) AS order_count
  FROM orders
  WHERE user_id IS NOT NULL
  GROUP BY user_id, week
),
-- An order is in eight windows: its own week's and the seven following ones'.
windows AS (
  SELECT DATE_ADD(v.week, INTERVAL later WEEK) AS window_week, v.user_id, SUM(v.order_count) AS order_count
  FROM visits AS v
  CROSS JOIN UNNEST(GENERATE_ARRAY(0, 7)) AS later
  GROUP BY window_week, v.user_id
)
SELECT
  r.week,
  COUNT(w.user_id) AS user_count,
  COUNTIF(w.order_count >= 2) AS repeat_count,
  ROUND(CAST(COUNTIF(w.order_count >= 2) / NULLIF(COUNT(w.user_id), 0) AS NUMERIC), 4) AS repeat_share
FROM weekly_revenue AS r
LEFT JOIN windows AS w ON w.window_week = r.week
WHERE r.week >= (SELECT DATE_ADD(MIN(week), INTERVAL 7 WEEK) FROM weekly_revenue)
GROUP BY r.week;
