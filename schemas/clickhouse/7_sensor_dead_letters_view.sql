-- What is no change, as it came.
CREATE MATERIALIZED VIEW sensor_dead_letters_view TO sensor_dead_letters AS
SELECT topic, epoch, partition, offset, attempt, reason, key, value, now64(3, 'UTC') AS parked_at
FROM sensor_changes
WHERE reason != '';
