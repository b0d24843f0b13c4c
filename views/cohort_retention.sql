-- Of the users who first ordered in a week, how many order in the weeks after?
-- Grain: one row per cohort (the ISO week of its users' first order) and week since, from 0 to the last complete week, without
-- a gap. A week in which none of the cohort ordered has zeros. A week that brought no new user has no cohort.
-- Whose first order lies before the first complete week is in no cohort: that week is not whole. And nobody knows who ordered
-- before the data begins: the first cohorts hold old customers too.
-- Any order is a visit, a returned one too; revenue is without it. Orders without a user are in no cohort.
-- Cohorts times weeks: thousands of rows a year, too few for partitions or clusters to pay.
CREATE OR REPLACE TABLE cohort_retention (
  cohort_week DATE OPTIONS (description = "The Monday of the ISO week of the users' first order, UTC. Key, with weeks_since."),
  weeks_since INT64 OPTIONS (description = "Weeks from cohort_week to week; 0 is the week of the first order. Key, with cohort_week."),
  week DATE OPTIONS (description = "The Monday of the ISO week that is looked at, UTC."),
  cohort_size INT64 OPTIONS (description = "Users of the cohort."),
  active_users INT64 OPTIONS (description = "Of these, users with an order in this week."),
  retention NUMERIC OPTIONS (description = "active_users by cohort_size, 0 to 1, four decimals."),
  revenue NUMERIC OPTIONS (description = "Totals of the cohort's orders of this week that were not returned, in dollars.")
)
OPTIONS (description = "Retention by ISO week of the first order. Complete weeks only, without a gap.")
AS
WITH visits AS (
  SELECT
    user_id,
    DATE_TRUNC(DATE(created_at), WEEK(MONDAY)) AS week,
    IFNULL(SUM(IF(status = 'returned', 0, total)), 0) AS revenue
  FROM orders
  WHERE user_id IS NOT NULL
  GROUP BY user_id, week
),
members AS (
  SELECT user_id, MIN(week) AS cohort_week FROM visits GROUP BY user_id
),
cohorts AS (
  SELECT cohort_week, COUNT(*) AS cohort_size
  FROM members
  WHERE cohort_week >= (SELECT MIN(week) FROM weekly_revenue)
  GROUP BY cohort_week
),
activity AS (
  SELECT m.cohort_week, v.week, COUNT(*) AS active_users, SUM(v.revenue) AS revenue
  FROM visits AS v
  JOIN members AS m ON m.user_id = v.user_id
  GROUP BY m.cohort_week, v.week
)
SELECT
  c.cohort_week,
  DATE_DIFF(r.week, c.cohort_week, WEEK(MONDAY)) AS weeks_since,
  r.week,
  c.cohort_size,
  IFNULL(a.active_users, 0) AS active_users,
  ROUND(CAST(IFNULL(a.active_users, 0) / c.cohort_size AS NUMERIC), 4) AS retention,
  IFNULL(a.revenue, 0) AS revenue
FROM cohorts AS c
JOIN weekly_revenue AS r ON r.week >= c.cohort_week
LEFT JOIN activity AS a ON a.cohort_week = c.cohort_week AND a.week = r.week;
