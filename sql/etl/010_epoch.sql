-- The UUID of ClickHouse's sensor_readings that has the epoch's rows: one that was dropped and made again has another UUID, and no rows.
alter table etl.topics add readings uuid;
-- The first offset of the epoch: messages before it would bring back rows that were deleted unseen.
alter table etl.topic_offsets add began bigint;
