/** The life of a run: its id, its lock, its deadline, its record in etl.runs and its metrics. */
import { randomBytes } from "node:crypto";
import { hostname } from "node:os";
import { setTimeout as delay } from "node:timers/promises";
import type { Sql } from "postgres";
import { copyJsonLines, type RowStream } from "./copy.ts";
import { baseUrl, type Env, httpUrl, number, optional, postgresUrl, redact, required, timestamp } from "./env.ts";
import { context, type Fields, log, progress } from "./log.ts";
import { explain, onSignal } from "./main.ts";
import { type Metrics, pushMetrics, tellHeartbeat } from "./metrics.ts";
import { checkSession, openSession, type SessionOptions, type Settings, type Window } from "./session.ts";

/** What every run reads. */
export const runVariables = {
  ETL_DATABASE_URL: required(postgresUrl),
  PUSHGATEWAY_URL: required(baseUrl),
  RUN_TIMEOUT_SECONDS: optional(number(1, 604_800, false), 1800),
  RETENTION_DAYS: optional(number(1, 36_500), 400),
  HEARTBEAT_URL: optional(httpUrl, ""),
};

/** What every pipeline from Postgres reads. */
export const pipelineVariables = {
  ...runVariables,
  SOURCE_DATABASE_URL: required(postgresUrl),
  WATERMARK_LAG_SECONDS: optional(number(0, 86_400, false), 5),
  CHUNK_ROWS: optional(number(1, 100_000_000), 250_000),
  FROM: optional(timestamp),
  TO: optional(timestamp),
};

/** Without SOURCE_DATABASE_URL the run has no source, and must not ask it. FROM, ONLY and DRY_RUN make it one by hand. */
type RunEnv = Env<typeof runVariables> & Partial<Env<typeof pipelineVariables>> & { ONLY?: string | undefined; DRY_RUN?: boolean };

/**
 * Runs `body` as one run of the pipeline. Success and failure are recorded and pushed; a run that found the lock held does neither, and a
 * re-run by hand pushes nothing, since it says nothing of the schedule.
 * @throws what `body` throws, or an Error that says what stopped it: a signal, or the deadline.
 */
export async function runPipeline(pipeline: string, env: RunEnv, body: (run: Run) => Promise<void>): Promise<void> {
  const [stop, undos] = [new AbortController(), new Set<() => Promise<unknown>>()];
  const run = createRun(pipeline, env, stop, undos);
  const work = async (): Promise<void> => {
    await checkSession("ETL_DATABASE_URL", run.etl);
    if (env.SOURCE_DATABASE_URL)
      await checkSession("SOURCE_DATABASE_URL", run.source).catch(async (error: Error) => {
        if (!run.byHand) await recordStart(run); // make status must know of it, though it has no lock
        throw error;
      });
    await body(run);
    if (run.state === "recorded") await record(run, "succeeded", env.RETENTION_DAYS);
  };
  const stopped = new Promise<never>((_, reject) => stop.signal.addEventListener("abort", () => reject(stop.signal.reason)));
  let failure: Error | undefined;
  try {
    await Promise.race([work(), stopped]);
  } catch (error) {
    failure = error as Error;
    stop.abort(failure); // work of another day or model beside it must not publish what is undone here
    progress("");
    await within5s(Promise.allSettled([...undos].map((undo) => undo())));
    if (run.state === "recorded") await within5s(record(run, "failed", env.RETENTION_DAYS, redact(explain(failure))));
  }
  if (run.state !== "skipped" && !run.byHand)
    await Promise.all([push(run, env.PUSHGATEWAY_URL, failure !== undefined), run.tell(failure ? "fail" : "success")]);
  const [{ totals, watermark }, seconds] = [run, run.seconds()];
  if (failure) {
    run.log("failed", { rows: totals.rows, chunks: totals.chunks, seconds, watermark });
    throw failure;
  }
  const rows_per_second = Math.round(totals.rows / seconds);
  const peak_rss_mb = Math.round(process.resourceUsage().maxRSS / 1024);
  if (run.state === "recorded") run.log("done", { ...totals, seconds, rows_per_second, peak_rss_mb, watermark });
  await Promise.all([run.etl.end({ timeout: 5 }), run.source.end({ timeout: 5 })]);
}

/** Sorts by time; lower case, digits and _ only, so that it can be a BigQuery label and part of a table's name. */
export function newRunId(at: number = Date.now()): string {
  const time = new Date(at).toISOString().slice(0, 19).replaceAll(/[-:]/g, "").replace("T", "_");
  return `${time}_${randomBytes(3).toString("hex")}`;
}

