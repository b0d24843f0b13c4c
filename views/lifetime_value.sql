-- What has each user been worth so far?
-- Grain: one row per user with an order up to the Sunday of the last complete week. Users who never ordered are not in it.
-- It is what was paid, not a forecast. All orders since the data begins count, those before the first complete week too;
-- what a user bought before the data begins, nobody knows.
-- revenue is without returned orders (see weekly_revenue.sql), the dates and order_count are with them. Who returned everything
-- has a revenue of 0 and no average_order. Users who are missing in users are in it; orders without a user are not.
-- Clustered by user, since it is read and joined by user.
CREATE OR REPLACE TABLE lifetime_value (
  user_id INT64 OPTIONS (description = "The user: users.id, also where users lacks it. Key."),
  as_of_week DATE OPTIONS (description = "The Monday of the last ISO week that is counted, UTC; the same in all rows."),
  first_order_on DATE OPTIONS (description = "The day of the first order, UTC."),
  last_order_on DATE OPTIONS (description = "The day of the last order, UTC."),
  weeks_known INT64 OPTIONS (description = "ISO weeks from that of the first order to as_of_week, both counted."),
  order_count INT64 OPTIONS (description = "Orders of any status."),
  returned_count INT64 OPTIONS (description = "Of these, orders that were returned since."),
  gross_revenue NUMERIC OPTIONS (description = "Totals of all orders, returned ones included, in dollars."),
  refunds NUMERIC OPTIONS (description = "Totals of the returned orders, in dollars."),
  revenue NUMERIC OPTIONS (description = "The value so far: gross_revenue without refunds, in dollars."),
  average_order NUMERIC OPTIONS (description = "revenue per order that was not returned, in dollars, to the cent. NULL where all were."),
  revenue_per_week NUMERIC OPTIONS (description = "revenue by weeks_known, in dollars, to the cent.")
)
CLUSTER BY user_id
OPTIONS (description = "What each user has paid up to the last complete ISO week, net of returned orders.")
AS
WITH spent AS (
  SELECT
    o.user_id,
    as_of.week AS as_of_week,
    MIN(DATE(o.created_at)) AS first_order_on,
    MAX(DATE(o.created_at)) AS last_order_on,
    COUNT(*) AS order_count,
    COUNTIF(o.status = 'returned') AS returned_count,
    IFNULL(SUM(o.total), 0) AS gross_revenue,
    IFNULL(SUM(IF(o.status = 'returned', o.total, 0)), 0) AS refunds
  FROM orders AS o
  JOIN (SELECT MAX(week) AS week FROM weekly_revenue) AS as_of
    ON DATE(o.created_at) < DATE_ADD(as_of.week, INTERVAL 7 DAY)
  WHERE o.user_id IS NOT NULL
  GROUP BY o.user_id, as_of.week
),
valued AS (
  SELECT
    *,
    gross_revenue - refunds AS revenue,
    DATE_DIFF(as_of_week, first_order_on, WEEK(MONDAY)) + 1 AS weeks_known
  FROM spent
)
SELECT
  user_id,
  as_of_week,
  first_order_on,
  last_order_on,
  weeks_known,
  order_count,
  returned_count,
  gross_revenue,
  refunds,
  revenue,
  ROUND(CAST(revenue / NULLIF(order_count - returned_count, 0) AS NUMERIC), 2) AS average_order,
  ROUND(CAST(revenue / weeks_known AS NUMERIC), 2) AS revenue_per_week
FROM valued;
