#!/usr/bin/env -S npx tsx
/**
 * rewind: sets a pipeline's watermark back, so that its next run reads the rows since then again.
 *
 *   safe             yes: rows are upserted, so nothing is doubled; it never moves a watermark forward, which would lose rows
 *   keeps            a row in etl.runs with state rewound, and the window that is read again
 *   also             takes over the source's identity, after a restore or a failover
 *
 *   make rewind PIPELINE=orders TO=2017-06-01
 *   make rewind PIPELINE=orders TO=2017-06-01 DRY_RUN=1    say what would be read again
 */
import { hostname } from "node:os";
import { flag, name, optional, readEnv, required, UsageError } from "../../shared/env.ts";
import { type Fields, log } from "../../shared/log.ts";
import { current, main } from "../../shared/main.ts";
import { watermarked } from "../../shared/pipelines.ts";
import { describeHolder, lockKey, newRunId, pipelineVariables } from "../../shared/run.ts";
import { checkSession, connect } from "../../shared/session.ts";
import { readSelect } from "../../shared/source.ts";
import { distrust, readBound, readWatermark } from "../../shared/watermark.ts";

await main(import.meta, async () => {
  const env = readEnv({
    SOURCE_DATABASE_URL: pipelineVariables.SOURCE_DATABASE_URL,
    ETL_DATABASE_URL: pipelineVariables.ETL_DATABASE_URL,
    PIPELINE: required(name),
    TO: pipelineVariables.TO,
    DRY_RUN: optional(flag, false),
  });
  const { PIPELINE: pipeline, TO: to } = env;
  if (!to)
    throw new UsageError(
      "TO is missing: the time to set the watermark back to. Example: make rewind PIPELINE=orders TO=2017-06-01",
    );
  if (!watermarked().includes(pipeline))
    throw new UsageError(`PIPELINE=${pipeline}: there is no such pipeline; there are: ${watermarked().join(", ")}`);
  const runId = newRunId();
  Object.assign(current, { run: runId });
  const say = (step: string, fields: Fields): void => log({ pipeline, run: runId, step, ...fields });
  const session = { application: `etl:rewind run=${runId}`, timeoutSeconds: 300 };
  const etl = connect(env.ETL_DATABASE_URL, session);
  const source = connect(env.SOURCE_DATABASE_URL, {
    ...session,
    settings: {
      "etl.lag_seconds": "0",
      "etl.from": to,
      "etl.after": "-9223372036854775809",
      "etl.rows": "9223372036854775807",
    },
  });
  await Promise.all([checkSession("ETL_DATABASE_URL", etl), checkSession("SOURCE_DATABASE_URL", source)]);

  // 1. Not while a run is going: it would lose its compare-and-set and fail.
  const [lock] = await etl<{ taken: boolean }[]>`select pg_try_advisory_lock(${lockKey(etl, pipeline)}) as taken`;
  if (!lock?.taken) {
    const holder = await describeHolder(etl, pipeline);
    throw new Error(
      `a run of ${pipeline} is going (${Object.values(holder).join(", ")}): wait for its end, then: make rewind ` +
        `PIPELINE=${pipeline} TO=${to}`,
    );
  }

  // 2. Where is it, and what will be read again?
  const stored = await readWatermark(etl, pipeline);
  if (!stored)
    throw new UsageError(
      `${pipeline} has no watermark: it has never run, and its first run reads everything. Next: make ${pipeline}`,
    );
  const bound = await readBound(source);
  if (to > stored.watermark) {
    throw new UsageError(
      `TO=${to} is after the watermark ${stored.watermark}: a rewind goes back only, since the rows between them would never be read.`,
    );
  }
  const reason = distrust(pipeline, stored, bound);
  if (reason)
    say("warning", {
      warning: `the destination may hold versions that the source has lost, dated later than its own, which the upsert keeps: ${reason}`,
    });
  await source`select set_config('etl.to', ${stored.watermark}, false)`;
  const counting = source.unsafe<{ rows: string }[]>(`select count(*) as rows from (${readSelect(pipeline)}) q`);
  const [again] = await counting.catch((error: { code?: string }) => {
    if (error.code === "57014") return []; // the statement's timeout: the number is only for the reader
    throw error;
  });
  say(env.DRY_RUN ? "would-rewind" : "rewind", {
    from: stored.watermark,
    to,
    rows_to_read_again: again ? Number(again.rows) : "not counted: it takes too long",
  });

  // 3. Set it, and keep the history.
  if (!env.DRY_RUN) {
    await etl.begin(async (sql) => {
      const moved = await sql`
        update etl.watermarks set watermark = ${to}::text::timestamptz, server = ${bound.server},
          database_oid = ${bound.database_oid}, wal = ${bound.wal}, run_id = ${runId}, updated_at = now()
        where pipeline = ${pipeline} and watermark = ${stored.watermark}::text::timestamptz`;
      if (moved.count !== 1) throw new Error(`the watermark of ${pipeline} moved meanwhile. Next: make status`);
      await sql`
        insert into etl.runs (run_id, pipeline, state, chunk_from, chunk_to, rows, host, pid, finished_at)
        values (${runId}, ${pipeline}, 'rewound', ${to}::text::timestamptz, ${stored.watermark}::text::timestamptz,
          ${again?.rows ?? 0}, ${hostname()}, ${process.pid}, now())`;
    });
    say("done", { watermark: to, next: `make ${pipeline}` });
  }
  await Promise.all([etl.end(), source.end()]);
});
