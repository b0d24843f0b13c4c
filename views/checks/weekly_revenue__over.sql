-- Weeks that are not over yet by the clock: an order is dated in the future, and made a running week look complete.
SELECT week
FROM weekly_revenue
WHERE DATE_ADD(week, INTERVAL 7 DAY) > CURRENT_DATE();
