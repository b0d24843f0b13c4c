-- Users that are there twice, or NULL.
SELECT user_id, COUNT(*) AS row_count
FROM churned_users
GROUP BY user_id
HAVING user_id IS NULL OR COUNT(*) > 1;
