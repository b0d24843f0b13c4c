-- Users of lifetime_value that are missing here, others, and those with other orders or another revenue there.
SELECT l.user_id, m.user_id AS found, l.order_count, l.returned_count, m.frequency, l.revenue, m.monetary
FROM lifetime_value AS l
FULL JOIN rfm_segments AS m ON m.user_id = l.user_id
WHERE m.frequency IS DISTINCT FROM l.order_count - l.returned_count
  OR m.monetary IS DISTINCT FROM l.revenue
  OR m.as_of_week IS DISTINCT FROM l.as_of_week
  OR m.recency_days IS DISTINCT FROM DATE_DIFF(l.as_of_week, l.last_order_on, DAY) + 6;
