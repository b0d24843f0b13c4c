-- What the consumer inserts: a message as it is, and where it was. Stores nothing; the views below make rows of it.
CREATE TABLE IF NOT EXISTS sensor_landing (
  topic String,
  epoch UInt16,
  partition UInt32,
  offset UInt64,
  attempt UInt32,
  key Nullable(String),
  value String
)
ENGINE = Null;