export type Run = ReturnType<typeof createRun>;

function createRun(pipeline: string, env: RunEnv, stop: AbortController, undos: Set<() => Promise<unknown>>) {
  const [timeoutSeconds, sourceUrl] = [env.RUN_TIMEOUT_SECONDS, env.SOURCE_DATABASE_URL || env.ETL_DATABASE_URL];
  const [id, started] = [newRunId(), performance.now()];
  Object.assign(context, { pipeline, run: id });
  const session: SessionOptions = { application: `etl:${pipeline} run=${id}`, timeoutSeconds };
  const settings = { "etl.lag_seconds": String(env.WATERMARK_LAG_SECONDS ?? 0) };
  const abort = (reason: string): void => stop.abort(new Error(`${reason}. No chunk is half applied; ${run.next}`));
  const deadline = `the run's deadline of ${timeoutSeconds} s (RUN_TIMEOUT_SECONDS) has passed`;
  const timer = setTimeout(abort, timeoutSeconds * 1000, deadline).unref();
  onSignal((signal) => abort(`stopped by ${signal}`));
  const run = {
    /** Joins log, etl.runs, BigQuery's job labels, Postgres's application_name and the archive's S3 metadata. */
    id,
    pipeline,
    /** A part was asked for (FROM and TO, ONLY, a dry run): the watermark and the pipeline's metrics stay as they are. */
    byHand: env.FROM !== undefined || env.ONLY !== undefined || env.DRY_RUN === true,
    etl: openSession(env.ETL_DATABASE_URL, { ...session, settings: { default_transaction_read_only: "off" } }) as Sql,
    source: openSession(sourceUrl, { ...session, settings }) as Sql,
    /** Streams the source's rows. @param settings what the SELECT reads, for example etl.from and etl.to. */
    copy: (select: string, settings: Settings): RowStream => copyJsonLines(sourceUrl, select, { ...session, settings }),
    /** Aborts at the deadline, at SIGINT or SIGTERM, and when the run has failed. */
    signal: stop.signal,
    /** Begins the deadline again: for work that has one for each of its pieces. */
    restartDeadline: (): void => void timer.refresh(),
    /** What follows where the run is stopped, in words. */
    next: "the next run resumes at the watermark. Next: make status",
    /** Something to undo if the run is stopped, until disposed of. */
    onStop: (undo: () => Promise<unknown>): Disposable => {
      undos.add(undo);
      return { [Symbol.dispose]: () => undos.delete(undo) };
    },
    log: (step: string, fields: Fields = {}): void => log({ step, ...fields }),
    /** Seconds since the run began. */
    seconds: (): number => Math.round(performance.now() - started) / 1000,
    state: "new" as "new" | "recorded" | "skipped",
    /** Sums over the chunks, and what BigQuery billed, for the report. */
    totals: { rows: 0, bytes: 0, chunks: 0, bytes_billed: 0 },
    /** Tells HEARTBEAT_URL. Never throws; takes at most 5 s. */
    tell: (event: "start" | "success" | "fail"): Promise<void> => tellHeartbeat(env.HEARTBEAT_URL, pipeline, event),
    /** The window and the watermark, once known, for the record. */
    window: undefined as Window | undefined,
    watermark: undefined as string | undefined,
    /** What is pushed at the end, whether the run succeeded or failed. */
    metrics: {} as Metrics,
  };
  return run;
}

/** What is done for a run that has failed must not keep it from ending. */
async function within5s(promise: Promise<unknown>): Promise<void> {
  const quiet = promise.catch((error: Error) => log({ step: "warning", error: error.message }));
  await Promise.race([quiet, delay(5000, undefined, { ref: false })]);
}

async function push({ pipeline, metrics, totals, log, seconds }: Run, url: string, failed: boolean): Promise<void> {
  const now = Date.now() / 1000;
  const outcome = failed
    ? { etl_last_failure_timestamp_seconds: now }
    : {
        etl_last_success_timestamp_seconds: now,
        etl_rows: totals.rows,
        etl_bytes: totals.bytes,
        etl_bytes_billed: totals.bytes_billed,
        etl_duration_seconds: seconds(),
      };
  const pushed = pushMetrics(url, pipeline, { ...metrics, ...outcome, etl_last_run_timestamp_seconds: now });
  await pushed.catch(({ message }: Error) =>
    log("warning", { warning: "the metrics were not pushed; the run itself is not affected", error: message }),
  );
}

