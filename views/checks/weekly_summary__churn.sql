-- The churned users of all weeks, where they are not all of churned_users.
SELECT s.churned_count, c.user_count
FROM (SELECT IFNULL(SUM(churned_count), 0) AS churned_count FROM weekly_summary) AS s
CROSS JOIN (SELECT COUNT(*) AS user_count FROM churned_users) AS c
WHERE s.churned_count <> c.user_count;
