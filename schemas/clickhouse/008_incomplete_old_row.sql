-- An update or delete whose old row is only a key, as Postgres sends it without REPLICA IDENTITY FULL (of a partition, say), would find
-- nothing under its sorting key. A row that had no other value looks the same. So its deletion is written, which is right for such a
-- row, and it is a dead letter as well: for any other row, what it was stays.
ALTER TABLE sensor_dead_letters_view MODIFY QUERY
SELECT
  topic, epoch, partition, offset, attempt,
  if(sensor_changes.reason != '', sensor_changes.reason, 'before has only its key: is REPLICA IDENTITY FULL on the source table and each of its partitions?') AS reason,
  key, value, now64(3, 'UTC') AS parked_at
FROM sensor_changes
WHERE sensor_changes.reason != '' OR (
  op IN ('u', 'd') AND before.sensor_id IS NULL AND before.metric IS NULL AND before.value IS NULL
  AND arrayAll(text -> text = 'null', mapValues(before.unknown))
  AND NOT (op = 'u' AND after.sensor_id IS NULL AND after.metric IS NULL AND before.recorded_at = after.recorded_at));
