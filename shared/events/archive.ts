/**
 * The archive of events: a day of UTC is events/dt=YYYY-MM-DD/ with its parts and, last, manifest.json. A day is done when its
 * manifest exists; etl.chunks is progress, not truth. Readers go by manifests. A part is one object, held in memory until it is put.
 */
import { createHash } from "node:crypto";
import { once } from "node:events";
import { setTimeout as delay } from "node:timers/promises";
import { createGzip } from "node:zlib";
import type { Sql } from "postgres";
import { copyJsonLines } from "../copy.ts";
import { type Env, flag, number, optional, redact } from "../env.ts";
import { progress, terminal, thousands } from "../log.ts";
import { pipelineVariables, type Run, withRetry } from "../run.ts";
import { quote } from "../session.ts";
import { type Column, checkColumns, type SchemaCheck, type Source } from "../source.ts";
import { duration } from "../table.ts";
import {
  type Bucket,
  bucketVariables,
  checkBucket,
  connectS3,
  getText,
  isTransientS3,
  put,
  removeObjects,
} from "./s3.ts";

export const archiveVariables = {
  ...pipelineVariables,
  ...bucketVariables,
  FORCE: optional(flag, false),
  ALLOW_SHRINK: optional(flag, false),
  MAX_ROWS_PER_SECOND: optional(number(1, 1_000_000_000), Number.POSITIVE_INFINITY),
};

/** A part ends before it would be larger, compressed, unless it is a single row. */
const PART_BYTES = 32 * 2 ** 20;

/** Of zlib's nine: README, "Speed and memory", has what the others cost. */
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

/** Compressed bytes of a day. */
export const bytesOf = ({ parts }: Manifest): number => parts.reduce((sum, part) => sum + part.bytes, 0);

export const manifestKey = (bucket: Bucket, day: string): string => `${dayPrefix(bucket, day)}manifest.json`;
export const dayPrefix = (bucket: Bucket, day: string): string => `${bucket.prefix}events/dt=${day}/`;

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
  env: Env<typeof archiveVariables>;
  bucket: Bucket;
  /** Reads the source as JSON lines. */
  select: string;
  /** Called with the rows that have passed; waits where they are more than MAX_ROWS_PER_SECOND, of all days together. */
  pace(rows: number): Promise<void>;
}

/** Checks the source, which must fit into etl.events_restored again, and the bucket. @throws UsageError with what to do. */
export async function openArchive(run: Run, source: Source, env: Archive["env"]): Promise<Archive> {
  const bucket = connectS3(env);
  const [select] = await Promise.all([checkArchivable(run, source), checkBucket(bucket)]);
  let due = performance.now();
  const pace = async (rows: number): Promise<void> => {
    due = Math.max(due, performance.now()) + (rows / env.MAX_ROWS_PER_SECOND) * 1000;
    const wait = due - performance.now();
    if (wait > 1) await delay(wait, undefined, { signal: run.signal });
  };
  return { env, bucket, select, pace };
}

/**
 * Compares the source with etl.events_restored, which archived days must fit into again.
 * @returns a SELECT of JSON lines.
 */
export async function checkArchivable(run: SchemaCheck & Pick<Run, "etl">, source: Source): Promise<string> {
  const file = "sql/etl/002_events_restored.sql";
  const restored = await run.etl<{ name: string; sql: string }[]>`
    select attname as name, format_type(atttypid, null) as sql from pg_attribute
    where attrelid = 'etl.events_restored'::regclass and attnum > 0 and not attisdropped order by attnum`;
  const wanted = restored.map(({ name, sql }) => ({
    name,
    expected: sql,
    differs: (column: { sql: string }) => (column.sql === sql ? undefined : column.sql),
  }));
  return jsonLines(source.select, await checkColumns(run, file, source, wanted));
}

/**
 * The SELECT around `select` of JSON lines that Postgres reads back as they were: a column that is NULL is left out, so that
 * JSON's null stays apart from it. The id comes first and created_at last, so that both are found without reading the payload.
 */
