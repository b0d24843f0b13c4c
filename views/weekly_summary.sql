-- How is the shop doing? The figures of the other models, a row a week.
-- Grain: one row per ISO week, the weeks of weekly_revenue: complete ones only, without a gap.
-- Each figure is the other model's own, so its caveats are there. NULL where there is nothing to divide by, for repeat_share in
-- the first seven weeks, and for retention_4_weeks where the cohort of four weeks before is empty or not complete.
-- revenue_change compares with the week before, whatever holidays there were. churned_count is as of the last week: a user who
-- comes back later leaves it, so the counts of past weeks fall a little with time.
-- A row a week is too little for partitions or clusters to pay.
CREATE OR REPLACE TABLE weekly_summary (
  week DATE OPTIONS (description = "The Monday of the ISO week, UTC. Key."),
  iso_week STRING OPTIONS (description = "The ISO year and week, such as 2020-W53."),
  order_count INT64 OPTIONS (description = "Orders of any status."),
  revenue NUMERIC OPTIONS (description = "Totals without returned orders, in dollars."),
  revenue_change NUMERIC OPTIONS (description = "Change of revenue against the week before as a part of it, four decimals. NULL for the first week and after one without revenue."),
  refunds NUMERIC OPTIONS (description = "Totals of the returned orders, in dollars."),
  discount_share NUMERIC OPTIONS (description = "Discount by the shelf price (revenue and discount), 0 to 1, four decimals."),
  store_count INT64 OPTIONS (description = "Stores with an order."),
  items_per_basket NUMERIC OPTIONS (description = "Mean number of items of a basket, two decimals."),
  basket_value NUMERIC OPTIONS (description = "Mean total of a basket, in dollars, to the cent."),
  active_users INT64 OPTIONS (description = "Users with an order in this week."),
  new_users INT64 OPTIONS (description = "Of these, users with their first order."),
  returning_users INT64 OPTIONS (description = "Of these, users who had ordered in an earlier week."),
  repeat_share NUMERIC OPTIONS (description = "The share of users with two orders or more in the eight weeks that end here, 0 to 1."),
  retention_4_weeks NUMERIC OPTIONS (description = "The share of the users first seen four weeks before who ordered in this week, 0 to 1."),
  known_income_share NUMERIC OPTIONS (description = "The part of revenue from users whose income band is known, 0 to 1, four decimals."),
  churned_count INT64 OPTIONS (description = "Users whose eighth week without an order this was, and who have not come back.")
)
OPTIONS (description = "One row of key figures per complete ISO week, from the other models.")
AS
WITH store_counts AS (
  SELECT week, COUNTIF(order_count > 0 AND store_id <> -1) AS store_count
  FROM weekly_store_revenue
  GROUP BY week
),
incomes AS (
  SELECT week, SUM(IF(income_band = 'unknown', 0, revenue)) AS known_revenue
  FROM income_band_revenue
  GROUP BY week
),
churn AS (
  SELECT churned_week, COUNT(*) AS churned_count FROM churned_users GROUP BY churned_week
),
money AS (
  SELECT *, LAG(revenue) OVER (ORDER BY week) AS previous_revenue FROM weekly_revenue
)
SELECT
  m.week,
  FORMAT_DATE('%G-W%V', m.week) AS iso_week,
  m.order_count,
  m.revenue,
  ROUND(CAST((m.revenue - m.previous_revenue) / NULLIF(m.previous_revenue, 0) AS NUMERIC), 4) AS revenue_change,
  m.refunds,
  ROUND(CAST(m.discount / NULLIF(m.revenue + m.discount, 0) AS NUMERIC), 4) AS discount_share,
  IFNULL(store_counts.store_count, 0) AS store_count,
  b.items_per_basket,
  b.basket_value,
  u.active_users,
  u.new_users,
  u.returning_users,
  r.repeat_share,
  c.retention AS retention_4_weeks,
  ROUND(CAST(i.known_revenue / NULLIF(m.revenue, 0) AS NUMERIC), 4) AS known_income_share,
  IFNULL(churn.churned_count, 0) AS churned_count
FROM money AS m
LEFT JOIN store_counts ON store_counts.week = m.week
LEFT JOIN weekly_baskets AS b ON b.week = m.week
LEFT JOIN weekly_users AS u ON u.week = m.week
LEFT JOIN repeat_rate AS r ON r.week = m.week
LEFT JOIN cohort_retention AS c ON c.week = m.week AND c.weeks_since = 4
LEFT JOIN incomes AS i ON i.week = m.week
LEFT JOIN churn ON churn.churned_week = m.week;
