-- Who has stopped ordering, when, and what were they worth?
-- Grain: one row per user without an order in the last eight complete weeks: the last order's week is eight weeks or more before
-- the last complete week. Who orders again is no longer in it (weekly_users counts them as won back).
-- An order of any status keeps a user, a returned one too. Orders after the last complete week do not count yet: who came
-- back this very week is still in it, so look at orders before you write to them.
-- Clustered by the week of churning: a campaign reads the latest.
CREATE OR REPLACE TABLE churned_users (
  user_id INT64 OPTIONS (description = "The user: users.id. Key."),
  as_of_week DATE OPTIONS (description = "The Monday of the last ISO week that is counted, UTC; the same in all rows."),
  last_order_on DATE OPTIONS (description = "The day of the last order, UTC."),
  weeks_gone INT64 OPTIONS (description = "ISO weeks without an order since, up to as_of_week; 8 or more."),
  churned_week DATE OPTIONS (description = "The Monday of the eighth ISO week without an order, UTC."),
  order_count INT64 OPTIONS (description = "Orders of any status, ever."),
  revenue NUMERIC OPTIONS (description = "What was paid, returned orders left out, in dollars."),
  segment STRING OPTIONS (description = "The segment of rfm_segments.")
)
CLUSTER BY churned_week
OPTIONS (description = "Users without an order in the last eight complete ISO weeks.")
AS
WITH gone AS (
  SELECT
    user_id,
    as_of_week,
    last_order_on,
    DATE_DIFF(as_of_week, last_order_on, WEEK(MONDAY)) AS weeks_gone,
    DATE_ADD(DATE_TRUNC(last_order_on, WEEK(MONDAY)), INTERVAL 8 WEEK) AS churned_week,
    order_count,
    revenue
  FROM lifetime_value
)
SELECT
  g.user_id,
  g.as_of_week,
  g.last_order_on,
  g.weeks_gone,
  g.churned_week,
  g.order_count,
  g.revenue,
  s.segment
FROM gone AS g
LEFT JOIN rfm_segments AS s ON s.user_id = g.user_id
WHERE g.weeks_gone >= 8;
