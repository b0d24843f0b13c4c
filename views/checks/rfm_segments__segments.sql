-- Users in a segment that is none, or that contradicts their scores.
SELECT user_id, recency_score, frequency_score, monetary_score, segment
FROM rfm_segments
WHERE segment IS NULL
  OR segment NOT IN ('champions', 'loyal', 'promising', 'at risk', 'lost')
  OR (segment IN ('champions', 'loyal', 'promising')) <> (recency_score >= 3)
  OR (segment = 'champions') <> (LEAST(recency_score, frequency_score, monetary_score) >= 4)
  OR (segment = 'lost') <> (GREATEST(recency_score, frequency_score, monetary_score) <= 2);
