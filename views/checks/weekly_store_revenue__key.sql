-- Stores and weeks that are there twice, or NULL.
SELECT week, store_id, COUNT(*) AS row_count
FROM weekly_store_revenue
GROUP BY week, store_id
HAVING week IS NULL OR store_id IS NULL OR COUNT(*) > 1;
