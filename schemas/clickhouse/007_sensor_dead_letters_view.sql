-- What is no valid change, as it came.
CREATE MATERIALIZED VIEW IF NOT EXISTS sensor_dead_letters_view TO sensor_dead_letters AS
SELECT topic FROM sensor_changes WHERE throwIf(1, 'schemas/clickhouse is half applied. Run: make migrate');

ALTER TABLE sensor_dead_letters_view MODIFY QUERY
SELECT topic, epoch, partition, offset, attempt, reason, key, value, now64(3, 'UTC') AS parked_at
FROM sensor_changes
WHERE reason != '';