export function jsonLines(select: string, columns: Column[]): string {
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

export async function readManifest(
  bucket: Bucket,
  day: string,
): Promise<{ manifest: Manifest; etag: string } | undefined> {
  const object = await getText(bucket, manifestKey(bucket, day));
  if (!object) return undefined;
  try {
    return { manifest: JSON.parse(object.text) as Manifest, etag: object.etag };
  } catch (error) {
    const { message } = error as Error;
    const fault = `s3://${bucket.name}/${manifestKey(bucket, day)} is no manifest (${message}): delete it, then archive the day again`;
    throw Object.assign(new Error(fault), { name: "NoManifest" });
  }
}

/** Where the next part of a day starts: after this row, in the order of created_at and id. */
interface Position {
  created_at: string;
  id: string;
}

/** Before the first row of a day: no bigint is smaller. */
const startOf = (day: string): Position => ({ created_at: `${day}T00:00:00+00`, id: "-9223372036854775809" });

/** The first moment of a day. */
export const midnight = (day: string): string => startOf(day).created_at;

/** Archives one day, unless that is done: extract and put its parts, count, put the manifest. */
async function archiveDay(run: Run, archive: Archive, day: string): Promise<{ manifest: Manifest; skipped: boolean }> {
  const { env, bucket } = archive;
  const keys = createKeys(run, bucket, day);
  using _stopped = run.onStop(keys.remove);
  return await withRetry(run, isTransientS3, async (attempt) => {
    const before = await readManifest(bucket, day);
    if (before && !env.FORCE) return { manifest: before.manifest, skipped: before.manifest.run_id !== run.id };
    try {
      const parts: Part[] = [];
      for (let after: Position | undefined = startOf(day); after; ) {
        const part = await readPart(run, archive, day, after);
        if (part) parts.push({ key: await keys.put(part.body, attempt, parts.length + 1), ...part.is });
        after = part?.next;
      }
      const manifest = await publish(run, archive, await countDay(run, day, parts), before, keys);
      return { manifest, skipped: manifest.run_id !== run.id };
    } catch (error) {
      await keys.remove().catch((fault: Error) => warnOfLeft(run, day, fault));
      throw error;
    }
  });
}

interface Compressed {
  body: Buffer;
  is: Omit<Part, "key">;
  /** The part's last row, where another part may follow. */
  next: Position | undefined;
}

/**
 * Reads and compresses the rows of one part of a day: as many as fit. Its COPY has ended then, for a transaction of the source must not
 * wait for S3. @returns undefined where there are no rows.
 */
async function readPart(
  run: Run,
  { env, select, pace }: Archive,
  day: string,
  after: Position,
): Promise<Compressed | undefined> {
  const session = { ...run.session, settings: { "etl.after": after.id, "etl.rows": String(env.CHUNK_ROWS) } };
  const window = { from: after.created_at, to: midnight(addDays(day)) };
  let large: Buffer | undefined;
  using _once = { [Symbol.dispose]: () => free(large) }; // the session, which reads it too, is closed
  await using stream = copyJsonLines(env.SOURCE_DATABASE_URL, select, session, window);
  const [raw, packed] = [createHash("sha256"), createHash("sha256")];
  let [body, bytes, rows]: [Buffer | undefined, number, number] = [undefined, 0, 0];
  const gzip = createGzip({ level: GZIP_LEVEL }).on("data", (piece: Buffer) => {
    packed.update(piece);
    const copied = piece.copy(body as Buffer, bytes);
    if (copied < piece.length) gzip.destroy(new RangeError("gzip made its input larger"));
    bytes += copied;
  });
  const ended = once(gzip, "end");
  ended.catch(() => {}); // it is awaited below
  let [last, cut]: [Position | undefined, boolean] = [undefined, false];
  for await (const piece of stream.lines) {
    run.signal.throwIfAborted();
    cut = rows > 0 && bytes + piece.length > PART_BYTES;
    if (cut) break; // the next part reads the piece again
    // One row may be larger than a part. Memory that is not written to costs nothing.
    body ??= Buffer.allocUnsafeSlow(Math.max(PART_BYTES, piece.length) * 1.05);
    const taken = new Promise<void>((done, fail) => gzip.write(piece, (error) => (error ? fail(error) : done())));
    raw.update(piece); // while gzip works, in a thread of its own
    await taken;
    await pace(stream.sent.rows - rows);
    [large, last, rows] = [piece, position(piece), stream.sent.rows];
    cut = bytes + piece.length > PART_BYTES; // the next piece is likely as large
    if (cut) break;
  }
  if (!body) return undefined;
  gzip.end();
  await ended;
  const is = { rows, bytes, sha256: packed.digest("hex"), sha256_raw: raw.digest("hex") };
  return { body: body.subarray(0, bytes), is, next: cut || rows === env.CHUNK_ROWS ? last : undefined };
}

/** Frees memory that nothing reads any more. The collector, to which it looks small, would leave it beside the next part's. */
function free(part: Buffer | undefined): void {
  if (part && part.buffer.byteLength > PART_BYTES) (part.buffer as ArrayBuffer).transfer(0);
}

/** The last line's row. Its payload may be large: only the line's two ends are read. */
function position(lines: Buffer): Position {
  const start = lines.lastIndexOf(10, lines.length - 2) + 1;
  const [, id] = /^\{"id":(-?\d+)/.exec(lines.toString("latin1", start, start + 40)) ?? [];
  const [, created_at] =
    /"created_at":"([^"]+)"\}\n$/.exec(lines.toString("latin1", Math.max(start, lines.length - 80))) ?? [];
  if (!id || !created_at) throw new TypeError("a line without id and created_at at its ends");
  return { id, created_at };
}

