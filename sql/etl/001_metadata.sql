-- Where each pipeline is. The only answer to that question.
create table etl.watermarks (
  pipeline text primary key,
  watermark timestamptz not null,
  -- Which server the watermark was taken from: after a restore or a failover it may mean nothing.
  system_identifier text not null,
  timeline int not null,
  run_id text not null,
  updated_at timestamptz not null default now()
);

-- What happened. Nothing but people and `make status` reads it.
create table etl.runs (
  run_id text primary key,
  pipeline text not null,
  state text not null check (state in ('running', 'succeeded', 'failed', 'rewound')),
  -- The window: the watermarks before and after, or FROM and TO of a re-run by hand.
  chunk_from timestamptz,
  chunk_to timestamptz,
  rows bigint not null default 0,
  bytes bigint not null default 0,
  error text,
  host text not null,
  pid int not null,
  started_at timestamptz not null default now(),
  finished_at timestamptz
);
create index runs_pipeline_started_at on etl.runs (pipeline, started_at desc);

-- Progress of the archive by day; the manifest in the bucket is the truth.
create table etl.chunks (
  pipeline text not null,
  chunk_from timestamptz not null,
  chunk_to timestamptz not null,
  state text not null check (state in ('running', 'succeeded', 'failed')),
  rows bigint not null default 0,
  bytes bigint not null default 0,
  attempts int not null default 0,
  error text,
  run_id text not null,
  started_at timestamptz not null default now(),
  finished_at timestamptz,
  primary key (pipeline, chunk_from)
);
