-- Weeks that contradict themselves, or the models that they are made of.
SELECT m.week, m.active_users, m.new_users, m.returning_users, m.repeat_share, r.repeat_share AS repeat_rate_share
FROM weekly_summary AS m
LEFT JOIN repeat_rate AS r ON r.week = m.week
LEFT JOIN weekly_baskets AS b ON b.week = m.week
LEFT JOIN cohort_retention AS c ON c.cohort_week = DATE_SUB(m.week, INTERVAL 28 DAY) AND c.week = m.week
WHERE m.active_users IS DISTINCT FROM m.new_users + m.returning_users
  OR m.repeat_share IS DISTINCT FROM r.repeat_share
  OR m.basket_value IS DISTINCT FROM b.basket_value
  OR m.items_per_basket IS DISTINCT FROM b.items_per_basket
  OR m.retention_4_weeks IS DISTINCT FROM c.retention
  OR m.discount_share NOT BETWEEN 0 AND 1
  OR m.known_income_share NOT BETWEEN 0 AND 1;
