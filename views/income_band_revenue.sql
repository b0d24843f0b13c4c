-- Which households does the revenue come from, by their income?
-- Grain: one row per ISO week and income band, the weeks of weekly_revenue times all bands. Zeros where the band bought nothing.
-- The band unknown holds the orders of users who never told, of users who are missing in users, and without a user. It is
-- always there.
-- A user's band is the one of today, for past weeks too: the shop keeps no history of it. After a user tells or moves to
-- another band, that user's past revenue moves along.
-- What counts as revenue: see weekly_revenue.sql. A dozen rows a week: too little for partitions or clusters to pay.
CREATE OR REPLACE TABLE income_band_revenue (
  week DATE OPTIONS (description = "The Monday of the ISO week, UTC. Key, with income_band."),
  income_band STRING OPTIONS (description = "Yearly income of the household, in dollars, as a range; or unknown. Key, with week."),
  active_users INT64 OPTIONS (description = "Users of the band with an order in this week."),
  order_count INT64 OPTIONS (description = "Orders of any status."),
  gross_revenue NUMERIC OPTIONS (description = "Totals of all orders, returned ones included, in dollars."),
  refunds NUMERIC OPTIONS (description = "Totals of the returned orders, in dollars."),
  revenue NUMERIC OPTIONS (description = "gross_revenue without refunds, in dollars."),
  revenue_share NUMERIC OPTIONS (description = "The band's part of the week's revenue, 0 to 1, four decimals. NULL where the week has none.")
)
OPTIONS (description = "Revenue per ISO week and income band of the household, net of returned orders. Complete weeks only, without a gap.")
AS
WITH bands AS (
  SELECT DISTINCT IFNULL(income_band, 'unknown') AS income_band FROM users
  UNION DISTINCT
  SELECT 'unknown'
),
sales AS (
  SELECT
    DATE_TRUNC(DATE(o.created_at), WEEK(MONDAY)) AS week,
    IFNULL(u.income_band, 'unknown') AS band,
    COUNT(DISTINCT o.user_id) AS active_users,
    COUNT(*) AS order_count,
    IFNULL(SUM(o.total), 0) AS gross_revenue,
    IFNULL(SUM(IF(o.status = 'returned', o.total, 0)), 0) AS refunds
  FROM orders AS o
  LEFT JOIN users AS u ON u.id = o.user_id
  GROUP BY week, band
)
SELECT
  r.week,
  bands.income_band,
  IFNULL(s.active_users, 0) AS active_users,
  IFNULL(s.order_count, 0) AS order_count,
  IFNULL(s.gross_revenue, 0) AS gross_revenue,
  IFNULL(s.refunds, 0) AS refunds,
  IFNULL(s.gross_revenue - s.refunds, 0) AS revenue,
  ROUND(CAST(IFNULL(s.gross_revenue - s.refunds, 0) / NULLIF(r.revenue, 0) AS NUMERIC), 4) AS revenue_share
FROM weekly_revenue AS r
CROSS JOIN bands
LEFT JOIN sales AS s ON s.week = r.week AND s.band = bands.income_band;
