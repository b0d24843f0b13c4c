-- Weeks of weekly_revenue that are missing here, and others; labels that are not the week's.
SELECT r.week, m.week AS found, m.iso_week
FROM weekly_revenue AS r
FULL JOIN weekly_summary AS m ON m.week = r.week
WHERE m.iso_week IS DISTINCT FROM
  CONCAT(EXTRACT(ISOYEAR FROM r.week), '-W', LPAD(CAST(EXTRACT(ISOWEEK FROM r.week) AS STRING), 2, '0'));
