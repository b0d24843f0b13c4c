-- Cohorts whose size changes, is not that of the raw orders, or is not all there in its first week; weeks with more users than
-- the cohort has; and retention that does not follow from the two.
WITH firsts AS (
  SELECT user_id, DATE_TRUNC(DATE(MIN(created_at)), ISOWEEK) AS first_week
  FROM orders
  WHERE user_id IS NOT NULL
  GROUP BY user_id
),
raw AS (
  SELECT f.first_week, COUNT(*) AS user_count
  FROM firsts AS f
  JOIN weekly_revenue AS r ON r.week = f.first_week
  GROUP BY f.first_week
)
SELECT c.cohort_week, c.weeks_since, c.cohort_size, raw.first_week, raw.user_count, c.active_users, c.retention
FROM cohort_retention AS c
FULL JOIN raw ON raw.first_week = c.cohort_week
WHERE c.cohort_size IS DISTINCT FROM raw.user_count
  OR c.active_users > c.cohort_size
  OR (c.weeks_since = 0 AND c.active_users <> c.cohort_size)
  OR c.retention IS NULL
  OR ABS(c.retention * c.cohort_size - c.active_users) > NUMERIC '0.00005' * c.cohort_size;
