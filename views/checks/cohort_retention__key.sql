-- Cohorts and weeks that are there twice, or NULL.
SELECT cohort_week, weeks_since, COUNT(*) AS row_count
FROM cohort_retention
GROUP BY cohort_week, weeks_since
HAVING cohort_week IS NULL OR weeks_since IS NULL OR COUNT(*) > 1;
