-- Deletes what schema etl keeps of a pipeline's past for longer than etl.days: its runs, but the newest of each state, its archived days,
-- but those that a backfill has yet to archive, and all proofs. shared/run.ts runs it after a success.
with settings as (
  select current_setting('etl.pipeline') as name, now() - make_interval(days => current_setting('etl.days')::int) as oldest
), days as (
  delete from etl.chunks using settings where pipeline = name and state = 'succeeded' and finished_at < oldest
), proofs as (
  delete from etl.verifications using settings where verified_at < oldest
)
delete from etl.runs using settings where pipeline = name and started_at < oldest and run_id not in (
  select distinct on (state, by_hand) run_id from etl.runs where pipeline = name order by state, by_hand, started_at desc);
