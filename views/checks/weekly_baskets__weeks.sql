-- Weeks of weekly_revenue that are missing here, and others.
SELECT r.week, m.week AS found
FROM weekly_revenue AS r
FULL JOIN weekly_baskets AS m ON m.week = r.week
WHERE r.week IS NULL OR m.week IS NULL;
