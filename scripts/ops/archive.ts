/**
 * archive: reads the archive of events back.
 *
 *   make verify-events FROM=2017-01-01 TO=2018-01-01     decompresses, counts and hashes every part of the days of [FROM, TO), and
 *                                                        compares them with the manifests and with the source; says what mends a
 *                                                        day that differs (exit 1), and lists what killed runs left
 *     CLEAN=1                                            deletes of that what is older than a day
 *   make restore-events FROM=2017-01-01 TO=2018-01-01    puts the days' rows into etl.events_restored
 *
 *   safe to re-run   yes: verify changes nothing; restore replaces a day's rows in one transaction
 */
import { createHash } from "node:crypto";
import { Readable } from "node:stream";
import { finished, pipeline } from "node:stream/promises";
import { createGunzip } from "node:zlib";
import type { Sql } from "postgres";
import { flag, optional, readEnv } from "../../shared/env.ts";
import {
  addDays,
  bytesOf,
  dayPrefix,
  type Manifest,
  manifestKey,
  type Part,
  readDays,
  readManifest,
  readSource,
} from "../../shared/events/archive.ts";
import {
  type Bucket,
  bucketVariables,
  checkBucket,
  connectS3,
  getStream,
  listObjects,
  listUploads,
  removeObjects,
} from "../../shared/events/s3.ts";
import { log, progress, thousands } from "../../shared/log.ts";
import { main } from "../../shared/main.ts";
import { newRunId, pipelineVariables } from "../../shared/run.ts";
import { checkSession, connect } from "../../shared/session.ts";
import { duration } from "../../shared/table.ts";

const A_DAY = 86_400_000;

await main(import.meta, async () => {
  const env = readEnv({
    ...pipelineVariables,
    ...bucketVariables,
    CLEAN: optional(flag, false),
    RESTORE: optional(flag, false),
  });
  const command = env.RESTORE ? "restore-events" : "verify-events";
  const days = readDays(env, command);
  const run = newRunId();
  const bucket = connectS3(env);
  await checkBucket(bucket);
  const url = env.RESTORE ? "ETL_DATABASE_URL" : "SOURCE_DATABASE_URL";
  const session = { application: `etl:${command} run=${run}`, timeoutSeconds: env.RUN_TIMEOUT_SECONDS };
  const sql = connect(env[url], session);
  await checkSession(url, sql);
  const started = performance.now();
  const say = (step: string, fields = {}): void => log({ step, run, ...fields });
  const totals = { days: 0, rows: 0, bytes: 0 };
  const faults: string[] = [];
  for (const day of days) {
    const checked = env.RESTORE ? await restoreDay(bucket, sql, day) : await verifyDay(bucket, sql, day);
    if (checked.fault) faults.push(`  ${day}: ${checked.fault}`);
    if (checked.note) say("note", { day, note: checked.note });
    totals.days += 1;
    totals.rows += checked.rows;
    totals.bytes += checked.bytes;
    progress(`${command}: ${day}, ${totals.days}/${days.length} days, ${thousands(totals.rows)} rows`);
  }
  progress("");
  if (!env.RESTORE) await findStrays(bucket, days, env.CLEAN, say);
  await sql.end();
  const seconds = ((performance.now() - started) / 1000).toFixed(3);
  say(faults.length ? "failed" : "done", { ...totals, differ: faults.length, seconds });
  if (faults.length) throw new Error(`${faults.length} of ${days.length} days differ:\n${faults.join("\n")}`);
});

interface Checked {
  rows: number;
  bytes: number;
  fault?: string;
  /** Worth knowing, and nothing to mend. */
  note?: string;
}

/** Reads a day by its manifest, which may be replaced meanwhile, and its parts deleted then: the new one is read. */
async function readDay<T>(
  bucket: Bucket,
  day: string,
  read: (manifest: Manifest) => Promise<T>,
): Promise<T | undefined> {
  for (let etag = ""; ; ) {
    const found = await readManifest(bucket, day);
    if (!found) return undefined;
    try {
      return await read(found.manifest);
    } catch (error) {
      if ((error as Error).name !== "NoSuchKey" || found.etag === etag) throw error;
      etag = found.etag;
    }
  }
}

