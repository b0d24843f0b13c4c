-- Messages that are no valid change. A message that comes twice is there once: read it with FINAL.
CREATE TABLE IF NOT EXISTS sensor_dead_letters (
  topic LowCardinality(String),
  epoch UInt16,
  partition UInt32,
  offset UInt64,
  -- 0 by the consumer; each `make replay-dead-letters` tries with the next number.
  attempt UInt32,
  reason String,
  key Nullable(String),
  value String,
  parked_at DateTime64(3, 'UTC')
)
ENGINE = ReplacingMergeTree(attempt)
ORDER BY (topic, epoch, partition, offset);

-- As long as schema etl keeps its runs by default (RETENTION_DAYS). Older versions made the table without it.
ALTER TABLE sensor_dead_letters MODIFY TTL toDateTime(parked_at) + toIntervalDay(400);
