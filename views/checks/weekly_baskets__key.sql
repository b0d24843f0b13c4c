-- Weeks that are there twice, or NULL.
SELECT week, COUNT(*) AS row_count
FROM weekly_baskets
GROUP BY week
HAVING week IS NULL OR COUNT(*) > 1;
