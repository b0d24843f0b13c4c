-- Weeks of weekly_revenue and bands of users, and unknown, that are missing here, and others.
WITH bands AS (
  SELECT 'unknown' AS band
  UNION DISTINCT
  SELECT income_band FROM users WHERE income_band IS NOT NULL
),
expected AS (
  SELECT r.week, bands.band FROM weekly_revenue AS r CROSS JOIN bands
)
SELECT expected.week, expected.band, m.week AS found_week, m.income_band AS found_band
FROM expected
FULL JOIN income_band_revenue AS m ON m.week = expected.week AND m.income_band = expected.band
WHERE expected.week IS NULL OR m.week IS NULL;
