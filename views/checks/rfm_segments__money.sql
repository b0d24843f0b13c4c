-- The revenue of all segments, where it is not that of the raw orders with a user, up to the last complete week.
WITH raw AS (
  SELECT IFNULL(SUM(IF(status = 'returned', 0, total)), 0) AS revenue
  FROM orders
  WHERE user_id IS NOT NULL
    AND created_at < (SELECT TIMESTAMP(DATE_ADD(MAX(as_of_week), INTERVAL 7 DAY)) FROM rfm_segments)
),
found AS (
  SELECT IFNULL(SUM(monetary), 0) AS revenue FROM rfm_segments
)
SELECT raw.revenue, found.revenue AS found_revenue
FROM raw
CROSS JOIN found
WHERE raw.revenue <> found.revenue;
