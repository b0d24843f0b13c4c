-- The readings, as the source has them: SELECT … FROM sensor_readings FINAL. Columns without _ are the contract with the source.
CREATE TABLE sensor_readings (
  id Int64,
  sensor_id Nullable(String),
  metric LowCardinality(Nullable(String)),
  value Nullable(Float64),
  recorded_at DateTime64(6, 'UTC'),
  -- Columns of the source that are not above, as JSON: nothing of a new column is lost while nobody has added it here.
  _unknown Map(String, String),
  -- Epoch * 2^48 + Kafka's offset: the order of one key's changes is its partition's order. Debezium's lsn would not do, it goes
  -- backwards; nor would its timestamps, which two changes share.
  _version UInt64,
  _deleted UInt8
)
ENGINE = ReplacingMergeTree(_version, _deleted)
-- What readers filter by; id last makes it unique.
ORDER BY (sensor_id, metric, recorded_at, id)
SETTINGS allow_nullable_key = 1;
