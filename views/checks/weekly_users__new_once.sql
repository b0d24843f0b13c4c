-- The new users of all weeks, where they are not the users whose first order lies in these weeks: each is new once.
WITH firsts AS (
  SELECT user_id, MIN(DATE(created_at)) AS day FROM orders WHERE user_id IS NOT NULL GROUP BY user_id
),
expected AS (
  SELECT COUNT(*) AS user_count
  FROM firsts
  JOIN (SELECT MIN(week) AS first_week, MAX(week) AS last_week FROM weekly_revenue) AS span
    ON firsts.day >= span.first_week AND firsts.day < DATE_ADD(span.last_week, INTERVAL 7 DAY)
),
found AS (
  SELECT IFNULL(SUM(new_users), 0) AS user_count FROM weekly_users
)
SELECT expected.user_count, found.user_count AS found_count
FROM expected
CROSS JOIN found
WHERE expected.user_count <> found.user_count;
