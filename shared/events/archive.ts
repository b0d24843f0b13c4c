/**
 * The archive of events: a day of UTC is events/dt=YYYY-MM-DD/ with its parts and, last, manifest.json. A day is done when its
 * manifest exists; etl.chunks is progress, not truth. Readers go by manifests. A part is one object, held in memory until it is put.
 */
import { createHash, hash } from "node:crypto";
import { basename } from "node:path";
import { pipeline } from "node:stream/promises";
import { setTimeout as delay } from "node:timers/promises";
import { createGzip } from "node:zlib";
import type { Sql } from "postgres";
import { type Env, flag, number, optional, redact } from "../env.ts";
import { progress, thousands } from "../log.ts";
import { pipelineVariables, type Run } from "../run.ts";
import { quote, type Settings } from "../session.ts";
import { type Column, checkColumns, nameRefused, readSelect, type SchemaCheck, type Source } from "../source.ts";
import { type Bucket, bucketVariables, checkBucket, connectS3, get, put, removeObjects } from "./s3.ts";

export const archiveVariables = {
  ...pipelineVariables,
  ...bucketVariables,
  FORCE: optional(flag, false),
  ALLOW_SHRINK: optional(flag, false),
  MAX_ROWS_PER_SECOND: optional(number(1, 1_000_000_000), Number.POSITIVE_INFINITY),
};

/** A part ends before it would be larger, compressed, unless it is a single row. */
const PART_BYTES = 32 * 2 ** 20;

export interface Part {
  key: string;
  rows: number;
  /** Of the compressed object. */
  bytes: number;
  /** Of the compressed and of the raw bytes, in hexadecimal. */
  sha256: string;
  sha256_raw: string;
}

export interface Manifest {
  /** YYYY-MM-DD, of UTC. */
  day: string;
  rows: number;
  /** As text, since they may be beyond 2^53; null on an empty day. */
  min_id: string | null;
  max_id: string | null;
  run_id: string;
  created_at: string;
  parts: Part[];
}

type Stored = { manifest: Manifest; etag: string }; // as S3 has it

/** Compressed bytes of a day's parts. */
const bytesOf = (parts: Part[]): number => parts.reduce((sum, { bytes }) => sum + bytes, 0);
export const dayPrefix = (bucket: Bucket, day: string): string => `${bucket.prefix}events/dt=${day}/`;
export const manifestKey = (bucket: Bucket, day: string): string => `${dayPrefix(bucket, day)}manifest.json`;

/** The first moment of a day. */
export const midnight = (day: string): string => `${day}T00:00:00+00`;

/** The day after, or so many days after or before. */
export const addDays = (day: string, days = 1): string => new Date(Date.parse(day) + days * 86_400_000).toISOString().slice(0, 10);

/** The days of [from, to), as YYYY-MM-DD. */
export const daysBetween = (from: string, to: string): string[] =>
  Array.from({ length: (Date.parse(to) - Date.parse(from)) / 86_400_000 }, (_, index) => addDays(from, index));

export type Archive = Awaited<ReturnType<typeof openArchive>>;

/**
 * Checks the source, which must fit into etl.events_restored again, and the bucket. @throws UsageError with what to do.
 * @returns what the days of a run are archived with.
 */
export async function openArchive(run: Run, env: Env<typeof archiveVariables> & { CONCURRENCY?: number }) {
  const bucket = connectS3(env);
  const [lines] = await Promise.all([checkArchivable(run), checkBucket(bucket)]);
  return { run, env, bucket, lines };
}

const key = ["id", "created_at"]; // by these a part starts after the last row of the one before
export const eventsSource: Source = { table: "public.events", cursor: "created_at", key, select: readSelect("events") };

/**
 * Compares the source with etl.events_restored, which archived days must fit into again.
 * @returns the SELECT of JSON lines that Postgres reads back as they were: a column that is NULL is left out, so that JSON's null stays
 * apart from it. The id comes first and created_at last, so that both are found without reading the payload.
 */
