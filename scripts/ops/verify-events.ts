#!/usr/bin/env -S npx tsx
/**
 * verify-events: reads the archive of events back. It compares every part with its manifest, and each day with the source's rows, read
 * again; it names the command for a day that differs, and lists what killed runs left.
 *
 *   make verify-events                                   the last eight days before the watermark; pushes how many differ
 *   make verify-events FROM=2017-01-01 TO=2018-01-01     the days of [FROM, TO)
 *     CLEAN=1                                            deletes what killed runs left, where that is older than a day
 *
 *   schedule         nightly, cron
 *   safe to re-run   yes: it changes nothing that a manifest names
 *   exit code        1 where a day differs
 */
import { createHash } from "node:crypto";
import type { Sql } from "postgres";
import { flag, optional, readEnv, UsageError } from "../../shared/env.ts";
import * as archive from "../../shared/events/archive.ts";
import { type Bucket, checkBucket, connectS3, listObjects, removeObjects } from "../../shared/events/s3.ts";
import { log, progress, thousands } from "../../shared/log.ts";
import { main } from "../../shared/main.ts";
import { type Run, runPipeline } from "../../shared/run.ts";
import { dayVariables, readBack, readDays, readPart } from "./lib/events.ts";
import { recordVerified } from "./lib/verify.ts";

await main(import.meta, async () => {
  const env = readEnv({ ...dayVariables, CLEAN: optional(flag, false) });
  const wanted = env.FROM && readDays(env, "verify-events");
  // By hand: it says nothing of the pipeline's schedule.
  await runPipeline("events", { ...env, DRY_RUN: true }, async (run) => {
    const bucket = connectS3(env);
    const [lines] = await Promise.all([archive.checkArchivable(run), checkBucket(bucket)]);
    const days = wanted || (await lastDays(run.etl));
    const failed = await readBack(run, "verify-events", days, async (day) => {
      // 1. The archive by itself: each part against its manifest. The list comes before it: what that names was not stray.
      const objects = await Array.fromAsync(listObjects(bucket, archive.dayPrefix(bucket, day)));
      const archived = await readArchived(bucket, day);
      const named = new Set([archive.manifestKey(bucket, day), ...(archived.manifest?.parts ?? []).map(({ key }) => key)]);
      const strays = objects.filter(({ key }) => !named.has(key));
      if (archived.manifest || !archived.damage) await listStrays(run, bucket, strays, env.CLEAN); // one that cannot be read may name any

      // 2. The day's rows against the source's: by count, then by the hash of their lines, which are read as the archive reads them.
      const hash = createHash("sha256");
      await using stream = run.copy(lines(), archive.rowsOf(day));
      for await (const piece of stream.lines) {
        hash.update(piece);
        progress(`${day}: ${thousands(stream.sent.rows)} rows of the source, of ${thousands(archived.manifest?.rows ?? 0)} in the archive`);
      }
      return compareDay(day, archived, stream.sent.rows, hash.digest("hex"));
    });
    const found = `${failed.size} of the days ${days[0]} to ${days.at(-1)}`;
    if (!wanted) await recordVerified(run, env.PUSHGATEWAY_URL, run.totals.rows, failed.size, found);
    if (failed.size) throw archive.daysFailed(failed, days.length);
  });
});

/** The eight days before the watermark (a week, as the crontab has it, and a day); those of before the first archived one are left out. */
async function lastDays(etl: Sql): Promise<string[]> {
  const [last] = await etl<{ from: string; to: string }[]>`
    select watermark::date::text as to, greatest(watermark - interval '8 days',
      (select min(chunk_from) from etl.chunks where pipeline = 'events' and state = 'succeeded'))::date::text as from
    from etl.watermarks where pipeline = 'events'`;
  if (!last) throw new UsageError("make events has archived no day yet, and there is no FROM and TO. Next: make events");
  return archive.daysBetween(last.from, last.to);
}

/** A day's manifest, the hash of its raw lines, and what is wrong with any of them. */
async function readArchived(bucket: Bucket, day: string) {
  const raw = createHash("sha256");
  let [manifest, damage]: [archive.Manifest | undefined, string | undefined] = [undefined, undefined];
  try {
    manifest = (await archive.readManifest(bucket, day))?.manifest;
    for (const part of manifest?.parts ?? []) for await (const piece of readPart(bucket, part)) raw.update(piece);
  } catch (error) {
    if ((error as Error).name !== "Damaged") throw error;
    damage = (error as Error).message;
  }
  return { manifest, damage, sha256: raw.digest("hex") };
}

/** Objects that no manifest names: a killed run's, or those of a run that is under way. */
async function listStrays({ log }: Run, bucket: Bucket, strays: { key: string; modified: Date }[], clean: boolean): Promise<void> {
  for (const { key, modified } of strays) {
    const age_hours = Math.floor((Date.now() - modified.getTime()) / 3_600_000);
    const removes = clean && age_hours >= 24;
    if (removes) await removeObjects(bucket, [key]);
    const next = removes ? undefined : "CLEAN=1 deletes it once it is older than a day";
    log(removes ? "removed" : "stray", { what: "a part that no manifest names", key, age_hours, next });
  }
}

/** @returns the day's manifest. @throws Error that says how the day differs from the source's rows or hash, with the next command. */
function compareDay(day: string, archived: Awaited<ReturnType<typeof readArchived>>, rows: number, sha256: string): archive.Manifest {
  const { manifest, damage } = archived;
  const window = `FROM=${day} TO=${archive.addDays(day)}`;
  const again = `make backfill-events ${window}`;
  if (!manifest) throw new Error(`${damage ?? `is not archived; the source has ${rows} rows of it`}. Next: ${again}`);
  const restore = `restore the object from the bucket's versions or a copy, then: make verify-events ${window}`;
  if (damage && rows < manifest.rows) throw new Error(`${damage}. The source has only ${rows} of its ${manifest.rows} rows: ${restore}`);
  if (damage) throw new Error(`${damage}. Next: ${again} FORCE=1`);
  const changed = "rows were added with an old created_at, changed or deleted. If the archive is to have that too";
  const options = rows < manifest.rows ? "FORCE=1 ALLOW_SHRINK=1" : "FORCE=1";
  if (!rows && manifest.rows) log({ step: "note", day, note: `the source has none of its ${manifest.rows} rows any more` });
  else if (rows !== manifest.rows || sha256 !== archived.sha256)
    throw new Error(`its ${manifest.rows} rows are not the source's ${rows}: ${changed}: ${again} ${options}`);
  return manifest;
}