/** Adds a chunk to the run's totals and prints its line. @param done what the chunk moved. */
export function reportChunk(run: Run, { from, to }: Window, done: Record<"rows" | "bytes" | "inserted" | "updated", number>): void {
  progress("");
  run.totals.rows += done.rows;
  run.totals.bytes += done.bytes;
  run.totals.chunks += 1;
  run.log("chunk", { chunk: run.totals.chunks, from, to, ...done, seconds: run.seconds() });
}

/**
 * Records the run's end. After a success it also deletes runs and archived days older than RETENTION_DAYS, keeping the newest run of each
 * state; days that a backfill has yet to archive stay.
 */
async function record(run: Run, state: "succeeded" | "failed", days: number, error?: string): Promise<void> {
  const { pipeline, etl, totals, window, watermark } = run;
  await etl`
    update etl.runs set state = ${state}, rows = ${totals.rows}, bytes = ${totals.bytes}, bytes_billed = ${totals.bytes_billed},
      hold_seconds = ${run.metrics.etl_watermark_hold_seconds ?? 0}, error = ${error ?? null}, finished_at = now(),
      by_hand = ${run.byHand}, chunk_from = ${window?.from ?? null}::text::timestamptz,
      chunk_to = ${watermark ?? window?.to ?? null}::text::timestamptz
    where run_id = ${run.id}`;
  if (error) return;
  const forget = etl`
    with days as (
      delete from etl.chunks where pipeline = ${pipeline} and state = 'succeeded' and finished_at < now() - make_interval(days => ${days})
    ), proofs as (delete from etl.verifications where verified_at < now() - make_interval(days => ${days}))
    delete from etl.runs where pipeline = ${pipeline} and started_at < now() - make_interval(days => ${days}) and run_id not in (
      select distinct on (state, by_hand) run_id from etl.runs where pipeline = ${pipeline}
      order by state, by_hand, started_at desc)`;
  await forget.catch(({ message }: Error) =>
    run.log("warning", { warning: `history older than ${days} days was not deleted`, error: message }),
  );
}

/**
 * Calls `attempt` up to seven times, waiting about 1, 2, 4, 8, 16 and 32 s in between (as BigQuery's SLA asks), as long as its errors are
 * transient. Each attempt gets its number, from 1: nothing of an earlier one is used again.
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
      if (number === 7 || run.signal.aborted || !isTransient(error)) throw error;
      const seconds = 2 ** (number - 1) * (0.75 + Math.random() / 2);
      run.log("retry", { attempt: number, in_seconds: Number(seconds.toFixed(1)), error: (error as Error).message });
      await delay(seconds * 1000, undefined, { signal: run.signal });
    }
  }
}

/** The key of the pipeline's advisory lock, in SQL. */
export const lockKey = (etl: Sql, pipeline: string) => etl`hashtextextended(${`etl:${pipeline}`}, 0)`;

/**
 * Takes the pipeline's lock: a session advisory lock on the metadata database, which ends with its session, whatever becomes of the
 * process. It saves work; with it lost, upsert and compare-and-set still keep everything right. A run by hand waits for it.
 * @returns false where another run holds it.
 */
export async function takeLock(run: Run): Promise<boolean> {
  const { etl, pipeline } = run;
  const [lock] = await etl<{ taken: boolean }[]>`select pg_try_advisory_lock(${lockKey(etl, pipeline)}) as taken`;
  if (!lock?.taken) {
    const holder = await describeHolder(etl, pipeline);
    run.log(run.byHand ? "waiting" : "skipped", { because: "another run holds the lock", ...holder });
    if (!run.byHand) {
      run.state = "skipped";
      return false;
    }
    await etl`set lock_timeout = 0`;
    await etl`select pg_advisory_lock(${lockKey(etl, pipeline)})`;
  }
  await recordStart(run);
  if (!run.byHand) await run.tell("start");
  return true;
}

async function recordStart(run: Run): Promise<void> {
  await run.etl`
    insert into etl.runs (run_id, pipeline, state, host, pid)
    values (${run.id}, ${run.pipeline}, 'running', ${hostname()}, ${process.pid})`;
  run.state = "recorded";
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
      and (l.classid::bigint << 32) | l.objid::bigint = ${lockKey(etl, pipeline)}`;
  return { ...holder };
}
