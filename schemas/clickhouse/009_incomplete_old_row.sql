-- As 008, and also where the key has a column that is in _unknown here, as that of a partitioned table can: its value says nothing of
-- the rest of the row.
ALTER TABLE sensor_dead_letters_view MODIFY QUERY
SELECT
  topic, epoch, partition, offset, attempt,
  if(sensor_changes.reason != '', sensor_changes.reason, 'before has only its key: is REPLICA IDENTITY FULL on the source table and each of its partitions?') AS reason,
  key, value, now64(3, 'UTC') AS parked_at
FROM sensor_changes
WHERE sensor_changes.reason != '' OR (op IN ('u', 'd') AND before.sensor_id IS NULL AND before.metric IS NULL AND before.value IS NULL
  AND NOT (op = 'u' AND after.sensor_id IS NULL AND after.metric IS NULL AND before.recorded_at = after.recorded_at));
