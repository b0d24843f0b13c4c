-- Weeks whose active users are not those of the raw orders, or not the new and the returning ones together.
WITH raw AS (
  SELECT DATE_TRUNC(DATE(created_at), ISOWEEK) AS week, COUNT(DISTINCT user_id) AS active_users
  FROM orders
  GROUP BY week
)
SELECT m.week, m.active_users, raw.active_users AS raw_users, m.new_users, m.returning_users, m.won_back_users
FROM weekly_users AS m
LEFT JOIN raw ON raw.week = m.week
WHERE m.active_users IS DISTINCT FROM IFNULL(raw.active_users, 0)
  OR m.active_users IS DISTINCT FROM m.new_users + m.returning_users
  OR m.won_back_users > m.returning_users;
