/**
 * One run of a pipeline at a time: a session advisory lock on the metadata database, not through a transaction pooler. It goes
 * with its session, whatever becomes of the process. It is an economy, not the safety: with the lock lost, upsert and
 * compare-and-set still keep everything right.
 */
import { hostname } from "node:os";
import type { Sql } from "postgres";
import type { Fields } from "./progress.ts";
import type { Run } from "./run.ts";

/** Names the pipeline's advisory lock. */
export const lockKey = (pipeline: string): string => `etl:${pipeline}`;

/** Takes the pipeline's lock; false where another run holds it. A re-run by hand waits for it, to its deadline. */
export async function takeLock(run: Run): Promise<boolean> {
  const { etl, pipeline } = run;
  const key = lockKey(pipeline);
  const [lock] = await etl<{ taken: boolean }[]>`select pg_try_advisory_lock(hashtextextended(${key}, 0)) as taken`;
  if (!lock?.taken) {
    run.log(run.byHand ? "waiting" : "skipped", {
      because: "another run holds the lock",
      ...(await describeHolder(etl, pipeline)),
    });
    if (!run.byHand) {
      run.state = "skipped";
      return false;
    }
    await etl`select set_config('lock_timeout', '0', false)`;
    await etl`select pg_advisory_lock(hashtextextended(${key}, 0))`;
  }
  await etl`insert into etl.runs (run_id, pipeline, state, host, pid) values (${run.id}, ${pipeline}, 'running', ${hostname()}, ${process.pid})`;
  run.state = "locked";
  return true;
}

/** Who holds the pipeline's lock, since when, and on which host. */
export async function describeHolder(etl: Sql, pipeline: string): Promise<Fields> {
  const [holder] = await etl<Fields[]>`
    select coalesce(r.run_id, a.application_name) as holder, r.host, r.pid, a.pid as postgres_pid,
      replace(date_trunc('second', a.backend_start)::text, ' ', 'T') as since
    from pg_locks l
    join pg_stat_activity a on a.pid = l.pid
    left join etl.runs r on a.application_name = ${`etl:${pipeline} run=`} || r.run_id
    where l.locktype = 'advisory' and l.granted and l.objsubid = 1
      and l.database = (select oid from pg_database where datname = current_database())
      and (l.classid::bigint << 32) | l.objid::bigint = hashtextextended(${lockKey(pipeline)}, 0)`;
  return { ...holder };
}
