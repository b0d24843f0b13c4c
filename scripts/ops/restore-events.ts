#!/usr/bin/env -S npx tsx
/**
 * restore-events: puts archived events into etl.events_restored.
 *
 *   make restore-events FROM=2017-01-01 TO=2018-01-01     the days of [FROM, TO), each checked against its manifest
 *
 *   safe to re-run   yes: it replaces a day's rows in one transaction
 */
import { pipeline } from "node:stream/promises";
import { readEnv } from "../../shared/env.ts";
import { addDays, daysFailed, midnight, readManifest } from "../../shared/events/archive.ts";
import { checkBucket, connectS3 } from "../../shared/events/s3.ts";
import { main } from "../../shared/main.ts";
import { runPipeline } from "../../shared/run.ts";
import { queryFile } from "../../shared/session.ts";
import { dayVariables, readBack, readDays, readPart } from "./lib/events.ts";

await main(import.meta, async () => {
  const env = readEnv(dayVariables);
  const days = readDays(env, "restore-events");
  // Without the source, which may be what was lost.
  await runPipeline("events", { ...env, SOURCE_DATABASE_URL: "" }, async (run) => {
    const [bucket, { etl }] = [connectS3(env), run];
    await checkBucket(bucket);
    const failed = await readBack(run, "restore-events", days, async (day) => {
      const window = `FROM=${day} TO=${addDays(day)}`;
      const found = await readManifest(bucket, day);
      if (!found) throw new Error(`is not archived. Next: make backfill-events ${window}`);
      // 1. The day's lines into a table of this session: nothing is restored before all of them are checked.
      await etl`drop table if exists lines`;
      await etl`create temp table lines (line text)`;
      for (const part of found.manifest.parts) {
        const copy = await etl`copy lines from stdin (format csv, quote e'\\x01', delimiter e'\\x02')`.writable();
        await pipeline(readPart(bucket, part), copy).catch((error: Error) => {
          if (error.name !== "Damaged") throw error;
          throw new Error(`${error.message}. Nothing of ${day} was restored. Next: make verify-events ${window}`);
        });
      }
      // 2. Those in the place of the day's rows.
      await queryFile(etl, "restore_events", { "etl.from": midnight(day), "etl.to": midnight(addDays(day)) });
      return found.manifest;
    });
    if (failed.size) throw daysFailed(failed, days.length);
  });
});