export async function checkArchivable(run: SchemaCheck & Pick<Run, "etl">) {
  const restored = await run.etl<{ name: string; sql: string }[]>`
    select attname as name, format_type(atttypid, null) as sql from pg_attribute
    where attrelid = 'etl.events_restored'::regclass and attnum > 0 and not attisdropped order by attnum`;
  const wanted = restored.map(({ name, sql }) => ({ name, expected: sql, differs: (is: Column) => (is.sql === sql ? undefined : is.sql) }));
  const columns = await checkColumns(run, "sql/etl/002_events_restored.sql", eventsSource, wanted);
  const place = ({ name }: Column): number => (name === "id" ? 0 : name === "created_at" ? 2 : 1);
  const ordered = columns.toSorted((a, b) => place(a) - place(b));
  const pairs = ordered.map(({ name, type, array }) => {
    // What is JSON as it stands needs no to_json, which costs a fifth of the whole query here.
    const value = /^(int[248]|jsonb)$/.test(type) && !array ? `${quote(name)}::text` : `to_json(${quote(name)})`;
    return `'${JSON.stringify(name).replaceAll("'", "''")}:' || ${value}`;
  });
  return (select = eventsSource.select) => `select '{' || concat_ws(',', ${pairs.join(", ")}) || '}' from (${select}) source`;
}

/** Names the object that is not what it should be. */
export const damaged = ({ name }: Bucket, key: string, how: string): Error =>
  Object.assign(new Error(`s3://${name}/${key}: ${how}`), { name: "Damaged" });

/** @returns undefined where the day is not archived. @throws Error named Damaged where the object is not the day's manifest. */
export async function readManifest(bucket: Bucket, day: string): Promise<Stored | undefined> {
  const key = manifestKey(bucket, day);
  const object = await get(bucket, key);
  if (!object) return undefined;
  try {
    const manifest: Manifest = JSON.parse(object.body.toString());
    if (manifest.day !== day) throw new Error(`its day is ${manifest.day}`);
    // Parts lie beside their manifest. In a copy of an archive it names the original's, which are not to be deleted.
    for (const part of manifest.parts) part.key = dayPrefix(bucket, day) + basename(part.key);
    return { manifest, etag: object.etag };
  } catch (error) {
    const next =
      "restore it from the bucket's versions or a copy; or, if the source has all rows of the day, delete it and archive it again";
    throw damaged(bucket, key, `it is not the manifest of ${day} (${(error as Error).message}): ${next}`);
  }
}

/** What the source has of a day. */
async function readSource(source: Sql, day: string) {
  const [row] = await source<[Pick<Manifest, "rows" | "min_id" | "max_id">]>`
    select count(*)::float8 as rows, min(id)::text as min_id, max(id)::text as max_id from public.events
    where created_at >= ${midnight(day)}::text::timestamptz and created_at < ${midnight(addDays(day))}::text::timestamptz`;
  return row;
}

/** Archives one day, unless that is done: extracts and puts its parts, counts, puts the manifest. @returns the day's manifest. */
async function archiveDay(archive: Archive, day: string): Promise<Manifest> {
  const { run, env, bucket } = archive;
  const before = await readManifest(bucket, day);
  if (before && !env.FORCE) return before.manifest;
  const parts: Part[] = [];
  let manifest: Manifest;
  try {
    for (let rows: Settings | undefined = rowsOf(day, env.CHUNK_ROWS); rows; ) {
      // A part is never overwritten: its run is in its key. Where the key exists, the answer of this PUT was lost.
      const key = `${dayPrefix(bucket, day)}part-${String(parts.length + 1).padStart(4, "0")}-${run.id}.ndjson.gz`;
      const read: Compressed | undefined = await readPart(archive, key, rows);
      if (!read) break;
      parts.push(read.part);
      await put(bucket, key, read.body, run.id);
      run.signal.throwIfAborted();
      rows = read.next;
    }
    manifest = await countDay(archive, day, parts, before);
    run.signal.throwIfAborted();
  } catch (error) {
    await removeParts(archive, parts);
    throw error;
  }
  return await publish(archive, manifest, before);
}

/** Settings of sql/events.sql: the first rows of a day, in the order of created_at and id. No bigint is smaller than this etl.after. */
export const rowsOf = (day: string, rows = Number.MAX_SAFE_INTEGER): Settings => ({
  ...{ "etl.from": midnight(day), "etl.to": midnight(addDays(day)) },
  ...{ "etl.after": "-9223372036854775809", "etl.rows": String(rows) },
});

/** `next`: the rows of another part, if there may be one. */
type Compressed = { part: Part; body: Buffer; next: Settings | undefined };

/**
 * Reads and compresses as many of the rows as fit into one part. Its COPY has ended then: no transaction of the source waits for S3.
 * @returns undefined where there are no rows.
 */