/** The keys that a run has put for a day, in all its attempts, until a manifest names them or they are deleted again. */
function createKeys(run: Run, bucket: Bucket, day: string) {
  const mine: string[] = [];
  let doubtful = 0;
  let uploading: Promise<boolean> = Promise.resolve(true);
  return {
    /** A part is never overwritten: run and attempt are in its key. */
    put: async (body: Buffer, attempt: number, number: number): Promise<string> => {
      const suffix = attempt > 1 ? `${run.id}_${attempt}` : run.id;
      const key = `${dayPrefix(bucket, day)}part-${String(number).padStart(4, "0")}-${suffix}.ndjson.gz`;
      run.signal.throwIfAborted();
      mine.push(key);
      // Where an object of this key exists, it is this one, whose answer was lost: nobody else puts keys of this run.
      uploading = put(bucket, key, body, undefined, { run: run.id });
      if (await uploading) free(body);
      return key;
    },
    /** Before a manifest is put that names those so far: the PUT may succeed even if its answer is lost, so they stay until `settle`. */
    commit: (): void => {
      doubtful = mine.length;
    },
    /** Deletes what the manifest that is there now does not name, and what it replaced. */
    settle: async (named: Part[], replaced: Part[]): Promise<void> => {
      const gone = new Set([...mine.splice(0), ...replaced.map(({ key }) => key)]);
      doubtful = 0;
      for (const { key } of named) gone.delete(key);
      await removeObjects(bucket, [...gone]);
    },
    remove: async (): Promise<void> => {
      if (mine.length === doubtful) return;
      // A request that is under way may be done yet, after the deletion: wait for it, but not for a server that is silent.
      await Promise.race([uploading.catch(() => {}), delay(2000, undefined, { ref: false })]);
      await removeObjects(bucket, mine.splice(doubtful));
    },
  };
}

/** What the source has of a day. */
export async function readSource(source: Sql, day: string): Promise<Pick<Manifest, "rows" | "min_id" | "max_id">> {
  const [row] = await source<{ rows: string; min_id: string | null; max_id: string | null }[]>`
    select count(*) as rows, min(id)::text as min_id, max(id)::text as max_id from public.events
    where created_at >= ${midnight(day)}::text::timestamptz and created_at < ${midnight(addDays(day))}::text::timestamptz`;
  return { rows: Number(row?.rows), min_id: row?.min_id ?? null, max_id: row?.max_id ?? null };
}

/**
 * What the manifest says: the parts, compared with what the source now has of the day.
 * @throws Error where the counts differ: a stream that ended early would be a successful short part. The next attempt reads the day again.
 */
async function countDay(run: Run, day: string, parts: Part[]): Promise<Manifest> {
  const found = await readSource(run.source, day);
  const rows = parts.reduce((sum, part) => sum + part.rows, 0);
  if (rows !== found.rows)
    throw new Error(
      `the counts differ: ${rows} rows of ${day} were archived, and the source has ${found.rows}; no manifest was written`,
    );
  return { day, ...found, run_id: run.id, created_at: new Date().toISOString(), parts };
}

/**
 * The commit: puts the manifest, if the one it replaces is still the one that was read (or there still is none). The winner of a race
 * then deletes the parts of the manifest that it replaced; the loser its own.
 * @returns the day's manifest from now on.
 * @throws Error where the day would end with fewer rows than it has, unless that was allowed.
 */
async function publish(
  run: Run,
  { env, bucket }: Archive,
  manifest: Manifest,
  before: { manifest: Manifest; etag: string } | undefined,
  keys: ReturnType<typeof createKeys>,
): Promise<Manifest> {
  const { day, rows } = manifest;
  if (before && rows < before.manifest.rows && !env.ALLOW_SHRINK)
    throw new Error(
      `${day} has ${rows} rows at the source and ${before.manifest.rows} in the archive, which may be the only ` +
        `copy of the others: it stays as it is. If they are to go: make backfill-events FROM=${day} ` +
        `TO=${addDays(day)} FORCE=1 ALLOW_SHRINK=1`,
    );
  run.signal.throwIfAborted();
  keys.commit();
  const text = `${JSON.stringify(manifest, null, 2)}\n`;
  const won = await put(bucket, manifestKey(bucket, day), text, before?.etag, { run: run.id });
  // An answer that got lost, and the request sent again, looks like a lost race.
  const now = won ? manifest : (await readManifest(bucket, day))?.manifest;
  const replaced = now?.run_id === run.id && before ? before.manifest.parts : [];
  await keys.settle(now?.parts ?? [], replaced).catch((error: Error) => warnOfLeft(run, day, error));
  if (!now) throw new Error(`the manifest of ${day} was deleted while the day was archived again`);
  if (now.run_id !== run.id) run.log("lost", { day, because: "another run archived it meanwhile", holder: now.run_id });
  return now;
}