/** What a part holds; `use` gets its raw lines. @throws Error named NoSuchKey where it is not there. */
async function readPart(
  bucket: Bucket,
  part: Part,
  use: (lines: AsyncIterable<Buffer>) => Promise<void>,
): Promise<Omit<Part, "key">> {
  const [raw, packed] = [createHash("sha256"), createHash("sha256")];
  let [rows, bytes] = [0, 0];
  async function* count(pieces: AsyncIterable<Buffer>): AsyncGenerator<Buffer> {
    for await (const piece of pieces) {
      packed.update(piece);
      bytes += piece.length;
      yield piece;
    }
  }
  async function* lines(pieces: AsyncIterable<Buffer>): AsyncGenerator<Buffer> {
    for await (const piece of pieces) {
      raw.update(piece);
      for (let at = piece.indexOf(10); at >= 0; at = piece.indexOf(10, at + 1)) rows += 1;
      yield piece;
    }
  }
  await pipeline(await getStream(bucket, part.key), count, createGunzip(), lines, use);
  return { rows, bytes, sha256: packed.digest("hex"), sha256_raw: raw.digest("hex") };
}

/** In what a part differs from its entry in the manifest. */
function partFault(part: Part, is: Omit<Part, "key">): string | undefined {
  const differs = (["rows", "bytes", "sha256", "sha256_raw"] as const).find((field) => is[field] !== part[field]);
  return differs && `${part.key}: expected ${differs} ${part[differs]} (its manifest), found ${is[differs]}`;
}

async function verifyDay(bucket: Bucket, source: Sql, day: string): Promise<Checked> {
  const again = `make backfill-events FROM=${day} TO=${addDays(day)}`;
  const there = await readSource(source, day);
  let manifest: Manifest | undefined;
  const damage = await readDay(bucket, day, async (found) => {
    manifest = found;
    let [rows, min, max]: [number, bigint | undefined, bigint | undefined] = [0, undefined, undefined];
    for (const part of found.parts) {
      const is = await readPart(bucket, part, async (lines) => {
        for await (const id of ids(lines)) {
          if (min === undefined || id < min) min = id;
          if (max === undefined || id > max) max = id;
        }
      }).catch(damaged);
      const differs = typeof is === "string" ? `${part.key}: ${is}` : partFault(part, is);
      if (differs) return differs;
      rows += part.rows;
    }
    const range = `${rows} rows, ids ${min ?? null} to ${max ?? null}`;
    const said = `${found.rows} rows, ids ${found.min_id} to ${found.max_id}`;
    return range === said ? undefined : `${manifestKey(bucket, day)}: it says ${said}; its parts have ${range}`;
  }).catch((error: Error) => {
    if (error.name === "NoSuchKey" || error.name === "NoManifest") return error.message;
    throw error;
  });
  const checked = { rows: manifest?.rows ?? 0, bytes: manifest ? bytesOf(manifest) : 0 };
  const failed = (fault: string): Checked => ({ ...checked, fault });
  if (!manifest)
    return failed(`${damage ?? `is not archived; the source has ${there.rows} rows of it`}. Next: ${again}`);
  if (damage && there.rows >= manifest.rows) return failed(`${damage}. Next: ${again} FORCE=1`);
  if (damage)
    return failed(
      `${damage}. The source has only ${there.rows} of its ${manifest.rows} rows: bring the object back from the bucket's versions or a copy`,
    );
  if (there.rows === manifest.rows && there.min_id === manifest.min_id && there.max_id === manifest.max_id)
    return checked;
  if (there.rows === 0)
    return { ...checked, note: `the source has none of its ${manifest.rows} rows any more: the archive is the copy` };
  const both = `${there.rows} rows at the source (ids ${there.min_id} to ${there.max_id}), ${manifest.rows} in the archive (ids ${manifest.min_id} to ${manifest.max_id})`;
  if (there.rows > manifest.rows)
    return failed(`${both}: rows were written later with an old created_at. Next: ${again} FORCE=1`);
  return failed(
    `${both}: rows were deleted or changed at the source. If they are to go from the archive too: ${again} FORCE=1 ALLOW_SHRINK=1`,
  );
}

/** A part that is no whole gzip file, in words. */
function damaged(error: Error & { code?: string }): string {
  if (error.code?.startsWith("Z_")) return `it does not decompress (${error.message})`;
  throw error;
}

