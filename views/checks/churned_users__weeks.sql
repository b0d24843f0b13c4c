-- Users whose weeks contradict each other, or who have no segment.
SELECT user_id, as_of_week, last_order_on, weeks_gone, churned_week, segment
FROM churned_users
WHERE weeks_gone IS NULL
  OR weeks_gone < 8
  OR weeks_gone * 7 <> DATE_DIFF(as_of_week, DATE_TRUNC(last_order_on, ISOWEEK), DAY)
  OR (weeks_gone - 8) * 7 <> DATE_DIFF(as_of_week, churned_week, DAY)
  OR segment IS NULL;
