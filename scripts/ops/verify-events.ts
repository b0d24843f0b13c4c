#!/usr/bin/env -S npx tsx
/**
 * verify-events: reads the archive of events back.
 *
 *   make verify-events                                   the last eight days before the watermark; pushes how many differ
 *   make verify-events FROM=2017-01-01 TO=2018-01-01     the days of [FROM, TO)
 *     CLEAN=1                                            deletes what killed runs left, where that is older than a day
 *
 * Decompresses, counts and hashes every part, and compares it with its manifest, and the day with the source's rows, read again. Names the
 * command for a day that differs, and lists what killed runs left.
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
import { progress, thousands } from "../../shared/log.ts";
import { main } from "../../shared/main.ts";
import { type Run, runPipeline } from "../../shared/run.ts";
import { dayVariables, readBack, readDay, readDays, readPart } from "./lib/events.ts";
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
      // 1. What killed runs left.
      await findStrays(run, bucket, day, env.CLEAN);

      // 2. The archive by itself: each part against its manifest.
      const archived = await verifyParts(bucket, day);

      // 3. The day's rows against the source's: by count, then by the hash of their lines, which are read as the archive reads them.
      const hash = createHash("sha256");
      await using stream = run.copy(lines(), archive.rowsOf(day));
      const source = await archive.readSource(run.source, day);
      for await (const piece of stream.lines) {
        hash.update(piece);
        progress(`${day}: ${thousands(stream.sent.rows)} of ${thousands(source.rows)} rows at the source`);
      }
      const manifest = compareDay(day, archived, { ...source, sha256: hash.digest("hex") });
      const note = `the source has none of its ${manifest.rows} rows any more: the archive is the copy`;
      if (!source.rows && manifest.rows) run.log("note", { day, note });
      return manifest;
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

/** Objects of the day that no manifest names: a killed run's, or those of a run that is under way. */
async function findStrays({ log }: Run, bucket: Bucket, day: string, clean: boolean): Promise<void> {
  const objects = await Array.fromAsync(listObjects(bucket, archive.dayPrefix(bucket, day)));
  // After the list: what it names was not stray. One that cannot be read may name any of them.
  const found = objects.length ? await archive.readManifest(bucket, day).catch(() => null) : null;
  if (found === null) return;
  const named = new Set([archive.manifestKey(bucket, day), ...(found?.manifest.parts.map(({ key }) => key) ?? [])]);
  for (const { key, modified } of objects.filter(({ key }) => !named.has(key))) {
    const age_hours = Math.floor((Date.now() - modified.getTime()) / 3_600_000);
    const removes = clean && age_hours >= 24;
    if (removes) await removeObjects(bucket, [key]);
    const next = removes ? undefined : "CLEAN=1 deletes it once it is older than a day";
    log(removes ? "removed" : "stray", { what: "a part that no manifest names", key, age_hours, next });
  }
}

/** A day's manifest, the hash of its raw lines, and what is wrong with them, if anything is. */
async function verifyParts(bucket: Bucket, day: string) {
  const archived: { manifest?: archive.Manifest; sha256?: string; damage?: string } = {};
  const reading = readDay(bucket, day, async (manifest) => {
    archived.manifest = manifest;
    const hash = createHash("sha256");
    for (const part of manifest.parts) for await (const piece of readPart(bucket, part)) hash.update(piece);
    archived.sha256 = hash.digest("hex");
    const rows = manifest.parts.reduce((sum, part) => sum + part.rows, 0);
    if (rows !== manifest.rows)
      throw archive.damaged(bucket, archive.manifestKey(bucket, day), `it says ${manifest.rows} rows; its parts have ${rows}`);
  });
  await reading.catch((error: Error) => {
    if (error.name !== "Damaged") throw error;
    archived.damage = error.message;
  });
  return archived;
}

/** @throws Error that says what is wrong with the day, with the next command. */
function compareDay(
  day: string,
  { manifest, sha256, damage }: Awaited<ReturnType<typeof verifyParts>>,
  source: Pick<archive.Manifest, "rows" | "min_id" | "max_id"> & { sha256: string },
): archive.Manifest {
  const window = `FROM=${day} TO=${archive.addDays(day)}`;
  const again = `make backfill-events ${window}`;
  const { rows } = source;
  const fail: (why: string) => never = (why) => {
    throw new Error(why);
  };
  if (!manifest) return fail(`${damage ?? `is not archived; the source has ${rows} rows of it`}. Next: ${again}`);
  const restore = `restore the object from the bucket's versions or a copy, then: make verify-events ${window}`;
  if (damage && rows < manifest.rows) fail(`${damage}. The source has only ${rows} of its ${manifest.rows} rows: ${restore}`);
  if (damage) fail(`${damage}. Next: ${again} FORCE=1`);
  if (!rows) return manifest; // the source has let the archive be the copy
  const both = `${rows} rows at the source, ${manifest.rows} in the archive`;
  if (rows > manifest.rows) fail(`${both}: rows were written later with an old created_at. Next: ${again} FORCE=1`);
  const deleted = "rows were deleted at the source. If they are to go from the archive too";
  if (rows < manifest.rows) fail(`${both}: ${deleted}: ${again} FORCE=1 ALLOW_SHRINK=1`);
  const changed = "rows were changed there. If the archive is to have that too";
  if (source.sha256 !== sha256) fail(`its ${rows} rows are not the source's: ${changed}: ${again} FORCE=1`);
  const [is, says] = [source, manifest].map(({ min_id, max_id }) => `ids ${min_id} to ${max_id}`);
  if (is !== says) fail(`its manifest says ${says}; its rows have ${is}. Next: ${again} FORCE=1`);
  return manifest;
}
