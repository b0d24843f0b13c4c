/**
 * The archive of events: a day of UTC is events/dt=YYYY-MM-DD/ with its parts and, last, manifest.json. A day is done when its
 * manifest exists; etl.chunks is progress, not truth. Readers go by manifests. A part is one object, held in memory until it is put.
 */
import { createHash, hash } from "node:crypto";
import { once } from "node:events";
import { setTimeout as delay } from "node:timers/promises";
import { createGzip } from "node:zlib";
import type { Sql } from "postgres";
import { type Env, flag, number, optional, redact } from "../env.ts";
import { progress, terminal, thousands } from "../log.ts";
import { pipelineVariables, type Run } from "../run.ts";
import { quote } from "../session.ts";
import { type Column, checkColumns, nameRefused, readSelect, type SchemaCheck, type Source } from "../source.ts";
import { duration } from "../table.ts";
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

/** Of zlib's nine: above it the compression, not Postgres, would set the pace. */
const GZIP_LEVEL = 6;

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

/** What was done of a day, by which run. */
type Done = Pick<Manifest, "run_id" | "rows" | "parts">;

/** A manifest as S3 has it. */
type Stored = { manifest: Manifest; etag: string };

/** Where a part of a day starts: after this row, in the order of created_at and id. */
type Position = Record<"created_at" | "id", string>;

/** Compressed bytes of a day's parts. */
const bytesOf = (parts: Part[]): number => parts.reduce((sum, { bytes }) => sum + bytes, 0);
export const dayPrefix = (bucket: Bucket, day: string): string => `${bucket.prefix}events/dt=${day}/`;
export const manifestKey = (bucket: Bucket, day: string): string => `${dayPrefix(bucket, day)}manifest.json`;

/** The first moment of a day. */
export const midnight = (day: string): string => `${day}T00:00:00+00`;

/** The day after, or so many days after or before. */
export function addDays(day: string, days = 1): string {
  const date = new Date(`${day}T00:00:00Z`);
  date.setUTCDate(date.getUTCDate() + days);
  return date.toISOString().slice(0, 10);
}

/** The days of [from, to), as YYYY-MM-DD. */
export function daysBetween(from: string, to: string): string[] {
  const days: string[] = [];
  for (let day = from; day < to; day = addDays(day)) days.push(day);
  return days;
}

/** What the days of a run are archived with. */
export interface Archive {
  run: Run;
  env: Env<typeof archiveVariables>;
  bucket: Bucket;
  /** The SELECT of JSON lines around sql/events.sql, or around another one of its rows. */
  lines: (select?: string) => string;
  /** Days at a time. */
  concurrency: number;
}

/** Checks the source, which must fit into etl.events_restored again, and the bucket. @throws UsageError with what to do. */
export async function openArchive(run: Run, env: Archive["env"], concurrency = 1): Promise<Archive> {
  const bucket = connectS3(env);
  const [lines] = await Promise.all([checkArchivable(run), checkBucket(bucket)]);
  return { run, env, bucket, lines, concurrency };
}

const key = ["id", "created_at"]; // by these a part starts after the last row of the one before
export const eventsSource: Source = { table: "public.events", cursor: "created_at", key, select: readSelect("events") };

/**
 * Compares the source with etl.events_restored, which archived days must fit into again.
 * @returns the SELECT of JSON lines.
 */
export async function checkArchivable(run: SchemaCheck & Pick<Run, "etl">): Promise<Archive["lines"]> {
  const restored = await run.etl<{ name: string; sql: string }[]>`
    select attname as name, format_type(atttypid, null) as sql from pg_attribute
    where attrelid = 'etl.events_restored'::regclass and attnum > 0 and not attisdropped order by attnum`;
  const wanted = restored.map(({ name, sql }) => ({ name, expected: sql, differs: (is: Column) => (is.sql === sql ? undefined : is.sql) }));
  const columns = await checkColumns(run, "sql/etl/002_events_restored.sql", eventsSource, wanted);
  return (select = eventsSource.select) => jsonLines(select, columns);
}

/**
 * The SELECT around `select` of JSON lines that Postgres reads back as they were: a column that is NULL is left out, so that
 * JSON's null stays apart from it. The id comes first and created_at last, so that both are found without reading the payload.
 */
function jsonLines(select: string, columns: Column[]): string {
  // What is JSON as it stands needs no to_json, which costs a fifth of the whole query here.
  const json = /^(int[248]|jsonb)$/;
  const place = ({ name }: Column): number => (name === "id" ? 0 : name === "created_at" ? 2 : 1);
  const ordered = columns.toSorted((a, b) => place(a) - place(b));
  const pairs = ordered.map(({ name, type, array }) => {
    const value = json.test(type) && !array ? `${quote(name)}::text` : `to_json(${quote(name)})`;
    return `'${JSON.stringify(name).replaceAll("'", "''")}:' || ${value}`;
  });
  return `select '{' || concat_ws(',', ${pairs.join(", ")}) || '}' from (${select}) source`;
}

