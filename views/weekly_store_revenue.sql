-- What did each store take in, week by week?
-- Grain: one row per store and ISO week, from the week of the store's first order to the last complete week. A week in which
-- the store sold nothing has zeros.
-- Which weeks, and what counts as revenue: see weekly_revenue.sql.
-- A store is one from its first order on, and stays one: the shop does not record when a store closes. Orders without a store
-- are those of store -1.
-- The one weekly model that grows with the shop (stores times weeks): a partition per month of weeks, clustered by store.
CREATE OR REPLACE TABLE weekly_store_revenue (
  week DATE OPTIONS (description = "The Monday of the ISO week, UTC. Key, with store_id."),
  store_id INT64 OPTIONS (description = "The store's number; -1 for orders without a store. Key, with week."),
  order_count INT64 OPTIONS (description = "Orders of any status."),
  returned_count INT64 OPTIONS (description = "Of these, orders that were returned since."),
  gross_revenue NUMERIC OPTIONS (description = "Totals of all orders, returned ones included, in dollars."),
  refunds NUMERIC OPTIONS (description = "Totals of the returned orders, in dollars."),
  revenue NUMERIC OPTIONS (description = "gross_revenue without refunds, in dollars."),
  revenue_share NUMERIC OPTIONS (description = "The store's part of the week's revenue, 0 to 1, four decimals. NULL where the week has none.")
)
PARTITION BY DATE_TRUNC(week, MONTH)
CLUSTER BY store_id
OPTIONS (description = "Revenue per store and ISO week, net of returned orders. Complete weeks only, without a gap since the store's first order.")
AS
WITH sales AS (
  SELECT
    DATE_TRUNC(DATE(created_at), WEEK(MONDAY)) AS week,
    IFNULL(store_id, -1) AS store,
    COUNT(*) AS order_count,
    COUNTIF(status = 'returned') AS returned_count,
    IFNULL(SUM(total), 0) AS gross_revenue,
    IFNULL(SUM(IF(status = 'returned', total, 0)), 0) AS refunds
  FROM orders
  GROUP BY week, store
),
opened AS (
  SELECT store, MIN(week) AS first_week FROM sales GROUP BY store
)
SELECT
  r.week,
  opened.store AS store_id,
  IFNULL(s.order_count, 0) AS order_count,
  IFNULL(s.returned_count, 0) AS returned_count,
  IFNULL(s.gross_revenue, 0) AS gross_revenue,
  IFNULL(s.refunds, 0) AS refunds,
  IFNULL(s.gross_revenue - s.refunds, 0) AS revenue,
  ROUND(CAST(IFNULL(s.gross_revenue - s.refunds, 0) / NULLIF(r.revenue, 0) AS NUMERIC), 4) AS revenue_share
FROM weekly_revenue AS r
JOIN opened ON opened.first_week <= r.week
LEFT JOIN sales AS s ON s.week = r.week AND s.store = opened.store;
