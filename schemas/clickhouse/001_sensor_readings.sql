-- The readings, as the source has them: SELECT … FROM sensor_readings FINAL. Columns without _ are the contract with the source.
-- Each statement of these files can run twice: a migrate that was killed runs its file again.
CREATE TABLE IF NOT EXISTS sensor_readings (
  id Int64,
  sensor_id Nullable(String),
  metric LowCardinality(Nullable(String)),
  value Nullable(Float64),
  recorded_at DateTime64(6, 'UTC'),
  -- Columns of the source that are not above, as JSON. A later file can give one a column whose DEFAULT reads it here.
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

-- A table that an older version made: a column that its owner added to that version's views is filled by none of these.
SELECT throwIf(count() > 0, 'sensor_readings has a column that no view fills. README, "When the schema changes", says how to keep it')
FROM system.columns
WHERE database = currentDatabase() AND table = 'sensor_readings' AND default_kind = ''
  AND name NOT IN ('id', 'sensor_id', 'metric', 'value', 'recorded_at', '_unknown', '_version', '_deleted');
