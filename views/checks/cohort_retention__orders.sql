-- Weeks whose users or money, over all cohorts, differ from those of the raw orders of the users who are in a cohort.
WITH firsts AS (
  SELECT user_id, MIN(DATE(created_at)) AS first_day FROM orders WHERE user_id IS NOT NULL GROUP BY user_id
),
raw AS (
  SELECT
    DATE_TRUNC(DATE(o.created_at), ISOWEEK) AS raw_week,
    COUNT(DISTINCT o.user_id) AS active_users,
    IFNULL(SUM(IF(o.status = 'returned', 0, o.total)), 0) AS revenue
  FROM orders AS o
  JOIN firsts ON firsts.user_id = o.user_id
  WHERE firsts.first_day >= (SELECT MIN(week) FROM weekly_revenue)
  GROUP BY raw_week
),
found AS (
  SELECT week, SUM(active_users) AS active_users, SUM(revenue) AS revenue FROM cohort_retention GROUP BY week
)
SELECT r.week, found.active_users, raw.active_users AS raw_users, found.revenue, raw.revenue AS raw_revenue
FROM weekly_revenue AS r
LEFT JOIN found ON found.week = r.week
LEFT JOIN raw ON raw.raw_week = r.week
WHERE IFNULL(found.active_users, 0) <> IFNULL(raw.active_users, 0)
  OR IFNULL(found.revenue, 0) <> IFNULL(raw.revenue, 0);
