-- The epoch of a topic: the high bits of every version that its messages write, so that after a topic was made anew, and its
-- offsets begin at zero, the new rows win. database: where in ClickHouse the epoch's rows belong.
create table etl.topics (
  topic text primary key,
  epoch int not null check (epoch between 1 and 65535),
  database text not null,
  started_at timestamptz not null default now()
);

-- How far each partition is inserted. Kafka's group has the offsets that count; these tell a topic that was made anew.
create table etl.topic_offsets (
  topic text not null references etl.topics,
  partition int not null,
  next_offset bigint not null,
  updated_at timestamptz not null default now(),
  primary key (topic, partition)
);
