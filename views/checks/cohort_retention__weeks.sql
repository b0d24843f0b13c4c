-- Cohorts that do not have every week from their own to the last one of weekly_revenue, each at its distance.
SELECT c.cohort_week, COUNT(*) AS row_count, MIN(c.week) AS first_week, MAX(c.week) AS last_week
FROM cohort_retention AS c
CROSS JOIN (SELECT MAX(week) AS week FROM weekly_revenue) AS as_of
GROUP BY c.cohort_week, as_of.week
HAVING MIN(c.week) <> c.cohort_week
  OR MAX(c.week) <> as_of.week
  OR COUNT(DISTINCT c.week) <> DATE_DIFF(as_of.week, c.cohort_week, DAY) / 7 + 1
  OR LOGICAL_OR(c.weeks_since * 7 <> DATE_DIFF(c.week, c.cohort_week, DAY));
