-- Weeks whose users are not those of the raw orders of the 56 days that end with the week; and shares that do not follow from
-- the counts.
WITH days AS (
  SELECT user_id, DATE(created_at) AS day, COUNT(*) AS order_count
  FROM orders
  WHERE user_id IS NOT NULL
  GROUP BY user_id, day
),
raw AS (
  SELECT m.week, days.user_id, SUM(days.order_count) AS order_count
  FROM repeat_rate AS m
  JOIN days ON days.day BETWEEN DATE_SUB(m.week, INTERVAL 49 DAY) AND DATE_ADD(m.week, INTERVAL 6 DAY)
  GROUP BY m.week, days.user_id
),
expected AS (
  SELECT week, COUNT(*) AS user_count, SUM(IF(order_count > 1, 1, 0)) AS repeat_count FROM raw GROUP BY week
)
SELECT m.week, m.user_count, expected.user_count AS raw_users, m.repeat_count, expected.repeat_count AS raw_repeats
FROM repeat_rate AS m
LEFT JOIN expected ON expected.week = m.week
WHERE m.user_count IS DISTINCT FROM IFNULL(expected.user_count, 0)
  OR m.repeat_count IS DISTINCT FROM IFNULL(expected.repeat_count, 0)
  OR (m.user_count > 0) IS DISTINCT FROM (m.repeat_share IS NOT NULL)
  OR ABS(m.repeat_share * m.user_count - m.repeat_count) > NUMERIC '0.00005' * m.user_count;
