-- Weeks of weekly_revenue, from the eighth on, that are missing here, and others.
WITH expected AS (
  SELECT week FROM weekly_revenue QUALIFY ROW_NUMBER() OVER (ORDER BY week) >= 8
)
SELECT expected.week, m.week AS found
FROM expected
FULL JOIN repeat_rate AS m ON m.week = expected.week
WHERE expected.week IS NULL OR m.week IS NULL;
