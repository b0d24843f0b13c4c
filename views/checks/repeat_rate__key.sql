-- Weeks that are there twice, or NULL.
SELECT week, COUNT(*) AS row_count
FROM repeat_rate
GROUP BY week
HAVING week IS NULL OR COUNT(*) > 1;
