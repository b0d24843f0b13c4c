-- How many users ordered in a week, how many of them for the first time, and how many came back?
-- Grain: one row per ISO week, the weeks of weekly_revenue. A week without orders has zeros.
-- Any order makes its user active, a returned one too: a return takes the money back, not the visit. So the counts of a past
-- week do not move when one of its orders is returned.
-- The days before the first complete week are known too: who ordered then is returning, not new. But nobody knows who ordered
-- before the data begins, so the first weeks have too many new users.
-- Orders without a user are in nobody's count; a user who is missing in users counts like any other.
-- A row a week is too little for partitions or clusters to pay.
CREATE OR REPLACE TABLE weekly_users (
  week DATE OPTIONS (description = "The Monday of the ISO week, UTC. Key."),
  active_users INT64 OPTIONS (description = "Users with an order in this week: new_users and returning_users."),
  new_users INT64 OPTIONS (description = "Users whose first order ever is in this week."),
  returning_users INT64 OPTIONS (description = "Active users who had ordered in an earlier week."),
  won_back_users INT64 OPTIONS (description = "Of the returning users, those who had been gone for more than eight weeks: churned, as churned_users has it.")
)
OPTIONS (description = "Active, new and returning users per ISO week. Complete weeks only, without a gap.")
AS
WITH visits AS (
  SELECT DISTINCT user_id, DATE_TRUNC(DATE(created_at), WEEK(MONDAY)) AS week
  FROM orders
  WHERE user_id IS NOT NULL
),
dated AS (
  SELECT user_id, week, LAG(week) OVER (PARTITION BY user_id ORDER BY week) AS previous_week
  FROM visits
)
SELECT
  r.week,
  COUNT(d.user_id) AS active_users,
  COUNTIF(d.user_id IS NOT NULL AND d.previous_week IS NULL) AS new_users,
  COUNT(d.previous_week) AS returning_users,
  COUNTIF(DATE_DIFF(d.week, d.previous_week, DAY) > 8 * 7) AS won_back_users
FROM weekly_revenue AS r
LEFT JOIN dated AS d ON d.week = r.week
GROUP BY r.week;
