#!/usr/bin/env -S npx tsx
/**
 * verify-events: reads the archive of events back.
 *
 *   make verify-events FROM=2017-01-01 TO=2018-01-01     decompresses, counts and hashes every part of the days of [FROM, TO), and
 *                                                        compares them with the manifests and with the source; names the command
 *                                                        for a day that differs (exit 1), and lists what killed runs left
 *     CLEAN=1                                            deletes of that what is older than a day
 *
 *   safe to re-run   yes: it changes nothing that a manifest names
 */
import { flag, optional, readEnv } from "../../shared/env.ts";
import {
  addDays,
  dayPrefix,
  type Manifest,
  manifestKey,
  readManifest,
  readSource,
} from "../../shared/events/archive.ts";
import { listObjects, listUploads, removeObjects } from "../../shared/events/s3.ts";
import { main } from "../../shared/main.ts";
import { duration } from "../../shared/table.ts";
import { type Day, damaged, dayVariables, eachDay, readDay, readPart } from "./lib/events.ts";

const DAY_SECONDS = 86_400;

await main(import.meta, async () => {
  const env = readEnv({ ...dayVariables, CLEAN: optional(flag, false) });
  await eachDay("verify-events", "SOURCE_DATABASE_URL", env, async (day) => {
    const verified = await verifyDay(day);
    await findStrays(day, env.CLEAN);
    return verified;
  });
});

async function verifyDay(of: Day): Promise<{ manifest: Manifest | undefined; fault: string | undefined }> {
  const { day, sql, say } = of;
  const source = await readSource(sql, day);
  let manifest: Manifest | undefined;
  const damage = await readDay(of, async (found) => {
    manifest = found;
    await verifyParts(of, found);
  }).then(
    () => undefined,
    (error: Error) => {
      if (!["NoSuchKey", "NoManifest", "Damaged"].includes(error.name)) throw error;
      return error.message;
    },
  );
  const again = `make backfill-events FROM=${day} TO=${addDays(day)}`;
  const failed = (fault: string) => ({ manifest, fault });
  if (!manifest)
    return failed(`${damage ?? `is not archived; the source has ${source.rows} rows of it`}. Next: ${again}`);
  if (damage && source.rows >= manifest.rows) return failed(`${damage}. Next: ${again} FORCE=1`);
  if (damage)
    return failed(
      `${damage}. The source has only ${source.rows} of its ${manifest.rows} rows: bring the object back from the ` +
        `bucket's versions or a copy`,
    );
  const both = `${source.rows} rows at the source (ids ${range(source)}), ${manifest.rows} in the archive (ids ${range(manifest)})`;
  if (source.rows > manifest.rows)
    return failed(`${both}: rows were written later with an old created_at. Next: ${again} FORCE=1`);
  if (source.rows === 0 && manifest.rows > 0)
    say("note", { day, note: `the source has none of its ${manifest.rows} rows any more: the archive is the copy` });
  else if (source.rows < manifest.rows || range(source) !== range(manifest))
    return failed(
      `${both}: rows were deleted or changed at the source. If they are to go from the archive too: ${again} FORCE=1 ALLOW_SHRINK=1`,
    );
  return { manifest, fault: undefined };
}

function range({ min_id, max_id }: Pick<Manifest, "min_id" | "max_id">): string {
  return `${min_id} to ${max_id}`;
}

/** @throws Error where a part, or all of them, are not what the manifest says. */
async function verifyParts({ bucket, day }: Day, manifest: Manifest): Promise<void> {
  let [rows, min, max]: [number, bigint | undefined, bigint | undefined] = [0, undefined, undefined];
  for (const part of manifest.parts) {
    await readPart(bucket, part, async (lines) => {
      for await (const id of ids(lines)) {
        if (min === undefined || id < min) min = id;
        if (max === undefined || id > max) max = id;
      }
    });
    rows += part.rows;
  }
  const found = `${rows} rows, ids ${min ?? null} to ${max ?? null}`;
  const said = `${manifest.rows} rows, ids ${range(manifest)}`;
  if (found !== said) throw damaged(manifestKey(bucket, day), `it says ${said}; its parts have ${found}`);
}

/** The ids of JSON lines, each of which starts with its id. */
async function* ids(pieces: AsyncIterable<Buffer>): AsyncGenerator<bigint> {
  let head = "";
  for await (const piece of pieces) {
    for (let start = 0; start < piece.length; ) {
      const newline = piece.indexOf(10, start);
      const end = newline < 0 ? piece.length : newline;
      if (head.length < 40) head += piece.toString("latin1", start, Math.min(end, start + 40));
      start = end + 1;
      if (newline < 0) continue; // the line ends in a later piece
      const id = /^\{"id":(-?\d+)/.exec(head)?.[1];
      if (id !== undefined) yield BigInt(id);
      head = "";
    }
  }
}

/** Objects and uploads of the day that no manifest names: a killed run's, or of one that is going. */
async function findStrays({ day, bucket, say }: Day, clean: boolean): Promise<void> {
  const report = async (what: string, key: string, modified: Date, remove: () => Promise<unknown>): Promise<void> => {
    const seconds = (Date.now() - modified.getTime()) / 1000;
    const [gone, age] = [clean && seconds > DAY_SECONDS, duration(seconds)];
    if (gone) await remove();
    say(gone ? "removed" : "stray", {
      ...{ what, key, age },
      next: gone ? undefined : "CLEAN=1 deletes it once it is older than a day",
    });
  };
  const objects = await Array.fromAsync(listObjects(bucket, dayPrefix(bucket, day)));
  // After the list: what it names was not stray. One that cannot be read may name any of them.
  const found = objects.length ? await readManifest(bucket, day).catch(() => null) : null;
  const named = new Set([manifestKey(bucket, day), ...(found?.manifest.parts.map(({ key }) => key) ?? [])]);
  for (const { key, modified } of found === null ? [] : objects)
    if (!named.has(key))
      await report("a part that no manifest names", key, modified, () => removeObjects(bucket, [key]));
  for await (const { key, modified, abort } of listUploads(bucket, dayPrefix(bucket, day)))
    await report("an upload that never ended", key, modified, abort); // of a version that uploaded in pieces
}
