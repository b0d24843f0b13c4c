-- Scores that are not 1 to 5, or lower than that of somebody with a worse or the same value: ties share a score.
WITH scores AS (
  SELECT user_id, 'recency' AS what, -recency_days AS value, recency_score AS score FROM rfm_segments
  UNION ALL
  SELECT user_id, 'frequency', frequency, frequency_score FROM rfm_segments
  UNION ALL
  SELECT user_id, 'monetary', monetary, monetary_score FROM rfm_segments
)
SELECT user_id, what, value, score
FROM scores
QUALIFY score IS NULL
  OR score NOT BETWEEN 1 AND 5
  OR score < MAX(score) OVER (PARTITION BY what ORDER BY value);
