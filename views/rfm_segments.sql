-- Who are the best customers, who is slipping away, who is gone?
-- Grain: one row per user of lifetime_value, as of the Sunday of its last complete week.
-- Each user gets three scores from 1 to 5: recency (days since the last order), frequency (orders) and monetary (revenue), returned
-- orders not counted in these two. A score is the fifth of the users that the value's rank falls into, 5 the best. Ties share the lowest
-- rank and so the score, which NTILE would deal out by chance; therefore a fifth may hold more or fewer than a fifth.
-- The first rule that holds names the segment:
--   champions  recency, frequency and monetary 4 or 5
--   loyal      recency and frequency 3 or more
--   promising  recency 3 or more: here lately, not often
--   at risk    frequency or monetary 3 or more: was worth something, has not been here lately
--   lost       the others
-- Scores compare users of one week with each other: a user's may change because others bought. All time counts, so a good
-- customer of long ago is at risk rather than lost; churned_users says how long ago.
-- Clustered by segment, since a campaign reads one of them.
CREATE OR REPLACE TABLE rfm_segments (
  user_id INT64 OPTIONS (description = "The user: users.id. Key."),
  as_of_week DATE OPTIONS (description = "The Monday of the last ISO week that is counted, UTC; the same in all rows."),
  recency_days INT64 OPTIONS (description = "Days from the last order to the Sunday of as_of_week."),
  frequency INT64 OPTIONS (description = "Orders that were not returned."),
  monetary NUMERIC OPTIONS (description = "Revenue without returned orders, in dollars."),
  recency_score INT64 OPTIONS (description = "1 to 5, 5 for those who ordered last."),
  frequency_score INT64 OPTIONS (description = "1 to 5, 5 for those with most orders."),
  monetary_score INT64 OPTIONS (description = "1 to 5, 5 for those who paid most."),
  segment STRING OPTIONS (description = "champions, loyal, promising, at risk or lost.")
)
CLUSTER BY segment
OPTIONS (description = "Recency, frequency and monetary scores of each user, and the segment that follows, as of the last complete ISO week.")
AS
WITH ranked AS (
  SELECT
    user_id,
    as_of_week,
    DATE_DIFF(DATE_ADD(as_of_week, INTERVAL 6 DAY), last_order_on, DAY) AS recency_days,
    order_count - returned_count AS frequency,
    revenue AS monetary,
    RANK() OVER (ORDER BY last_order_on) AS recency_rank,
    RANK() OVER (ORDER BY order_count - returned_count) AS frequency_rank,
    RANK() OVER (ORDER BY revenue) AS monetary_rank,
    COUNT(*) OVER () AS user_count
  FROM lifetime_value
),
scored AS (
  SELECT
    *,
    1 + DIV(5 * (recency_rank - 1), user_count) AS recency_score,
    1 + DIV(5 * (frequency_rank - 1), user_count) AS frequency_score,
    1 + DIV(5 * (monetary_rank - 1), user_count) AS monetary_score
  FROM ranked
)
SELECT
  user_id,
  as_of_week,
  recency_days,
  frequency,
  monetary,
  recency_score,
  frequency_score,
  monetary_score,
  CASE
    WHEN recency_score >= 4 AND frequency_score >= 4 AND monetary_score >= 4 THEN 'champions'
    WHEN recency_score >= 3 AND frequency_score >= 3 THEN 'loyal'
    WHEN recency_score >= 3 THEN 'promising'
    WHEN frequency_score >= 3 OR monetary_score >= 3 THEN 'at risk'
    ELSE 'lost'
  END AS segment
FROM scored;
