/** The life of a run: its id, its lock, its deadline, its record in etl.runs and its metrics. */
import { randomBytes } from "node:crypto";
import { hostname } from "node:os";
import { setTimeout as delay } from "node:timers/promises";
import type { Sql } from "postgres";
import { copyJsonLines, type RowStream } from "./copy.ts";
import { baseUrl, type Env, httpUrl, number, optional, postgresUrl, redact, required, timestamp } from "./env.ts";
import { context, type Fields, log, progress } from "./log.ts";
import { explain, onSignal } from "./main.ts";
import { type Metrics, orWarn, pushMetrics, tellHeartbeat } from "./metrics.ts";
import { checkSession, openSession, queryFile, type Settings, type Window } from "./session.ts";

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
    if (env.SOURCE_DATABASE_URL) await checkSession("SOURCE_DATABASE_URL", run.source);
    await body(run);
    if (run.state !== "recorded") return;
    await record(run, "succeeded");
    const settings = { "etl.pipeline": pipeline, "etl.days": String(env.RETENTION_DAYS) };
    await orWarn("history older than RETENTION_DAYS was not deleted", queryFile(run.etl, "forget", settings));
  };
  const stopped = new Promise<never>((_, reject) => stop.signal.addEventListener("abort", () => reject(stop.signal.reason)));
  let failure: Error | undefined;
  try {
    await Promise.race([work(), stopped]);
  } catch (error) {
    failure = error as Error;
    stop.abort(failure); // work of another day or model beside it must not publish what is undone here
    const ends = [...undos].map((undo) => undo());
    // Of a scheduled one also before it has the lock: make status must know of it.
    if (run.state === "recorded" || !run.byHand) ends.push(record(run, "failed", redact(explain(failure))));
    await Promise.race([Promise.allSettled(ends), delay(5000, undefined, { ref: false })]); // nothing of this keeps it from ending
  }
  if (run.state !== "skipped" && !run.byHand)
    await Promise.all([push(run, env.PUSHGATEWAY_URL, failure !== undefined), run.tell(failure ? "fail" : "success")]);
  const [{ totals, watermark }, seconds] = [run, run.seconds()];
  const rows_per_second = Math.round(totals.rows / seconds);
  const peak_rss_mb = Math.round(process.resourceUsage().maxRSS / 1024);
  const done = { ...totals, seconds, rows_per_second, peak_rss_mb, watermark };
  if (failure || run.state === "recorded") run.log(failure ? "failed" : "done", done);
  if (failure) throw failure;
  await Promise.all([run.etl.end({ timeout: 5 }), run.source.end({ timeout: 5 })]);
}

/** Sorts by time; lower case, digits and _ only, so that it can be a BigQuery label and part of a table's name. */
export const newRunId = (): string =>
  `${new Date().toISOString().slice(0, 19).replaceAll(/[-:]/g, "").replace("T", "_")}_${randomBytes(3).toString("hex")}`;

export type Run = ReturnType<typeof createRun>;

function createRun(pipeline: string, env: RunEnv, stop: AbortController, undos: Set<() => Promise<unknown>>) {
  const [timeoutSeconds, sourceUrl] = [env.RUN_TIMEOUT_SECONDS, env.SOURCE_DATABASE_URL || env.ETL_DATABASE_URL];
  const [id, started] = [newRunId(), performance.now()];
  Object.assign(context, { pipeline, run: id });
  const session = { application: `etl:${pipeline} run=${id}`, timeoutSeconds };
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
    seconds: (): number => Math.round(performance.now() - started) / 1000,
    state: "new" as "new" | "recorded" | "skipped",
    /** Sums over the chunks, and what BigQuery billed, for the report. */
    totals: { rows: 0, bytes: 0, chunks: 0, bytes_billed: 0 },
    tell: (event: "start" | "success" | "fail"): Promise<void> => tellHeartbeat(env.HEARTBEAT_URL, pipeline, event),
    /** The window and the watermark, once known, for the record. */
    window: undefined as Window | undefined,
    watermark: undefined as string | undefined,
    /** What is pushed at the end, whether the run succeeded or failed. */
    metrics: {} as Metrics,
  };
  return run;
}

function push({ pipeline, metrics, totals, seconds }: Run, url: string, failed: boolean): Promise<unknown> {
  const now = Date.now() / 1000;
  const succeeded = {
    etl_last_success_timestamp_seconds: now,
    etl_rows: totals.rows,
    etl_bytes: totals.bytes,
    etl_bytes_billed: totals.bytes_billed,
    etl_duration_seconds: seconds(),
  };
  const outcome = failed ? { etl_last_failure_timestamp_seconds: now } : succeeded;
  const pushed = pushMetrics(url, pipeline, { ...metrics, ...outcome, etl_last_run_timestamp_seconds: now });
  return orWarn("the metrics were not pushed", pushed);
}

/** Adds a chunk to the run's totals and prints its line. @param done what the chunk moved. */
export function reportChunk(run: Run, { from, to }: Window, done: Record<"rows" | "bytes" | "inserted" | "updated", number>): void {
  progress("");
  run.totals.rows += done.rows;
  run.totals.bytes += done.bytes;
  run.totals.chunks += 1;
  run.log("chunk", { chunk: run.totals.chunks, from, to, ...done, seconds: run.seconds() });
}

/** Records the run, as it is now, in etl.runs. */
async function record(run: Run, state: "running" | "succeeded" | "failed", error?: string): Promise<void> {
  const { id: run_id, pipeline, byHand: by_hand, totals, window, watermark } = run;
  const hold_seconds = run.metrics.etl_watermark_hold_seconds ?? 0;
  const read = { chunk_from: window?.from, chunk_to: watermark ?? window?.to };
  const row = { run_id, pipeline, state, host: hostname(), pid: process.pid, by_hand, ...totals, hold_seconds, ...read, error };
  await queryFile(run.etl, "record_run", { "etl.run": JSON.stringify(row) });
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
  await record(run, "running");
  run.state = "recorded";
  if (!run.byHand) await run.tell("start");
  return true;
}

/** Who holds the pipeline's lock, since when, and on which host. */
export const describeHolder = async (etl: Sql, pipeline: string): Promise<Fields> =>
  (await queryFile<Fields>(etl, "lock_holder", { "etl.pipeline": pipeline }))[0] ?? {};