async function readPart({ run, env, lines }: Archive, key: string, settings: Settings): Promise<Compressed | undefined> {
  const started = performance.now();
  await using stream = run.copy(lines(), settings);
  const [raw, pieces] = [createHash("sha256"), [] as Buffer[]];
  let [last, rows, bytes]: [Buffer | undefined, number, number] = [undefined, 0, 0];
  const fitting = async function* () {
    for await (const piece of stream.lines) {
      if (last && bytes + piece.length > PART_BYTES) return; // the next part reads the piece again
      raw.update(piece);
      [last, rows] = [piece, stream.sent.rows];
      yield piece;
      const ahead = started + (rows * (env.CONCURRENCY ?? 1) * 1000) / env.MAX_ROWS_PER_SECOND - performance.now();
      if (ahead > 1) await delay(ahead, undefined, { signal: run.signal });
    }
  };
  const gather = async (compressed: AsyncIterable<Buffer>): Promise<void> => {
    for await (const piece of compressed) {
      pieces.push(piece);
      bytes += piece.length;
    }
  };
  // At a higher level than 6 the compression, not Postgres, would set the pace.
  await pipeline(fitting, createGzip({ level: 6 }), gather).catch(async (error: Error) => {
    throw await nameRefused(error, run, eventsSource, settings, async (select) => {
      await using again = run.copy(lines(select), settings);
      for await (const _ of again.lines);
    });
  });
  if (!last) return undefined;
  const body = Buffer.concat(pieces);
  const part = { key, rows, bytes, sha256: hash("sha256", body), sha256_raw: raw.digest("hex") };
  const next = { ...settings, ...position(last) };
  return { part, body, next: stream.sent.rows > rows || rows === env.CHUNK_ROWS ? next : undefined };
}

/** Settings of the rows after the last line's. Its payload may be large: only the line's two ends are read. */
function position(lines: Buffer): Settings {
  const start = lines.lastIndexOf(10, lines.length - 2) + 1;
  const ends = lines.toString("latin1", start, start + 40) + lines.toString("latin1", Math.max(start, lines.length - 80));
  const [, id, created_at] = /^\{"id":(-?\d+).*"created_at":"([^"]+)"\}\n$/s.exec(ends) ?? [];
  if (!id || !created_at) throw new TypeError("a line without id and created_at at its ends");
  return { "etl.from": created_at, "etl.after": id };
}

/**
 * @returns the day's new manifest.
 * @throws Error where the source has another number of rows, for a stream that ended early would be a successful short part; and where the
 * day would end with fewer rows than it has, unless that was allowed.
 */
async function countDay({ run, env }: Archive, day: string, parts: Part[], before: Stored | undefined): Promise<Manifest> {
  const source = await readSource(run.source, day);
  const rows = parts.reduce((sum, part) => sum + part.rows, 0);
  const were = before?.manifest.rows ?? 0;
  if (rows !== source.rows)
    throw new Error(`the counts differ: ${rows} rows were read, and the source has ${source.rows}; no manifest was written`);
  const both = `${day} has ${rows} rows at the source and ${were} in the archive`;
  const why = "which may be the only copy of the others: it stays as it is";
  const allowed = `make backfill-events FROM=${day} TO=${addDays(day)} FORCE=1 ALLOW_SHRINK=1`;
  if (rows < were && !env.ALLOW_SHRINK) throw new Error(`${both}, ${why}. If they are to go: ${allowed}`);
  return { day, ...source, run_id: run.id, created_at: new Date().toISOString(), parts };
}

/**
 * The commit: puts the manifest, if the one that it replaces is still the one that was read, or still none exists. The winner of a race
 * then deletes the parts of the manifest that it replaced; the loser its own.
 * @returns the day's manifest from now on.
 */
async function publish(archive: Archive, manifest: Manifest, before: Stored | undefined): Promise<Manifest> {
  const { run, bucket } = archive;
  const { day, parts } = manifest;
  const text = `${JSON.stringify(manifest, null, 2)}\n`;
  const won = await put(bucket, manifestKey(bucket, day), text, run.id, before?.etag);
  // An answer that was lost, and the request sent again, looks like a lost race.
  const now = won ? manifest : (await readManifest(bucket, day))?.manifest;
  const mine = now?.run_id === run.id;
  await removeParts(archive, mine ? (before?.manifest.parts ?? []) : parts);
  if (!now) throw new Error(`the manifest of ${day} was deleted while the day was archived again`);
  if (!mine) run.log("lost", { day, because: "another run archived it meanwhile", holder: now.run_id });
  return now;
}

