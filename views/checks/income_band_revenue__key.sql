-- Weeks and bands that are there twice, or NULL.
SELECT week, income_band, COUNT(*) AS row_count
FROM income_band_revenue
GROUP BY week, income_band
HAVING week IS NULL OR income_band IS NULL OR COUNT(*) > 1;
