-- Debezium's envelope, read. Nothing in a message can make this throw, or one bad message would look like an outage: where a value
-- is not what it should be, there is a reason and the message goes to the dead letters.
-- A view that exists works until its SELECT is replaced, at one instant. Dropped, it would lose what is inserted meanwhile.
CREATE MATERIALIZED VIEW IF NOT EXISTS sensor_changes_view TO sensor_changes AS
SELECT topic FROM sensor_landing WHERE throwIf(1, 'schemas/clickhouse is half applied. Run: make migrate');

ALTER TABLE sensor_changes_view MODIFY QUERY
WITH
  -- By field, as JSON text: each parse of a message costs.
  CAST(JSONExtractKeysAndValuesRaw(value), 'Map(String, String)') AS envelope,
  envelope['op'] AS operation,
  -- The row's two states, by column; empty where there is none.
  [envelope['before'], envelope['after']] AS states,
  -- From the message itself: text that was extracted has its numbers rewritten (1.0E20 to an integer, -0.0 to -0).
  arrayMap(name -> CAST(JSONExtractKeysAndValuesRaw(value, name), 'Map(String, String)'), ['before', 'after']) AS columns,
  JSONExtract(value, 'Tuple(before Tuple(id Int64, sensor_id Nullable(String), metric Nullable(String), value Nullable(Float64), recorded_at String), after Tuple(id Int64, sensor_id Nullable(String), metric Nullable(String), value Nullable(Float64), recorded_at String))') AS both,
  [both.1, both.2] AS typed,
  arrayMap(row -> parseDateTime64BestEffortOrNull(row.recorded_at, 6, 'UTC'), typed) AS times,
  arrayMap((state, column, row, time) -> multiIf(
    NOT startsWith(state, '{'), ' is no object',
    column['id'] != toString(row.id), '.id is no 64-bit integer',
    NOT (column['sensor_id'] = 'null' OR startsWith(column['sensor_id'], '"')), '.sensor_id is neither text nor null',
    NOT (column['metric'] = 'null' OR startsWith(column['metric'], '"')), '.metric is neither text nor null',
    -- What a failed TOAST lookup leaves: the row is not known.
    has([row.sensor_id, row.metric], '__debezium_unavailable_value'), ' lacks a large value: the source table needs REPLICA IDENTITY FULL',
    NOT match(column['value'], '^(null|"NaN"|"-?Infinity"|-?[0-9].*)$'), '.value is neither a number nor null',
    NOT startsWith(column['recorded_at'], '"'), '.recorded_at is no text',
    -- The second half: no other date than the text's, where that is beyond DateTime64 or no date of the calendar.
    NOT match(row.recorded_at, '^\\d{4}-\\d\\d-\\d\\dT\\d\\d:\\d\\d:\\d\\d(\\.\\d{1,6})?Z$')
      OR ifNull(formatDateTime(time, '%FT%T'), '') != left(row.recorded_at, 19), '.recorded_at is no time that DateTime64 holds',
    ''), states, columns, typed, times) AS faults,
  arrayMap((column, row, time) -> tuple(
    row.id,
    row.sensor_id,
    row.metric,
    multiIf(column['value'] = '"NaN"', nan, column['value'] = '"Infinity"', inf, column['value'] = '"-Infinity"', -inf, row.value),
    ifNull(time, toDateTime64(0, 6, 'UTC')),
    if(length(column) > 5, mapFilter((name, text) -> name NOT IN ('id', 'sensor_id', 'metric', 'value', 'recorded_at'), column), map())
  ), columns, typed, times) AS rows,
  operation IN ('"u"', '"d"') AS has_before,
  operation IN ('"c"', '"r"', '"u"') AS has_after
SELECT
  topic, epoch, partition, offset, attempt, key, value,
  multiIf(
    NOT isValidJSON(value), 'not JSON',
    operation = '"t"', 'TRUNCATE: the table has to be rebuilt from a fresh snapshot (make resnapshot)',
    NOT has_before AND NOT has_after, 'no change: op is none of c, r, u, d',
    -- A time that cannot be held never was a row here: an update from it is all that its row needs.
    has_before AND faults[1] != '' AND NOT (has_after AND faults[1] = '.recorded_at is no time that DateTime64 holds'), concat('before', faults[1]),
    has_after AND faults[2] != '', concat('after', faults[2]),
    key IS NULL, 'no key',
    -- The key decides the partition, and so the order.
    JSONExtractRaw(ifNull(key, ''), 'id') != toString(if(has_after, typed[2].id, typed[1].id)), 'the key is not the row''s id',
    has_before AND has_after AND typed[1].id != typed[2].id, 'an update that changes the id',
    '') AS reason,
  substring(operation, 2, 1) AS op,
  rows[1] AS before,
  rows[2] AS after
FROM sensor_landing;
