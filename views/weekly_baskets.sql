-- How many orders were there, and how large was a basket?
-- Grain: one row per ISO week, the weeks of weekly_revenue. A week without orders has zeros, and NULL for what is per order.
-- A basket is an order that was not returned; no_charge orders are baskets of value 0 and pull the averages down.
-- Items are purchase lines (distinct products), not pieces. The median is the lower one of the two middle baskets.
-- A row a week is too little for partitions or clusters to pay.
CREATE OR REPLACE TABLE weekly_baskets (
  week DATE OPTIONS (description = "The Monday of the ISO week, UTC. Key."),
  order_count INT64 OPTIONS (description = "Orders of any status, returned ones included."),
  basket_count INT64 OPTIONS (description = "Orders that were not returned. All that follows is about these."),
  no_charge_count INT64 OPTIONS (description = "Baskets with the status no_charge."),
  single_item_count INT64 OPTIONS (description = "Baskets of one item."),
  item_count INT64 OPTIONS (description = "Items in all baskets."),
  items_per_basket NUMERIC OPTIONS (description = "Mean number of items, two decimals."),
  basket_value NUMERIC OPTIONS (description = "Mean total, in dollars, to the cent."),
  median_basket NUMERIC OPTIONS (description = "Median total, in dollars."),
  largest_basket NUMERIC OPTIONS (description = "Largest total, in dollars.")
)
OPTIONS (description = "Orders and basket size per ISO week. Complete weeks only, without a gap.")
AS
WITH counts AS (
  SELECT DATE_TRUNC(DATE(created_at), WEEK(MONDAY)) AS week, COUNT(*) AS order_count
  FROM orders
  GROUP BY week
),
kept AS (
  SELECT DATE_TRUNC(DATE(created_at), WEEK(MONDAY)) AS week, status, item_count, IFNULL(total, 0) AS total
  FROM orders
  WHERE status IS DISTINCT FROM 'returned'
),
measured AS (
  SELECT *, PERCENTILE_DISC(total, 0.5) OVER (PARTITION BY week) AS median
  FROM kept
),
baskets AS (
  SELECT
    week,
    COUNT(*) AS basket_count,
    COUNTIF(status = 'no_charge') AS no_charge_count,
    COUNTIF(item_count = 1) AS single_item_count,
    IFNULL(SUM(item_count), 0) AS item_count,
    SUM(total) AS total,
    MAX(median) AS median_basket,
    MAX(total) AS largest_basket
  FROM measured
  GROUP BY week
)
SELECT
  r.week,
  IFNULL(c.order_count, 0) AS order_count,
  IFNULL(b.basket_count, 0) AS basket_count,
  IFNULL(b.no_charge_count, 0) AS no_charge_count,
  IFNULL(b.single_item_count, 0) AS single_item_count,
  IFNULL(b.item_count, 0) AS item_count,
  ROUND(CAST(b.item_count / b.basket_count AS NUMERIC), 2) AS items_per_basket,
  ROUND(CAST(b.total / b.basket_count AS NUMERIC), 2) AS basket_value,
  b.median_basket,
  b.largest_basket
FROM weekly_revenue AS r
LEFT JOIN counts AS c ON c.week = r.week
LEFT JOIN baskets AS b ON b.week = r.week;
