-- Which files of schemas/clickhouse were applied: make migrate writes a row once all of a file's statements are done.
CREATE TABLE IF NOT EXISTS etl_migrations (
  file String,
  sha256 String,
  applied_at DateTime('UTC') DEFAULT now()
)
ENGINE = MergeTree
ORDER BY file;