function warnOfLeft(run: Run, day: string, { message }: Error): void {
  run.log("warning", {
    warning: `parts of ${day} were left that no manifest names; make verify-events removes them with CLEAN=1`,
    error: message,
  });
}

/**
 * Archives the days, so many at a time, and continues past one that fails.
 * @param failed days that have failed already, with the reason; those that fail are added.
 * @param archived is called after each day that is done, as long as none has failed.
 * @throws Error at the end that lists the days that failed.
 */
export async function archiveDays(
  run: Run,
  archive: Archive,
  { days, failed, concurrency }: { days: string[]; failed: Map<string, string>; concurrency: number },
  archived: (day: string) => Promise<void> = async () => {},
): Promise<void> {
  const total = days.length + failed.size;
  let [done, skipped] = [0, 0];
  const one = async (day: string): Promise<void> => {
    const started = run.seconds();
    try {
      const { manifest, skipped: before } = await archiveDay(run, archive, day);
      run.signal.throwIfAborted();
      run.restartDeadline();
      await recordDay(run, day, started, { ...manifest, bytes: bytesOf(manifest) });
      if (before) skipped += 1;
      else reportDay(run, manifest, started);
      if (!failed.size) await archived(day);
    } catch (error) {
      if (run.signal.aborted) throw error;
      const { message } = error as Error;
      failed.set(day, message);
      run.log("day", { day, failed: message });
      await recordDay(run, day, started, { run_id: run.id, rows: 0, bytes: 0, error: redact(message) });
    }
    done += 1;
    showProgress(run, done, skipped, days.length);
  };
  const queue = days.values();
  const worker = async (): Promise<void> => {
    for (const day of queue) await one(day);
  };
  await Promise.all(Array.from({ length: concurrency }, worker));
  progress("");
  run.log("days", { archived: run.totals.chunks, skipped, failed: failed.size });
  if (!failed.size) return;
  const list = [...failed.keys()].sort();
  const again = archive.env.FORCE
    ? ` FORCE=1${archive.env.ALLOW_SHRINK ? " ALLOW_SHRINK=1" : ""}`
    : " (days that are done are skipped)";
  const next = `make backfill-events FROM=${list[0]} TO=${addDays(list.at(-1) ?? "")}${again}`;
  throw new Error(
    `${failed.size} of ${total} days failed${failed.size < total ? "; the others are archived" : ""}:\n${list.map((day) => `  ${day}: ${failed.get(day)}`).join("\n")}\nNext: ${next}`,
  );
}

function reportDay(run: Run, manifest: Manifest, started: number): void {
  const { day, rows, parts } = manifest;
  const bytes = bytesOf(manifest);
  run.totals.chunks += 1;
  run.totals.rows += rows;
  run.totals.bytes += bytes;
  if (!terminal())
    run.log("day", { day, rows, bytes, parts: parts.length, seconds: Number((run.seconds() - started).toFixed(3)) });
}

function showProgress(run: Run, done: number, skipped: number, days: number): void {
  const [seconds, { rows, bytes }] = [run.seconds(), run.totals];
  const bar = "#".repeat(Math.round((done / days) * 20)).padEnd(20, "-");
  const left = done > skipped ? ` · ${duration((seconds / (done - skipped)) * (days - done))} left` : "";
  progress(
    `[${bar}] ${done}/${days} days · ${thousands(rows)} rows · ${thousands(bytes / 1e6)} MB · ${thousands(rows / seconds)} rows/s${left}`,
  );
}

/** Records how a day ended. Progress, for people: whether it is done, its manifest says. */
async function recordDay(
  run: Run,
  day: string,
  started: number,
  by: { run_id: string; rows: number; bytes: number; error?: string },
): Promise<void> {
  await run.etl`
    insert into etl.chunks as c (pipeline, chunk_from, chunk_to, state, rows, bytes, attempts, error, run_id, started_at, finished_at)
    values (${run.pipeline}, ${midnight(day)}::text::timestamptz, ${midnight(addDays(day))}::text::timestamptz,
      ${by.error === undefined ? "succeeded" : "failed"}, ${by.rows}, ${by.bytes}, 1, ${by.error ?? null}, ${by.run_id},
      now() - make_interval(secs => ${run.seconds() - started}), now())
    on conflict (pipeline, chunk_from) do update
      set state = excluded.state, rows = excluded.rows, bytes = excluded.bytes, attempts = c.attempts + 1, error = excluded.error,
          run_id = excluded.run_id, started_at = excluded.started_at, finished_at = excluded.finished_at`;
}
