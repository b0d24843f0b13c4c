/**
 * The life of a run: its id, its lock, its deadline, its record in etl.runs, its metrics and its exit code.
 */
import { randomBytes } from "node:crypto";
import { hostname } from "node:os";
import { setTimeout as delay } from "node:timers/promises";
import type { Sql } from "postgres";
import { type Env, redact } from "./env.ts";
import { type Fields, log, progress } from "./log.ts";
import { current, explain, onSignal } from "./main.ts";
import { epochSeconds, type Metrics, pushMetrics } from "./metrics.ts";
import { type Position, readPosition, wentBack } from "./restored.ts";
import { checkSession, connect, type SessionOptions } from "./session.ts";
import type { Chunk, Window } from "./watermark.ts";

/** Without SOURCE_DATABASE_URL the run has no source, and must not ask for it. */
type RunEnv = Env<"ETL_DATABASE_URL" | "PUSHGATEWAY_URL" | "RUN_TIMEOUT_SECONDS"> &
  Partial<Env<"SOURCE_DATABASE_URL" | "WATERMARK_LAG_SECONDS" | "RETENTION_DAYS" | "FROM" | "ONLY" | "DRY_RUN">>;

export interface Run {
  /** Joins log, etl.runs, BigQuery's job labels, Postgres's application_name and the archive's S3 metadata. */
  id: string;
  pipeline: string;
  /** A part was asked for (FROM and TO, ONLY, a dry run): the watermark and the pipeline's metrics stay as they are. */
  byHand: boolean;
  /** How the run's sessions are opened; names them in pg_stat_activity. */
  session: SessionOptions;
  source: Sql;
  etl: Sql;
  /** Aborts at the deadline, at SIGINT or SIGTERM, and when the run has failed. */
  signal: AbortSignal;
  /** Lets the deadline begin anew: for work that has one for each of its pieces. */
  restartDeadline(): void;
  /** What follows where the run is stopped, in words. */
  next: string;
  /** Something to undo if the run is stopped, until disposed of. */
  onStop(undo: () => Promise<unknown>): Disposable;
  log(step: string, fields?: Fields): void;
  /** Seconds since the run began. */
  seconds(): number;
  state: "new" | "locked" | "skipped";
  /** Sums over the chunks, for the report. */
  totals: { chunks: number; rows: number; bytes: number };
  /** The window and the watermark, once known, for the record and the metrics. */
  window?: Window;
  watermark?: string;
  /** Where the source's history was when the run began; not for a re-run by hand. */
  sourceAt?: Position | undefined;
  /** Columns of the source table that the contract does not know, once they have been compared. */
  unknownColumns?: string[];
}

/**
 * Runs `body` as one run of the pipeline. Success and failure are recorded and pushed; a run that found the lock held
 * does neither, and a re-run by hand pushes nothing, since it says nothing of the schedule.
 * @throws what `body` throws, or an Error named Stopped after a signal or at the deadline.
 */
