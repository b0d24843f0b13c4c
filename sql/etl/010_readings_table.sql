-- The UUID of ClickHouse's sensor_readings that has the epoch's rows: one that was dropped and made again has another UUID, and no rows.
alter table etl.topics add readings uuid;
