-- What make report shows beside the runs. hold_seconds: for how long an open transaction had held the watermark when the run began.
alter table etl.runs add column hold_seconds real not null default 0;

-- Each model of each run of make views. checks: how many it has; error: why it was not published.
create table etl.models (
  run_id text not null references etl.runs on delete cascade,
  model text not null,
  rows bigint not null,
  checks int not null,
  bytes_billed bigint not null,
  seconds real not null,
  error text,
  finished_at timestamptz not null default now(),
  primary key (run_id, model)
);

-- Each proof of make verify and make verify-events. differences: rows, of events days. found: what differed, in words.
create table etl.verifications (
  pipeline text not null,
  verified_at timestamptz not null default now(),
  rows bigint not null,
  differences bigint not null,
  bytes_billed bigint not null default 0,
  found text,
  primary key (pipeline, verified_at)
);