export async function runPipeline(pipeline: string, env: RunEnv, body: (run: Run) => Promise<void>): Promise<void> {
  const { run, undos, stop, settle } = createRun(pipeline, env);
  const work = (async () => {
    const source = env.SOURCE_DATABASE_URL && checkSession("SOURCE_DATABASE_URL", run.source);
    await Promise.all([checkSession("ETL_DATABASE_URL", run.etl), source]);
    if (env.SOURCE_DATABASE_URL && !run.byHand) {
      run.sourceAt = await readPosition(run.source);
      const back = run.sourceAt && (await wentBack(run.etl, pipeline, run.sourceAt));
      if (back) throw new Error(back);
    }
    await body(run);
    if (run.state === "locked") {
      await record(run, "succeeded");
      await forget(run, env.RETENTION_DAYS);
    }
  })();
  const stopped = Promise.withResolvers<never>();
  run.signal.addEventListener("abort", () => stopped.reject(run.signal.reason));
  let failure: Error | undefined;
  try {
    await Promise.race([work, stopped.promise]);
  } catch (error) {
    failure = error as Error;
    stop(failure); // what goes on beside it, of another day or model, must not publish what is undone here
    progress("");
    await within5s(Promise.allSettled([...undos].map((undo) => undo())));
    if (run.state === "locked") await within5s(record(run, "failed", redact(explain(failure))));
  }
  settle();
  if (run.state !== "skipped" && !run.byHand) await push(run, env, failure !== undefined);
  const { rows, bytes, chunks } = run.totals;
  const seconds = run.seconds();
  if (failure) {
    run.log("failed", { rows, chunks, seconds, watermark: run.watermark });
    throw failure;
  }
  if (run.state === "locked") {
    run.log("done", {
      rows,
      bytes,
      chunks,
      seconds,
      rows_per_second: Math.round(rows / seconds),
      peak_rss_mb: Math.round(process.resourceUsage().maxRSS / 1024),
      watermark: run.watermark,
    });
  }
  await Promise.all([run.etl.end({ timeout: 5 }), run.source.end({ timeout: 5 })]);
}

/** Sorts by time; lower case, digits and _ only, so that it can be a BigQuery label and part of a table's name. */
export function newRunId(at?: number): string {
  const time = new Date(at ?? Date.now()).toISOString().slice(0, 19).replaceAll(/[-:]/g, "").replace("T", "_");
  const run = `${time}_${randomBytes(3).toString("hex")}`;
  if (at === undefined) Object.assign(current, { run });
  return run;
}

function createRun(pipeline: string, env: RunEnv) {
  const id = newRunId();
  Object.assign(current, { pipeline });
  const started = performance.now();
  const session = { application: `etl:${pipeline} run=${id}`, timeoutSeconds: env.RUN_TIMEOUT_SECONDS };
  const settings = { "etl.lag_seconds": String(env.WATERMARK_LAG_SECONDS ?? 0) };
  const undos = new Set<() => Promise<unknown>>();
  const stop = new AbortController();
  const abort = (reason: string): void =>
    stop.abort(Object.assign(new Error(`${reason}: nothing is half done, ${run.next}`), { name: "Stopped" }));
  const deadline = `the run's deadline of ${env.RUN_TIMEOUT_SECONDS} s (RUN_TIMEOUT_SECONDS) has passed`;
  const timer = setTimeout(abort, env.RUN_TIMEOUT_SECONDS * 1000, deadline);
  onSignal((signal) => abort(`stopped by ${signal}`));
  const run: Run = {
    id,
    pipeline,
    byHand: env.FROM !== undefined || env.ONLY !== undefined || env.DRY_RUN === true,
    session,
    etl: connect(env.ETL_DATABASE_URL, session),
    source: connect(env.SOURCE_DATABASE_URL ?? "", { ...session, settings }),
    signal: stop.signal,
    restartDeadline: () => void timer.refresh(),
    next: "the next run goes on from the watermark. Next: make status",
    onStop: (undo) => {
      undos.add(undo);
      return { [Symbol.dispose]: () => undos.delete(undo) };
    },
    log: (step, fields = {}) => log({ pipeline, run: id, step, ...fields }),
    seconds: () => Math.round(performance.now() - started) / 1000,
    state: "new",
    totals: { chunks: 0, rows: 0, bytes: 0 },
  };
  return { run, undos, stop: (failure: Error) => stop.abort(failure), settle: () => clearTimeout(timer) };
}

/** What is done for a run that has failed must not keep it from ending. */
async function within5s(promise: Promise<unknown>): Promise<void> {
  const quiet = promise.catch((error: Error) => log({ step: "warning", error: error.message }));
  await Promise.race([quiet, delay(5000, undefined, { ref: false })]);
}

