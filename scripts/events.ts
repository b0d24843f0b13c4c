#!/usr/bin/env -S npx tsx
/**
 * events: Postgres → S3 archive.
 *
 *   source         public.events, append-only, as sql/events.sql reads it
 *   target         S3_BUCKET/S3_PREFIX/events/dt=YYYY-MM-DD/part-NNNN-RUN.ndjson.gz, and manifest.json: a day is done when it exists
 *   key            id; a day of created_at, in UTC, is archived as a whole
 *   watermark      created_at, set by the database; always a midnight: every day before it is archived
 *   schedule       daily, cron
 *   safe to re-run yes, at any time, any number of times, twice at once: a day becomes visible by its manifest, which is put last
 *                  and only if nobody else put one meanwhile; parts are never overwritten
 *
 *   make events                        every complete day since the watermark (the first time: yesterday)
 *     MAX_ROWS_PER_SECOND=20000        spares the source
 *
 * For days of your own: make backfill-events.
 * Touches: reads the source as a read-only role; writes objects below events/ in the bucket, schema etl, and the Pushgateway.
 */
import { readEnv, UsageError } from "../shared/env.ts";
import { addDays, archiveDays, archiveVariables, daysBetween, openArchive } from "../shared/events/archive.ts";
import { main } from "../shared/main.ts";
import { type Run, runPipeline, takeLock } from "../shared/run.ts";
import { queryFile, type Window } from "../shared/session.ts";
import { advance, takeWindow } from "../shared/watermark.ts";

await main(import.meta, async () => {
  const env = readEnv(archiveVariables);
  if (env.FROM) throw new UsageError("make events archives the days since the watermark. Next: make backfill-events FROM=… TO=…");
  await runPipeline("events", env, async (run) => {
    // 1. Lock: one run at a time, a backfill too.
    if (!(await takeLock(run))) return;

    // 2. Check the source, which must fit into etl.events_restored again, and the bucket, before a row moves.
    const archive = await openArchive(run, env);

    // 3. Take the window: the days since the watermark that end before the safe upper bound.
    const window = await takeWindow(run, {});
    const days = await dueDays(run, window);

    // 4. For each day: skip it if it is done; else extract, compress and put its parts, count, put the manifest. The watermark
    // follows, up to the first day that failed.
    await archiveDays(archive, days, new Map(), (to) => advance(run, { from: run.watermark ?? window.from, to }, window.origin));
    // 5. Report: etl.runs, the metrics and the last line are written by runPipeline, whether this succeeded or failed.
  });
});

/** The days since the watermark that are over, as the safe upper bound knows it; the first time yesterday. */
async function dueDays(run: Run, { from, to }: Window): Promise<string[]> {
  if (to === "-infinity") return []; // held before there is a watermark
  const bound = to.slice(0, 10);
  if (from !== "-infinity") return daysBetween(from.slice(0, 10), bound);
  const yesterday = addDays(bound, -1);
  const [older] = await queryFile<{ older_days: number; next: string }>(run.source, "older_days", { "etl.to": yesterday });
  if (older?.next) run.log("first-run", { archives: yesterday, ...older });
  return [yesterday];
}