/** @returns undefined where the day is not archived. @throws Error named Damaged where the object is not the day's manifest. */
export async function readManifest(bucket: Bucket, day: string): Promise<Stored | undefined> {
  const key = manifestKey(bucket, day);
  const object = await get(bucket, key);
  try {
    if (!object) return undefined;
    const manifest: Manifest | null = JSON.parse(object.body.toString());
    if (manifest?.day !== day || !Array.isArray(manifest.parts)) throw new Error(`its day is ${manifest?.day}, or it has no parts`);
    // Parts lie beside their manifest. In a copy of an archive it names the original's, which are not to be deleted.
    const parts = manifest.parts.map((part) => ({ ...part, key: dayPrefix(bucket, day) + part.key.replace(/^.*\//, "") }));
    return { manifest: { ...manifest, parts }, etag: object.etag };
  } catch (error) {
    const copy = "restore it from the bucket's versions or a copy, or, while the source has all rows of the day, delete it";
    const why = `is not the manifest of ${day} (${(error as Error).message}): ${copy}, then archive the day again`;
    throw Object.assign(new Error(`s3://${bucket.name}/${key} ${why}`), { name: "Damaged" });
  }
}

/** Before the first row of a day: no bigint is smaller. */
const startOf = (day: string): Position => ({ created_at: midnight(day), id: "-9223372036854775809" });

/** What the source has of a day. */
async function readSource(source: Sql, day: string): Promise<Pick<Manifest, "rows" | "min_id" | "max_id">> {
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
  let [putting, committing]: [Promise<unknown>, boolean] = [Promise.resolve(), false];
  const undo = async (): Promise<void> => {
    if (committing) return;
    // A PUT that is under way may succeed after the deletion: wait for it, but not for a silent server.
    await Promise.race([putting, delay(2000, undefined, { ref: false })]).catch(() => {});
    await removeParts(archive, day, parts);
  };
  using _stopped = run.onStop(undo);
  try {
    for (let after: Position | undefined = startOf(day); after; ) {
      const part: Compressed | undefined = await readPart(archive, day, after).catch(async (error: Error) => {
        throw await nameRow(archive, error, rowsOf(day, after, env.CHUNK_ROWS));
      });
      if (!part) break;
      run.signal.throwIfAborted();
      // A part is never overwritten: its run is in its key. Where the key exists, the answer of this PUT was lost.
      const key = `${dayPrefix(bucket, day)}part-${String(parts.length + 1).padStart(4, "0")}-${run.id}.ndjson.gz`;
      parts.push({ key, ...part.is });
      putting = put(bucket, key, part.body, undefined, { run: run.id });
      await putting;
      part.body.buffer.transfer(0); // frees it at once: the collector would keep it beside the next part's
      after = part.next;
    }
    const manifest = await countDay(archive, day, parts, before);
    run.signal.throwIfAborted();
    committing = true; // the PUT may succeed even if its answer is lost, so keep the parts from here on
    return await publish(archive, manifest, before);
  } catch (error) {
    await undo();
    throw error;
  }
}

/** Settings of sql/events.sql, which reads by created_at and id: at most so many rows of a day, from the one after `after` on. */
export const rowsOf = (day: string, after = startOf(day), rows = Number.MAX_SAFE_INTEGER) => ({
  ...{ "etl.from": after.created_at, "etl.to": midnight(addDays(day)) },
  ...{ "etl.after": after.id, "etl.rows": String(rows) },
});

/** `next`: its last row, where another part may follow. */
type Compressed = { body: Buffer<ArrayBuffer>; is: Omit<Part, "key">; next: Position | undefined };

/**
 * Reads and compresses as many rows of a day as fit into one part. Its COPY has ended then: no transaction of the source waits for S3.
 * @returns undefined where there are no rows.
 */
async function readPart(archive: Archive, day: string, after: Position): Promise<Compressed | undefined> {
  const [{ run, env, lines, concurrency }, started] = [archive, performance.now()];
  const rows = rowsOf(day, after, env.CHUNK_ROWS);
  await using stream = run.copy(lines(), rows);
  let [buffer, bytes, read] = [Buffer.alloc(0), 0, 0];
  const raw = createHash("sha256");
  const gzip = createGzip({ level: GZIP_LEVEL }).on("data", (piece: Buffer) => {
    bytes += piece.copy(buffer, bytes);
  });
  let [last, full]: [Buffer | undefined, boolean] = [undefined, false];
  for await (const piece of stream.lines) {
    run.signal.throwIfAborted();
    const fits = (): boolean => bytes + piece.length <= PART_BYTES;
    full = read > 0 && !fits();
    if (full) break; // the next part reads the piece again
    // One row may be larger than a part; gzip makes none a twentieth larger. Memory that is not written to costs nothing.
    if (!last) buffer = Buffer.allocUnsafeSlow(Math.max(PART_BYTES, piece.length) * 1.05);
    const taken = new Promise<void>((done, fail) => gzip.write(piece, (error) => (error ? fail(error) : done())));
    raw.update(piece); // while gzip works, in a thread of its own
    await taken;
    [last, read] = [piece, stream.sent.rows];
    const ahead = started + (read * concurrency * 1000) / env.MAX_ROWS_PER_SECOND - performance.now();
    if (ahead > 1) await delay(ahead, undefined, { signal: run.signal });
    full = !fits(); // the next piece is likely as large
    if (full) break;
  }
  if (!last) return undefined;
  gzip.end();
  await once(gzip, "end");
  const body = buffer.subarray(0, bytes);
  const is = { rows: read, bytes, sha256: hash("sha256", body), sha256_raw: raw.digest("hex") };
  return { body, is, next: full || read === env.CHUNK_ROWS ? position(last) : undefined };
}

/** @returns the error that names the row that the source refuses, where `error` is that. */
async function nameRow({ run, lines }: Archive, error: Error, settings: ReturnType<typeof rowsOf>): Promise<Error> {
  return await nameRefused(error, run, { key: ["id"], settings, select: eventsSource.select }, async (select) => {
    await using stream = run.copy(lines(select), settings);
    for await (const _ of stream.lines) run.signal.throwIfAborted();
  });
}

/** The last line's row. Its payload may be large: only the line's two ends are read. */
function position(lines: Buffer): Position {
  const start = lines.lastIndexOf(10, lines.length - 2) + 1;
  const [, id] = /^\{"id":(-?\d+)/.exec(lines.toString("latin1", start, start + 40)) ?? [];
  const end = lines.toString("latin1", Math.max(start, lines.length - 80));
  const [, created_at] = /"created_at":"([^"]+)"\}\n$/.exec(end) ?? [];
  if (!id || !created_at) throw new TypeError("a line without id and created_at at its ends");
  return { id, created_at };
}

/**
 * @returns the day's new manifest.
 * @throws Error where the parts and the source have different counts, for a stream that ended early would be a successful short part;
 * and where the day would end with fewer rows than it has, unless that was allowed.
 */
async function countDay({ run, env }: Archive, day: string, parts: Part[], before: Stored | undefined): Promise<Manifest> {
  const source = await readSource(run.source, day);
  const rows = parts.reduce((sum, part) => sum + part.rows, 0);
  const were = before?.manifest.rows ?? 0;
  if (rows !== source.rows)
    throw new Error(`the counts differ: ${rows} rows were read, and the source has ${source.rows}; no manifest was written`);
  if (rows < were && !env.ALLOW_SHRINK)
    throw new Error(
      `${day} has ${rows} rows at the source and ${were} in the archive, which may be the only copy of the others: it stays as it is. ` +
        `If they are to go: make backfill-events FROM=${day} TO=${addDays(day)} FORCE=1 ALLOW_SHRINK=1`,
    );
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
  const won = await put(bucket, manifestKey(bucket, day), text, before?.etag, { run: run.id });
  // An answer that was lost, and the request sent again, looks like a lost race.
  const now = won ? manifest : (await readManifest(bucket, day))?.manifest;
  const mine = now?.run_id === run.id;
  await removeParts(archive, day, mine ? (before?.manifest.parts ?? []) : parts);
  if (!now) throw new Error(`the manifest of ${day} was deleted while the day was archived again`);
  if (!mine) run.log("lost", { day, because: "another run archived it meanwhile", holder: now.run_id });
  return now;
}

/** Deletes parts that no manifest names. Where that fails they are harmless. */
async function removeParts({ run, bucket }: Archive, day: string, parts: Part[]): Promise<void> {
  const keys = parts.map(({ key }) => key);
  await removeObjects(bucket, keys).catch(({ message }: Error) => {
    const warning = `parts of ${day} were left that no manifest names; make verify-events removes them with CLEAN=1`;
    run.log("warning", { warning, error: message });
  });
}

/**
 * Does `work` for each day, so many at a time, and continues past one that fails: that is logged, added to `failed` with the reason, and
 * recorded. `started` is in seconds of the run. `work` adds what it did to the run's totals, a chunk for each day.
 */
export async function eachDay(
  run: Run,
  days: string[],
  failed: Map<string, string>,
  work: (day: string, started: number) => Promise<void>,
  concurrency = 1,
  record?: (day: string, started: number, why: string) => Promise<void>,
): Promise<void> {
  let done = 0;
  const queue = days.values();
  const worker = async (): Promise<void> => {
    for (const day of queue) {
      const started = run.seconds();
      await work(day, started).catch(async ({ message }: Error) => {
        run.signal.throwIfAborted();
        failed.set(day, message);
        run.log("day", { day, failed: message });
        await record?.(day, started, redact(message));
      });
      run.restartDeadline();
      done += 1;
      const [seconds, { rows, bytes, chunks }] = [run.seconds(), run.totals];
      const bar = "#".repeat(Math.round((done / days.length) * 20)).padEnd(20, "-");
      const speed = `${thousands(rows)} rows · ${thousands(bytes / 1e6)} MB · ${thousands(rows / seconds)} rows/s`;
      const left = chunks ? duration((seconds / chunks) * (days.length - done)) : "?";
      progress(`[${bar}] ${done}/${days.length} days · ${speed} · ${left} left`);
    }
  };
  await Promise.all(Array.from({ length: concurrency }, worker));
  progress("");
}

/** The error that lists the days that failed. */
export function daysFailed(failed: Map<string, string>, total: number, others = "", next = ""): Error {
  const list = [...failed].sort().map(([day, why]) => `  ${day}: ${why}`);
  return new Error(`${failed.size} of ${total} days failed${others}:\n${list.join("\n")}${next}`);
}

export function addTotals({ totals }: Run, { rows, parts }: Done): void {
  totals.chunks += 1;
  totals.rows += rows;
  totals.bytes += bytesOf(parts);
}

/**
 * Archives the days, and continues past one that fails.
 * @param failed days that have failed already, with the reason; those that fail are added.
 * @param archived is called with the end of each day that is done, as long as none has failed.
 * @throws Error at the end that lists the days that failed, with the command that archives them.
 */
export async function archiveDays(
  archive: Archive,
  days: string[],
  failed = new Map<string, string>(),
  archived: (end: string) => Promise<void> = async () => {},
): Promise<void> {
  const { run, concurrency, env } = archive;
  const total = days.length + failed.size;
  let skipped = 0;
  const archiveOne = async (day: string, started: number): Promise<void> => {
    const manifest = await archiveDay(archive, day);
    run.signal.throwIfAborted();
    await recordDay(run, day, started, manifest);
    const { rows, parts } = manifest;
    const seconds = Number((run.seconds() - started).toFixed(3));
    if (manifest.run_id !== run.id) skipped += 1;
    else {
      addTotals(run, manifest);
      if (!terminal()) run.log("day", { day, rows, bytes: bytesOf(parts), parts: parts.length, seconds });
    }
    if (!failed.size) await archived(midnight(addDays(day)));
  };
  const nothing = { run_id: run.id, rows: 0, parts: [] };
  await eachDay(run, days, failed, archiveOne, concurrency, (day, started, why) => recordDay(run, day, started, nothing, why));
  run.log("days", { archived: run.totals.chunks, skipped, failed: failed.size });
  if (!failed.size) return;
  const [first, ...others] = [...failed.keys()].sort();
  const again = env.FORCE ? ` FORCE=1${env.ALLOW_SHRINK ? " ALLOW_SHRINK=1" : ""}` : " (days that are done are skipped)";
  const next = `\nNext: make backfill-events FROM=${first} TO=${addDays(others.at(-1) ?? first ?? "")}${again}`;
  throw daysFailed(failed, total, failed.size < total ? "; the others are archived" : "", next);
}

/** Records in etl.chunks how a day ended. Progress, for people: whether it is done, its manifest says. */
async function recordDay(run: Run, day: string, started: number, done: Done, error: string | null = null): Promise<void> {
  const { run_id, rows, parts } = done;
  await run.etl`
    insert into etl.chunks (pipeline, chunk_from, chunk_to, state, rows, bytes, error, run_id, started_at, finished_at)
    values (${run.pipeline}, ${midnight(day)}::text::timestamptz, ${midnight(addDays(day))}::text::timestamptz,
      ${error === null ? "succeeded" : "failed"}, ${rows}, ${bytesOf(parts)}, ${error}, ${run_id},
      now() - make_interval(secs => ${run.seconds() - started}), now())
    on conflict (pipeline, chunk_from) do update
      set (state, rows, bytes, error, run_id, started_at, finished_at) =
        (excluded.state, excluded.rows, excluded.bytes, excluded.error, excluded.run_id, excluded.started_at, now())`;
}
