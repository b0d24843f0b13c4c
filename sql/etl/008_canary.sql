-- When the source wrote the last canary that the consumer saw in this epoch (no later than it saw it), and what is wrong with the
-- flow: canaries that never came. make verify clears the gap where it finds no difference, a new epoch in any case.
alter table etl.topics add canary_at timestamptz, add canary_seen timestamptz, add canary_gap text;

-- The WAL position of the epoch's snapshot, or of the first canary where the snapshot had no row: a later snapshot is another one.
alter table etl.topics add snapshot_lsn bigint;
