#!/usr/bin/env -S npx tsx
/**
 * rewind: sets a pipeline's watermark back, so that its next run reads the rows since then again.
 *
 *   safe             yes: rows are upserted, so nothing is doubled; it never moves a watermark forward, which would lose rows
 *   keeps            a row in etl.runs with state rewound, and the window that is read again
 *   also             takes over the source's identity, after a restore or a failover
 *
 *   make rewind PIPELINE=orders TO=2017-06-01 DRY_RUN=1    counts what would be read again; without DRY_RUN=1 it does it
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
    const holder = Object.values(await describeHolder(etl, pipeline)).join(", ");
    const again = `make rewind PIPELINE=${pipeline} TO=${to}`;
    if (!lock?.taken) throw new Error(`a run of ${pipeline} is going (${holder}). Once it has ended: ${again}`);

    // 2. Where is it, and may it go there?
    const stored = await readWatermark(etl, pipeline);
    const never = `${pipeline} has no watermark: it has never run, and its first run reads everything. Next: make ${pipeline}`;
    if (!stored) throw new UsageError(never);
    const { watermark: from } = stored;
    const ahead = `TO=${to} is after the watermark ${from}: a rewind goes back only, the rows between would never be read`;
    if (to > from) throw new UsageError(ahead);
    const bound = await readBound(source);
    const reason = await distrust({ pipeline, source }, stored, bound);
    const kept = "the destination may hold versions that the source has lost, dated later, which the upsert keeps";
    if (reason) run.log("warning", { warning: `${kept}: ${reason}` });
    if (env.DRY_RUN) {
      // Of events: every id of the first day.
      const all = { "etl.from": to, "etl.to": from, "etl.after": "-9223372036854775809", "etl.rows": "9223372036854775807" };
      const count = `select count(*)::float8 as rows_to_read_again from (${readSelect(pipeline)}) q`;
      return run.log("would-rewind", { from, to, ...(await queryWith(source, all, count))[0] });
    }

    // 3. Set it, and keep the history: one statement. Of another table only a run that reads everything makes what it was.
    const destination = to.startsWith("0001-01-01") ? null : stored.destination;
    const moved = await etl`
      with moved as (
        update etl.watermarks set watermark = ${to}::text::timestamptz, server = ${bound.server}, database_oid = ${bound.database_oid},
          wal = ${bound.wal}, destination = ${destination}, run_id = ${run.id}, updated_at = now()
        where pipeline = ${pipeline} and watermark = ${from}::text::timestamptz returning pipeline)
      insert into etl.runs (run_id, pipeline, state, chunk_from, chunk_to, host, pid, finished_at)
      select ${run.id}, pipeline, 'rewound', ${to}::text::timestamptz, ${from}::text::timestamptz, ${hostname()}, ${process.pid}, now()
      from moved`;
    if (moved.count !== 1) throw new Error(`the watermark of ${pipeline} moved meanwhile. Next: make status`);
    run.log("done", { from, watermark: to, next: `make ${pipeline}` });
  });
});
