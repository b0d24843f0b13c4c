-- What did the shop take in, week by week?
-- Grain: one row per ISO week (Monday to Sunday, UTC), without a gap. A week without any order has zeros.
--
-- Every other model takes its weeks from here, so this file alone decides which weeks count:
-- * the first is that of the first Monday on or after the first order's day: data that begins on a Wednesday has no whole
--   week before the next Monday;
-- * the last, "as of", is the latest week with an order that an order of a later week proves to be over. Never CURRENT_DATE:
--   the same orders give the same rows on any day. A week without orders at the very end is not there until orders follow.
-- What counts as revenue:
-- * completed and placed: their total (created_at is when it was paid). no_charge: an order, with a total of 0;
-- * returned: the money went back. It counts in gross_revenue and again in refunds, so revenue is without it, in the week of
--   the order, not of the return, whose date the shop does not record. A past week's revenue therefore falls when one of
--   its orders is returned later;
-- * any other status stops the publication (checks/weekly_revenue__statuses.sql) until somebody decides what it means.
-- A NULL total or discount counts as 0.
-- In all models a quotient is cast to NUMERIC before it is rounded: half a cent is exact there, and not in FLOAT64.
-- A row a week is too little for partitions or clusters to pay.
CREATE OR REPLACE TABLE weekly_revenue (
  week DATE OPTIONS (description = "The Monday of the ISO week, UTC. Key."),
  order_count INT64 OPTIONS (description = "Orders of any status."),
  returned_count INT64 OPTIONS (description = "Of these, orders that were returned since."),
  gross_revenue NUMERIC OPTIONS (description = "Totals of all orders, returned ones included, in dollars."),
  refunds NUMERIC OPTIONS (description = "Totals of the returned orders, in dollars."),
  revenue NUMERIC OPTIONS (description = "gross_revenue without refunds, in dollars."),
  discount NUMERIC OPTIONS (description = "What was taken off the orders that were not returned, in dollars.")
)
OPTIONS (description = "Revenue per ISO week, net of returned orders. Complete weeks only, without a gap.")
AS
WITH sales AS (
  SELECT
    DATE_TRUNC(DATE(created_at), WEEK(MONDAY)) AS week,
    COUNT(*) AS order_count,
    COUNTIF(status = 'returned') AS returned_count,
    SUM(total) AS gross_revenue,
    SUM(IF(status = 'returned', total, 0)) AS refunds,
    SUM(IF(status = 'returned', 0, discount)) AS discount
  FROM orders
  GROUP BY week
),
span AS (
  SELECT
    (SELECT DATE_TRUNC(DATE_ADD(MIN(DATE(created_at)), INTERVAL 6 DAY), WEEK(MONDAY)) FROM orders) AS first_week,
    (SELECT MAX(week) FROM sales WHERE week < (SELECT MAX(week) FROM sales)) AS as_of_week
)
SELECT
  calendar_week AS week,
  IFNULL(s.order_count, 0) AS order_count,
  IFNULL(s.returned_count, 0) AS returned_count,
  IFNULL(s.gross_revenue, 0) AS gross_revenue,
  IFNULL(s.refunds, 0) AS refunds,
  IFNULL(s.gross_revenue, 0) - IFNULL(s.refunds, 0) AS revenue,
  IFNULL(s.discount, 0) AS discount
FROM span
CROSS JOIN UNNEST(GENERATE_DATE_ARRAY(first_week, as_of_week, INTERVAL 1 WEEK)) AS calendar_week
LEFT JOIN sales AS s ON s.week = calendar_week;
