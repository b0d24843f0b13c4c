#!/usr/bin/env -S npx tsx
/**
 * events: Postgres → S3 archive.
 *
 *   source         public.events, append-only, as sql/events.sql reads it
 *   target         S3_BUCKET/S3_PREFIX/events/dt=YYYY-MM-DD/part-NNNN-RUN.ndjson.gz, and manifest.json: a day is done when it is there
 *   key            id; a day of created_at, in UTC, is archived as a whole
 *   watermark      created_at, set by the database; always a midnight: every day before it is archived
 *   schedule       daily, cron
 *   safe to re-run yes, at any time, any number of times, twice at once: a day becomes visible by its manifest, which is put last
 *                  and only if nobody else put one meanwhile; parts are never overwritten
 *
 *   make events                                             every complete day since the watermark (the first time: yesterday)
 *   make backfill-events FROM=2017-01-01 TO=2018-01-01      the days of [FROM, TO); skips those that are done; the watermark stays
 *     CONCURRENCY=2                                         days at a time
 *     MAX_ROWS_PER_SECOND=20000                             spares the source
 *     FORCE=1                                               archives days again that are done
 *     ALLOW_SHRINK=1                                        even where they have fewer rows than in the archive
 *
 * Touches: reads the source as a read-only role; writes objects below events/ in the bucket, schema etl, and the Pushgateway.
 */

import { copyJsonLines } from "../shared/copy.ts";
import { readEnv } from "../shared/env.ts";
import {
  addDays,
  archiveVariables,
  checkArchivable,
  createPace,
  createParts,
  describeDay,
  eachDay,
  type Position,
  publish,
  readDays,
  readManifest,
  startDay,
  startOf,
  windowDays,
} from "../shared/events/archive.ts";
import { bucketVariables, checkBucket, connectS3, isTransientS3 } from "../shared/events/s3.ts";
import { main } from "../shared/main.ts";
import { pipelineVariables, runPipeline, takeLock, withRetry } from "../shared/run.ts";
import { readSelect } from "../shared/source.ts";
import { takeWindow } from "../shared/watermark.ts";

const pipeline = "events";

await main(import.meta, async () => {
  const env = readEnv({ ...pipelineVariables, ...bucketVariables, ...archiveVariables });
  const source = { table: "public.events", cursor: "created_at", select: readSelect(pipeline) };
  const asked = env.BACKFILL || env.FROM ? readDays(env, "backfill-events") : undefined;
  await runPipeline(pipeline, env, async (run) => {
    if (asked) run.next = "and days that are done stay so. To resume: the same command again";

    // 1. Lock: one run at a time.
    if (!(await takeLock(run))) return;

    // 2. Check the source, which must fit into etl.events_restored again, and the bucket, before a row moves.
    const bucket = connectS3(env);
    const [lines] = await Promise.all([checkArchivable(run, source), checkBucket(bucket)]);

    // 3. Take the window: the days since the watermark, or of [FROM, TO), that end before the safe upper bound.
    const window = await takeWindow(run, env);
    const days = await windowDays(run, asked, window, source);

    // 4. For each day: skip it if it is done; else extract and upload its parts, count, put the manifest. The watermark follows.
    const pace = createPace(run, env.MAX_ROWS_PER_SECOND);
    await eachDay(run, days, window, env, async (day) => {
      return await withRetry(run, isTransientS3, async (attempt) => {
        const before = await readManifest(bucket, day);
        if (before && !env.FORCE) return { manifest: before.manifest, skipped: before.manifest.run_id !== run.id };
        await startDay(run, day);
        await using parts = createParts(run, bucket, day, attempt, env.CHUNK_ROWS);
        const to = startOf(addDays(day)).created_at;
        for (let after: Position | undefined = startOf(day); after; ) {
          const settings = { "etl.after": after.id, "etl.rows": String(env.CHUNK_ROWS) };
          const part = { ...run.session, settings };
          await using rows = copyJsonLines(env.SOURCE_DATABASE_URL, lines, part, { from: after.created_at, to });
          after = await parts.add(rows, pace());
        }
        const counted = await describeDay(run, parts);
        const manifest = await publish(run, bucket, parts, counted, before, env.ALLOW_SHRINK);
        return { manifest, skipped: manifest.run_id !== run.id };
      });
    });
    // 5. Report: etl.runs, the metrics and the last line are written by runPipeline, whether this succeeded or failed.
  });
});