/** Deletes parts that no manifest names. Where that fails they are harmless. */
async function removeParts({ run, bucket }: Archive, parts: Part[]): Promise<void> {
  const keys = parts.map(({ key }) => key);
  const warning = "parts were left that no manifest names; make verify-events removes them with CLEAN=1";
  await removeObjects(bucket, keys).catch(({ message: error }: Error) => run.log("warning", { warning, error }));
}

type Failed = Map<string, string>; // day → reason

/**
 * Does `work` for each day, so many at a time, and continues past one that fails: that is logged, and added to `failed`.
 * The manifest that `work` returns is added to the run's totals, a chunk for each day.
 */
export async function eachDay(run: Run, days: string[], failed: Failed, work: (day: string) => Promise<Manifest | undefined>, atOnce = 1) {
  const [queue, { totals }] = [days.values(), run];
  let done = 0;
  const worker = async (): Promise<void> => {
    for (const day of queue) {
      const manifest = await work(day).catch(({ message }: Error) => {
        run.signal.throwIfAborted();
        failed.set(day, message);
        run.log("day", { day, failed: message });
      });
      if (manifest) {
        totals.chunks += 1;
        totals.rows += manifest.rows;
        totals.bytes += bytesOf(manifest.parts);
      }
      run.restartDeadline();
      done += 1;
      const bar = "#".repeat(Math.round((done / days.length) * 20)).padEnd(20, "-");
      const [speed, left] = [totals.rows / run.seconds(), (run.seconds() / done) * (days.length - done)];
      progress(`[${bar}] ${done}/${days.length} days · ${thousands(speed)} rows/s · ${Math.ceil(left / 60)} min left`);
    }
  };
  await Promise.all(Array.from({ length: atOnce }, worker));
  progress("");
}

/** The error that lists the days that failed. */
export function daysFailed(failed: Failed, total: number, next = ""): Error {
  const list = [...failed].sort().map(([day, why]) => `  ${day}: ${why}`);
  return new Error(`${failed.size} of ${total} days failed:\n${list.join("\n")}${next}`);
}

/**
 * Archives the days, and continues past one that fails.
 * @param failed days that have failed already; those that fail are added.
 * @param archived is called with the end of each day that is done, as long as none has failed.
 * @throws Error at the end that lists the days that failed, with the command that archives them.
 */
export async function archiveDays(archive: Archive, days: string[], failed: Failed, archived = async (_end: string): Promise<void> => {}) {
  const { run, env } = archive;
  const total = days.length + failed.size;
  const archiveOne = async (day: string): Promise<Manifest | undefined> => {
    const started = new Date();
    const manifest = await archiveDay(archive, day).catch(async (error: Error) => {
      await recordDay(run, day, started, {}, redact(error.message));
      throw error;
    });
    run.signal.throwIfAborted();
    await recordDay(run, day, started, manifest);
    if (!failed.size) await archived(midnight(addDays(day)));
    if (manifest.run_id !== run.id) return undefined;
    const { rows, parts } = manifest;
    run.log("day", { day, rows, bytes: bytesOf(parts), parts: parts.length, seconds: (Date.now() - Number(started)) / 1000 });
    return manifest;
  };
  await eachDay(run, days, failed, archiveOne, env.CONCURRENCY);
  const { chunks } = run.totals;
  run.log("days", { archived: chunks, skipped: total - failed.size - chunks, failed: failed.size });
  if (!failed.size) return;
  const [first, ...others] = [...failed.keys()].sort();
  const again = env.FORCE ? ` FORCE=1${env.ALLOW_SHRINK ? " ALLOW_SHRINK=1" : ""}` : " (days that are done are skipped)";
  const next = `\nNext: make backfill-events FROM=${first} TO=${addDays(others.at(-1) ?? first ?? "")}${again}`;
  throw daysFailed(failed, total, next);
}

/** Records in etl.chunks how a day ended. Progress, for people: whether it is done, its manifest says. */
async function recordDay(run: Run, day: string, started_at: Date, done: Partial<Manifest>, error: string | null = null): Promise<void> {
  const { rows = 0, run_id = run.id, parts = [] } = done;
  const [chunk_from, chunk_to] = [day, addDays(day)].map((midnight) => `${midnight}T00:00Z`);
  const how = { state: error === null ? "succeeded" : "failed", rows, bytes: bytesOf(parts), error, run_id };
  const row = { pipeline: run.pipeline, chunk_from, chunk_to, ...how, started_at, finished_at: new Date() };
  await run.etl`insert into etl.chunks ${run.etl(row)} on conflict (pipeline, chunk_from) do update set ${run.etl(row)}`;
}