async function push(run: Run, env: RunEnv, failed: boolean): Promise<void> {
  const now = Date.now() / 1000;
  const metrics: Metrics = { etl_last_run_timestamp_seconds: now };
  if (run.unknownColumns) metrics.etl_unknown_source_columns = run.unknownColumns.length;
  if (run.window) metrics.etl_watermark_hold_seconds = run.window.holdSeconds;
  if (failed) metrics.etl_last_failure_timestamp_seconds = now;
  else {
    metrics.etl_last_success_timestamp_seconds = now;
    metrics.etl_rows = run.totals.rows;
    metrics.etl_bytes = run.totals.bytes;
    metrics.etl_duration_seconds = run.seconds();
    if (run.watermark) metrics.etl_watermark_timestamp_seconds = epochSeconds(run.watermark);
  }
  await pushMetrics(env.PUSHGATEWAY_URL, run.pipeline, metrics).catch(({ message }: Error) =>
    run.log("warning", { warning: "the metrics were not pushed; the run itself is not affected", error: message }),
  );
}

/** What a chunk without rows moved. */
export const noRows = { rows: 0, bytes: 0, inserted: 0, updated: 0 };

/** Adds a chunk to the run's totals and prints its line. */
export function reportChunk(run: Run, chunk: Chunk, done: typeof noRows): void {
  progress("");
  run.totals.chunks += 1;
  run.totals.rows += done.rows;
  run.totals.bytes += done.bytes;
  run.log("chunk", { chunk: run.totals.chunks, from: chunk.from, to: chunk.to, ...done, seconds: run.seconds() });
}

async function record(run: Run, state: "succeeded" | "failed", error: string | null = null): Promise<void> {
  const { rows, bytes } = run.totals;
  await run.etl`
    update etl.runs set state = ${state}, rows = ${rows}, bytes = ${bytes}, error = ${error}, finished_at = now(),
      chunk_from = ${run.window?.from ?? null}::text::timestamptz,
      chunk_to = ${run.watermark ?? run.window?.to ?? null}::text::timestamptz, by_hand = ${run.byHand},
      source_server = ${run.sourceAt?.server ?? null}, source_database = ${run.sourceAt?.database ?? null},
      source_wal = ${run.sourceAt?.wal ?? null}::text::pg_lsn
    where run_id = ${run.id}`;
}

/**
 * Retention of the history, by each run that succeeded: the pipeline's runs, but the latest of each kind stay; and archived days, but
 * not those that a backfill has yet to do (what is archived, the manifests say).
 */
async function forget({ etl, pipeline, log }: Run, days: number | undefined): Promise<void> {
  if (days === undefined) return;
  const old = etl`now() - make_interval(days => ${days})`;
  try {
    await etl`
      delete from etl.runs where pipeline = ${pipeline} and started_at < ${old} and run_id not in (
        select distinct on (state, by_hand) run_id from etl.runs where pipeline = ${pipeline}
        order by state, by_hand, started_at desc)`;
    await etl`delete from etl.chunks where pipeline = ${pipeline} and state = 'succeeded' and finished_at < ${old}`;
  } catch (error) {
    log("warning", { warning: `history older than ${days} days was not deleted`, error: (error as Error).message });
  }
}

/**
 * Calls `attempt` up to four times, waiting about 1, 2 and 4 s in between, as long as its errors are transient.
 * Each attempt gets its number, from 1: nothing of an earlier one is used again.
 */
export async function withRetry<T>(
  run: Run,
  isTransient: (error: unknown) => boolean,
  attempt: (number: number) => Promise<T>,
): Promise<T> {
  for (let number = 1; ; number++) {
    try {
      return await attempt(number);
    } catch (error) {
      if (number === 4 || run.signal.aborted || !isTransient(error)) throw error;
      const seconds = 2 ** (number - 1) * (0.75 + Math.random() / 2);
      run.log("retry", { attempt: number, in_seconds: seconds.toFixed(1), error: (error as Error).message });
      await delay(seconds * 1000, undefined, { signal: run.signal });
    }
  }
}

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