/** The ids of JSON lines, each of which starts with its id. */
async function* ids(pieces: AsyncIterable<Buffer>): AsyncGenerator<bigint> {
  let rest: Buffer = Buffer.alloc(0);
  for await (const piece of pieces) {
    const all = rest.length ? Buffer.concat([rest, piece]) : piece;
    let start = 0;
    for (let end = all.indexOf(10); end >= 0; end = all.indexOf(10, start)) {
      const id = /^\{"id":(-?\d+)/.exec(all.toString("latin1", start, Math.min(end, start + 40)))?.[1];
      if (id !== undefined) yield BigInt(id);
      start = end + 1;
    }
    rest = all.subarray(start);
  }
}

/** Replaces the day's rows in etl.events_restored, in one transaction, once what was read is what the manifest says. */
async function restoreDay(bucket: Bucket, etl: Sql, day: string): Promise<Checked> {
  const nothing = `Nothing of ${day} was restored. Next: make verify-events FROM=${day} TO=${addDays(day)}`;
  const restored = await readDay(bucket, day, async (manifest) => {
    await etl.begin(async (sql) => {
      await sql`lock table etl.events_restored in share row exclusive mode`; // another restore waits
      await sql`create temp table lines (line text) on commit drop`;
      for (const part of manifest.parts) {
        const copy = await sql`copy lines from stdin (format csv, quote e'\\x01', delimiter e'\\x02')`.writable();
        const is = await readPart(bucket, part, (lines) => pipeline(Readable.from(lines), copy)).catch(
          async (error) => {
            copy.destroy(error); // the transaction cannot be rolled back while the COPY waits for lines
            await finished(copy).catch(() => {});
            return damaged(error);
          },
        );
        await finished(copy).catch(() => {});
        const fault = typeof is === "string" ? `${part.key}: ${is}` : partFault(part, is);
        if (fault) throw new Error(`${fault}. ${nothing}`);
      }
      const [from, to] = [`${day}T00:00:00Z`, `${addDays(day)}T00:00:00Z`];
      await sql`delete from etl.events_restored where created_at >= ${from}::text::timestamptz and created_at < ${to}::text::timestamptz`;
      const columns = await sql<{ name: string; type: string }[]>`
        select quote_ident(attname) as name, format_type(atttypid, null) as type from pg_attribute
        where attrelid = 'etl.events_restored'::regclass and attnum > 0 and not attisdropped order by attnum`;
      // jsonb_populate_record takes JSON's null for NULL.
      const values = columns.map(({ name, type }) => (type === "jsonb" ? `line -> '${name}'` : `r.${name}`));
      await sql.unsafe(
        `insert into etl.events_restored (${columns.map(({ name }) => name)}) select ${values}
         from (select line::jsonb as line from lines) l, jsonb_populate_record(null::etl.events_restored, line) r`,
      );
    });
    return manifest;
  }).catch((error: Error) => {
    throw error.name === "NoSuchKey" ? new Error(`${error.message}. ${nothing}`) : error;
  });
  if (!restored)
    return { rows: 0, bytes: 0, fault: `is not archived. Next: make backfill-events FROM=${day} TO=${addDays(day)}` };
  return { rows: restored.rows, bytes: bytesOf(restored) };
}

/** Objects and uploads of the days that no manifest names: a killed run's, or of one that is going. */
async function findStrays(
  bucket: Bucket,
  days: string[],
  clean: boolean,
  say: (step: string, fields: object) => void,
): Promise<void> {
  const removed = "CLEAN=1 deletes it once it is older than a day";
  const report = async (what: string, key: string, modified: Date, remove: () => Promise<unknown>): Promise<void> => {
    const age = Date.now() - modified.getTime();
    const gone = clean && age > A_DAY;
    if (gone) await remove();
    say(gone ? "removed" : "stray", { what, key, age: duration(age / 1000), ...(!gone && { next: removed }) });
  };
  for (const day of days) {
    const objects = await Array.fromAsync(listObjects(bucket, dayPrefix(bucket, day)));
    if (!objects.length) continue;
    // After the list: what it names was not stray. One that cannot be read may name any of them.
    const found = await readManifest(bucket, day).catch(() => null);
    if (found === null) continue;
    const manifest = found?.manifest;
    const named = new Set([manifestKey(bucket, day), ...(manifest?.parts.map(({ key }) => key) ?? [])]);
    for (const { key, modified } of objects)
      if (!named.has(key))
        await report("a part that no manifest names", key, modified, () => removeObjects(bucket, [key]));
  }
  for await (const { key, modified, abort } of listUploads(bucket, `${bucket.prefix}events/`)) {
    if (days.some((day) => key.startsWith(dayPrefix(bucket, day))))
      await report("an upload that never ended", key, modified, abort);
  }
}
