-- Who buys only when something is taken off the price?
-- Grain: one row per user with an order up to the Sunday of the last complete week (the users of lifetime_value).
-- Only orders that were not returned count; who returned everything has zeros and the dependence none.
-- The shelf price is revenue and discount together; discount_share is the part of it that the shop gave away, by loyalty card
-- and coupon match. A discount says that a price was reduced, not that the user came for it: everybody with a loyalty card has
-- some. The limits of 10 and 20 percent fit this shop, where half of the users are between 11 and 18: look at yours.
-- Clustered by user, since it is read and joined by user.
CREATE OR REPLACE TABLE discount_dependence (
  user_id INT64 OPTIONS (description = "The user: users.id. Key."),
  as_of_week DATE OPTIONS (description = "The Monday of the last ISO week that is counted, UTC; the same in all rows."),
  basket_count INT64 OPTIONS (description = "Orders that were not returned."),
  discounted_count INT64 OPTIONS (description = "Of these, orders with a discount."),
  revenue NUMERIC OPTIONS (description = "What was paid for them, in dollars."),
  discount NUMERIC OPTIONS (description = "What was taken off, in dollars."),
  discount_share NUMERIC OPTIONS (description = "discount by the shelf price (revenue and discount), 0 to 1, four decimals. NULL where the shelf price is 0."),
  dependence STRING OPTIONS (description = "none: no discount; low: under 10 percent of the shelf price; medium: under 20; high: 20 or more.")
)
CLUSTER BY user_id
OPTIONS (description = "How much of what each user bought was discounted, up to the last complete ISO week, returned orders left out.")
AS
WITH bought AS (
  SELECT
    o.user_id,
    as_of.week AS as_of_week,
    COUNTIF(o.status IS DISTINCT FROM 'returned') AS basket_count,
    COUNTIF(o.status IS DISTINCT FROM 'returned' AND o.discount > 0) AS discounted_count,
    IFNULL(SUM(IF(o.status = 'returned', 0, o.total)), 0) AS revenue,
    IFNULL(SUM(IF(o.status = 'returned', 0, o.discount)), 0) AS discount
  FROM orders AS o
  JOIN (SELECT MAX(week) AS week FROM weekly_revenue) AS as_of
    ON DATE(o.created_at) < DATE_ADD(as_of.week, INTERVAL 7 DAY)
  WHERE o.user_id IS NOT NULL
  GROUP BY o.user_id, as_of.week
)
SELECT
  user_id,
  as_of_week,
  basket_count,
  discounted_count,
  revenue,
  discount,
  ROUND(CAST(discount / NULLIF(revenue + discount, 0) AS NUMERIC), 4) AS discount_share,
  CASE
    WHEN discount = 0 THEN 'none'
    WHEN discount * 10 < revenue + discount THEN 'low'
    WHEN discount * 5 < revenue + discount THEN 'medium'
    ELSE 'high'
  END AS dependence
FROM bought;
