-- The run of etl.run, as etl.runs has it from now on: at its start, and again at its end. For shared/run.ts.
insert into etl.runs (run_id, pipeline, state, host, pid, by_hand, rows, bytes, bytes_billed, hold_seconds, error, chunk_from, chunk_to,
  finished_at)
select run_id, pipeline, state, host, pid, by_hand, rows, bytes, bytes_billed, hold_seconds, error, chunk_from, chunk_to,
  case when state <> 'running' then now() end
from jsonb_populate_record(null::etl.runs, current_setting('etl.run')::jsonb)
on conflict (run_id) do update set
  state = excluded.state, rows = excluded.rows, bytes = excluded.bytes, bytes_billed = excluded.bytes_billed,
  hold_seconds = excluded.hold_seconds, error = excluded.error, chunk_from = excluded.chunk_from, chunk_to = excluded.chunk_to,
  finished_at = excluded.finished_at
where runs.state = 'running'; -- what is still at work in a run that has failed does not make it another one
