#!/usr/bin/env -S npx tsx
/**
 * rewind: sets a pipeline's watermark back, so that its next run reads the rows since then again.
 *
 *   safe             yes: rows are upserted, so nothing is doubled; it never moves a watermark forward, which would lose rows
 *   keeps            a row in etl.runs with state rewound, and the window that is read again
 *   also             takes over the source's identity, after a restore or a failover
 *
 *   make rewind PIPELINE=orders TO=2017-06-01 DRY_RUN=1    says what would be read again; without DRY_RUN=1 it does it
 */
import { hostname } from "node:os";
import { flag, oneOf, optional, readEnv, required, timestamp, UsageError } from "../../shared/env.ts";
import { main } from "../../shared/main.ts";
import { watermarked } from "../../shared/pipelines.ts";
import { describeHolder, lockKey, pipelineVariables, runPipeline } from "../../shared/run.ts";
import { queryWith } from "../../shared/session.ts";
import { readSelect } from "../../shared/source.ts";
import { distrust, readBound, readWatermark } from "../../shared/watermark.ts";

const { FROM: _, ...others } = pipelineVariables;
const PIPELINE = required(oneOf(watermarked()));
const variables = { ...others, PIPELINE, TO: required(timestamp), DRY_RUN: optional(flag, false) };

await main(import.meta, async () => {
  const env = readEnv(variables);
  const { PIPELINE: pipeline, TO: to } = env;
  // By hand: it says nothing of the pipeline's schedule.
  await runPipeline(pipeline, { ...env, DRY_RUN: true }, async (run) => {
    const { etl, source } = run;

    // 1. Not while a run is going: it would lose its compare-and-set and fail.
    const [lock] = await etl<{ taken: boolean }[]>`select pg_try_advisory_lock(${lockKey(etl, pipeline)}) as taken`;
    if (!lock?.taken) {
      const holder = Object.values(await describeHolder(etl, pipeline)).join(", ");
      throw new Error(`a run of ${pipeline} is going (${holder}). Once it has ended: make rewind PIPELINE=${pipeline} TO=${to}`);
    }

    // 2. Where is it, and what will be read again?
    const stored = await readWatermark(etl, pipeline);
    if (!stored)
      throw new UsageError(`${pipeline} has no watermark: it has never run, and its first run reads everything. Next: make ${pipeline}`);
    const { watermark } = stored;
    if (to > watermark)
      throw new UsageError(`TO=${to} is after the watermark ${watermark}: a rewind goes back only, the rows between would never be read.`);
    const bound = await readBound(source);
    const reason = await distrust({ pipeline, source }, stored, bound);
    const kept = "the destination may hold versions that the source has lost, dated later, which the upsert keeps";
    if (reason) run.log("warning", { warning: `${kept}: ${reason}` });
    // Of events: every id of the first day.
    const all = { "etl.after": "-9223372036854775809", "etl.rows": "9223372036854775807", statement_timeout: "300s" };
    const count = `select count(*)::float8 as rows from (${readSelect(pipeline)}) q`;
    const counted = queryWith<{ rows: number }>(source, { "etl.from": to, "etl.to": watermark, ...all }, count);
    const [{ rows } = { rows: undefined }] = await counted.catch((error: { code?: string }) => {
      if (error.code === "57014") return []; // query_canceled: the number is only for the reader
      throw error;
    });
    const again = { from: watermark, to, rows_to_read_again: rows ?? "not counted: it takes too long" };
    run.log(env.DRY_RUN ? "would-rewind" : "rewind", again);
    if (env.DRY_RUN) return;

    // 3. Set it, and keep the history: one statement.
    const { server, database_oid, wal } = bound;
    // Of another table only a run that reads everything makes what it was.
    const destination = to.startsWith("0001-01-01") ? null : stored.destination;
    const moved = await etl`
      with moved as (
        update etl.watermarks set watermark = ${to}::text::timestamptz, server = ${server}, database_oid = ${database_oid}, wal = ${wal},
          destination = ${destination}, run_id = ${run.id}, updated_at = now()
        where pipeline = ${pipeline} and watermark = ${watermark}::text::timestamptz returning pipeline)
      insert into etl.runs (run_id, pipeline, state, chunk_from, chunk_to, rows, host, pid, finished_at)
      select ${run.id}, pipeline, 'rewound', ${to}::text::timestamptz, ${watermark}::text::timestamptz, ${rows ?? 0}::bigint,
        ${hostname()}, ${process.pid}, now() from moved`;
    if (moved.count !== 1) throw new Error(`the watermark of ${pipeline} moved meanwhile. Next: make status`);
    run.log("done", { watermark: to, next: `make ${pipeline}` });
  });
});
