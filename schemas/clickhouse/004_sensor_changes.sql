-- A message that was read once, for both of the views that write. Stores nothing.
CREATE TABLE IF NOT EXISTS sensor_changes (
  topic String,
  epoch UInt16,
  partition UInt32,
  offset UInt64,
  attempt UInt32,
  key Nullable(String),
  value String,
  -- Why it is no valid change, or ''.
  reason String,
  op String,
  -- The row before and after.
  before Tuple(id Int64, sensor_id Nullable(String), metric Nullable(String), value Nullable(Float64), recorded_at DateTime64(6, 'UTC'), unknown Map(String, String)),
  after Tuple(id Int64, sensor_id Nullable(String), metric Nullable(String), value Nullable(Float64), recorded_at DateTime64(6, 'UTC'), unknown Map(String, String))
)
ENGINE = Null;
