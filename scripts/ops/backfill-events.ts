#!/usr/bin/env -S npx tsx
/**
 * backfill-events: archives the events of any days, as make events does each day.
 *
 *   make backfill-events FROM=2017-01-01 TO=2018-01-01     the days of [FROM, TO); skips those that are done; the watermark stays
 *     CONCURRENCY=2                                        days at a time; each holds a part of up to 32 MB in memory
 *     MAX_ROWS_PER_SECOND=20000                            spares the source
 *     FORCE=1                                              archives days again that are done
 *     ALLOW_SHRINK=1                                       even where they have fewer rows than in the archive
 *
 *   safe to re-run   yes, as make events: the same command resumes where the last one ended, killed or not
 */
import { number, optional, readEnv } from "../../shared/env.ts";
import { archiveDays, archiveVariables, openArchive } from "../../shared/events/archive.ts";
import { main } from "../../shared/main.ts";
import { runPipeline, takeLock } from "../../shared/run.ts";
import { takeWindow } from "../../shared/watermark.ts";
import { readDays } from "./lib/events.ts";

await main(import.meta, async () => {
  const env = readEnv({ ...archiveVariables, CONCURRENCY: optional(number(1, 32), 1) });
  const days = readDays(env, "backfill-events");
  await runPipeline("events", env, async (run) => {
    run.next = "days that are done stay so. To resume: the same command again";
    // 1. Lock: one run at a time, the daily one too.
    if (!(await takeLock(run))) return;

    // 2. Check the source and the bucket, before a row moves.
    const archive = await openArchive(run, env);

    // 3. Take the days that end before the safe upper bound; the others count as failed.
    const { to } = await takeWindow(run, env);
    const why = "is not over yet: the source can still get rows before its end";
    const isOver = (day: string): boolean => day < to.slice(0, 10);
    const failed = new Map(days.filter((day) => !isOver(day)).map((day) => [day, why]));

    // 4. For each day: skip it if it is done; else extract, compress and put its parts, count, put the manifest.
    await archiveDays(archive, days.filter(isOver), failed);
  });
});
