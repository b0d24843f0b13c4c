-- Changes to rows. One that moves its sorting key deletes the row under the old one, and only such: two rows with one key and
-- one version would be a draw.
-- A row that moves to a time that cannot be held is dead-lettered, and is gone here: it is no longer what it was.
CREATE MATERIALIZED VIEW IF NOT EXISTS sensor_readings_view TO sensor_readings AS
SELECT 0 AS id FROM sensor_changes WHERE throwIf(1, 'schemas/clickhouse is half applied. Run: make migrate');

ALTER TABLE sensor_readings_view MODIFY QUERY
SELECT
  row.1.id AS id,
  row.1.sensor_id AS sensor_id,
  row.1.metric AS metric,
  row.1.value AS value,
  row.1.recorded_at AS recorded_at,
  row.1.unknown AS _unknown,
  bitShiftLeft(toUInt64(epoch), 48) + offset AS _version,
  row.2 AS _deleted
FROM sensor_changes
ARRAY JOIN multiIf(
  op = 'd' OR reason != '', [(before, 1)],
  op = 'u' AND NOT (before.sensor_id <=> after.sensor_id AND before.metric <=> after.metric AND before.recorded_at = after.recorded_at),
    [(before, 1), (after, 0)],
  [(after, 0)]) AS row
WHERE reason = '' OR (op = 'u' AND reason = 'after.recorded_at is no time that DateTime64 holds');
