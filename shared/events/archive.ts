/**
 * The archive of events: a day of UTC is events/dt=YYYY-MM-DD/ with its parts and, last, manifest.json. A day is done when
 * its manifest is there; etl.chunks is progress, not truth. Readers go by manifests.
 */
import { createHash } from "node:crypto";
import { addAbortSignal, Readable } from "node:stream";
import { setTimeout as delay } from "node:timers/promises";
import { setFlagsFromString } from "node:v8";
import { runInNewContext } from "node:vm";
import { createGzip } from "node:zlib";
import type { Sql } from "postgres";
import type { RowStream } from "../copy.ts";
import { type Env, flag, number, optional, redact, UsageError } from "../env.ts";
import { progress, terminal, thousands } from "../log.ts";
import type { Run } from "../run.ts";
import { quote } from "../session.ts";
import { type Column, checkColumns, type SchemaCheck, type Source } from "../source.ts";
import { duration } from "../table.ts";
import { advance, type Window } from "../watermark.ts";
import { type Bucket, getText, listObjects, putStream, putText, removeObjects, UPLOAD_PIECE_BYTES } from "./s3.ts";

export const archiveVariables = {
  FORCE: optional(flag, false),
  ALLOW_SHRINK: optional(flag, false),
  BACKFILL: optional(flag, false),
  CONCURRENCY: optional(number(1, 32), 1),
  MAX_ROWS_PER_SECOND: optional(number(1, 1_000_000_000)),
};

/** Of zlib's nine: README, "Speed and memory", has what the others cost. */
const GZIP_LEVEL = 6;

// After each part, so that memory is that of one, however many a day has: V8 waits longer, as buffers are no part of its heap.
setFlagsFromString("--expose-gc");
const collectGarbage = runInNewContext("gc") as () => void;

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

/**
 * FROM and TO as the days they are.
 * @throws UsageError where they are no dates, or no day lies between them.
 */
export function readDays(
  { FROM, TO }: { FROM: string | undefined; TO: string | undefined },
  command: string,
): string[] {
  const example = `Example: make ${command} FROM=2017-01-01 TO=2018-01-01`;
  if (!FROM || !TO)
    throw new UsageError(`make ${command} needs FROM and TO: the first day, and the day after the last. ${example}`);
  for (const [name, value] of Object.entries({ FROM, TO })) {
    if (!value.endsWith("T00:00:00.000000+00"))
      throw new UsageError(`${name} ${value} must be a date: the archive is by days of UTC. ${example}`);
  }
  const [from, to] = [FROM.slice(0, 10), TO.slice(0, 10)];
  if (from === to)
    throw new UsageError(
      `FROM and TO are both ${from}, and TO is exclusive: there is no day between them. For that day: TO=${addDays(from)}`,
    );
  return daysBetween(from, to);
}

/**
 * The days that a run has to see to, and those of FROM..TO that are not over yet, as the safe upper bound knows it. Without FROM
 * and TO: the days since the watermark, the first time yesterday.
 */
export async function windowDays(
  run: Run,
  asked: string[] | undefined,
  window: Window,
  source: Source,
): Promise<{ days: string[]; incomplete: string[] }> {
  const bound = window.to.slice(0, 10);
  if (asked) return { days: asked.filter((day) => day < bound), incomplete: asked.filter((day) => day >= bound) };
  if (window.to === "-infinity") return { days: [], incomplete: [] }; // held before there is a watermark
  if (window.from !== "-infinity") return { days: daysBetween(window.from.slice(0, 10), bound), incomplete: [] };
  const yesterday = addDays(bound, -1);
  const [oldest] = await run.source.unsafe<{ day: string | null }[]>(
    `select min(${source.cursor})::date::text as day from ${source.table}`,
  );
  if (oldest?.day && oldest.day < yesterday) {
    const next = `make backfill-events FROM=${oldest.day} TO=${yesterday}`;
    run.log("first-run", { archives: yesterday, older_days_from: oldest.day, next });
  }
  return { days: [yesterday], incomplete: [] };
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
export interface Position {
  created_at: string;
  id: string;
}

/** Before the first row of a day: no bigint is smaller. */
export const startOf = (day: string): Position => ({ created_at: `${day}T00:00:00+00`, id: "-9223372036854775809" });

/** The parts of one attempt at a day. They are deleted again at its end. */
export interface Parts extends AsyncDisposable {
  day: string;
  attempt: number;
  list: Part[];
  /** Uploads a part. @returns its last row where it is full, so that another one may follow. */
  add(rows: RowStream, pace: Pace): Promise<Position | undefined>;
  /** A manifest may name them: they stay. */
  keep: boolean;
}

/** @param partRows rows of a full part. */
export function createParts(run: Run, bucket: Bucket, day: string, attempt: number, partRows: number): Parts {
  const list: Part[] = [];
  const keys: string[] = [];
  let uploading: Promise<unknown> = Promise.resolve();
  const remove = async (): Promise<void> => {
    if (parts.keep || !keys.length) return;
    await uploading.catch(() => {});
    await removeObjects(bucket, keys);
    keys.length = 0;
  };
  const stopped = run.onStop(remove);
  const parts: Parts = {
    day,
    attempt,
    list,
    keep: false,
    add: async (rows, pace) => {
      const lines = rows.lines[Symbol.asyncIterator]();
      const first = await lines.next();
      if (first.done) return undefined;
      const suffix = attempt > 1 ? `${run.id}_${attempt}` : run.id; // a part is never overwritten
      const key = `${dayPrefix(bucket, day)}part-${String(list.length + 1).padStart(4, "0")}-${suffix}.ndjson.gz`;
      keys.push(key);
      const [raw, packed] = [createHash("sha256"), createHash("sha256")];
      const gzip = createGzip({ level: GZIP_LEVEL }).on("error", () => {}); // whoever reads it throws it
      let [last, bytes] = [first.value, 0];
      const compress = async (): Promise<void> => {
        for (let next = first as IteratorResult<Buffer>; !next.done; next = await lines.next()) {
          last = next.value;
          raw.update(last);
          // A piece's memory is used again once the next is asked for: wait until gzip, in its own thread, is done with it.
          await new Promise<void>((done, fail) => gzip.write(last, (error) => (error ? fail(error) : done())));
          await pace(rows.sent);
        }
        gzip.end();
      };
      async function* count(): AsyncGenerator<Buffer> {
        for await (const piece of gzip) {
          packed.update(piece);
          bytes += piece.length;
          yield piece;
        }
      }
      addAbortSignal(run.signal, gzip);
      compress().catch((error: Error) => gzip.destroy(error));
      const start = spare.pop() ?? Buffer.allocUnsafeSlow(UPLOAD_PIECE_BYTES);
      const body = await whole(count(), start);
      uploading = putStream(bucket, key, body, { run: run.id }, run.signal);
      await uploading;
      spare.push(start);
      collectGarbage();
      list.push({ key, rows: rows.sent.rows, bytes, sha256: packed.digest("hex"), sha256_raw: raw.digest("hex") });
      return rows.sent.rows < partRows ? undefined : position(last);
    },
    [Symbol.asyncDispose]: async () => {
      stopped[Symbol.dispose]();
      await remove().catch((error: Error) => warnOfLeft(run, day, error));
    },
  };
  return parts;
}

/** Memory of parts that are uploaded, for the next ones. */
const spare: Buffer[] = [];

/**
 * A stream that ends within the 5 MB of an upload in one piece, in `start`; any other as a stream that begins with it. lib-storage
 * would hold each part twice, and leave both to the garbage collector.
 */
async function whole(pieces: AsyncGenerator<Buffer>, start: Buffer): Promise<Buffer | Readable> {
  let size = 0;
  for (let next = await pieces.next(); !next.done; next = await pieces.next()) {
    if (size + next.value.length >= UPLOAD_PIECE_BYTES)
      return Readable.from(chain([start.subarray(0, size), next.value], pieces));
    size += next.value.copy(start, size);
  }
  return start.subarray(0, size);
}

async function* chain(first: Buffer[], rest: AsyncGenerator<Buffer>): AsyncGenerator<Buffer> {
  yield* first;
  yield* rest;
}

/** The last line's row; the id as it is written, since it may be beyond 2^53. */
function position(lines: Buffer): Position {
  const line = lines.toString("utf8", lines.lastIndexOf(10, lines.length - 2) + 1);
  const exact = (key: string, value: unknown, { source }: { source?: string } = {}): unknown =>
    key === "id" ? source : value;
  return JSON.parse(line, exact as Parameters<typeof JSON.parse>[1]) as Position;
}

/** What the source has of a day. */
export async function readSource(source: Sql, day: string): Promise<Pick<Manifest, "rows" | "min_id" | "max_id">> {
  const [row] = await source<{ rows: string; min_id: string | null; max_id: string | null }[]>`
    select count(*) as rows, min(id)::text as min_id, max(id)::text as max_id from public.events
    where created_at >= ${startOf(day).created_at}::text::timestamptz and created_at < ${startOf(addDays(day)).created_at}::text::timestamptz`;
  return { rows: Number(row?.rows), min_id: row?.min_id ?? null, max_id: row?.max_id ?? null };
}

/**
 * What the manifest says: the parts, compared with what the source now has of the day. A stream that ended early would be a
 * successful short part.
 * @throws Error where the counts differ; the next attempt reads the day again.
 */
export async function describeDay(run: Run, { day, list }: Parts): Promise<Manifest> {
  const there = await readSource(run.source, day);
  const rows = list.reduce((sum, part) => sum + part.rows, 0);
  if (rows !== there.rows)
    throw new Error(
      `the counts differ: ${rows} rows of ${day} were archived, and the source has ${there.rows}; no manifest was written`,
    );
  return { day, ...there, run_id: run.id, created_at: new Date().toISOString(), parts: list };
}

/**
 * The commit: puts the manifest, if the one it replaces is still the one that was read (or there still is none). The winner
 * of a race then removes the parts of the manifest that it replaced; the loser keeps nothing.
 * @returns the day's manifest from now on.
 * @throws Error where the day would end with fewer rows than it has, unless that was allowed.
 */
export async function publish(
  run: Run,
  bucket: Bucket,
  parts: Parts,
  manifest: Manifest,
  before: { manifest: Manifest; etag: string } | undefined,
  allowShrink: boolean,
): Promise<Manifest> {
  const { day, rows } = manifest;
  if (before && rows < before.manifest.rows && !allowShrink) {
    throw new Error(
      `${day} has ${rows} rows at the source and ${before.manifest.rows} in the archive, which may be the only copy of the others: it stays as it is. If they are to go: make backfill-events FROM=${day} TO=${addDays(day)} FORCE=1 ALLOW_SHRINK=1`,
    );
  }
  run.signal.throwIfAborted();
  // From here on the manifest may be there, whatever becomes of the answer: its parts must be too.
  parts.keep = true;
  const text = `${JSON.stringify(manifest, null, 2)}\n`;
  if (!(await putText(bucket, manifestKey(bucket, day), text, before?.etag, { run: run.id }))) {
    // An answer that got lost, and the request sent again, looks like a lost race.
    const now = (await readManifest(bucket, day))?.manifest;
    if (JSON.stringify(now) !== JSON.stringify(manifest)) {
      parts.keep = false;
      if (!now) throw new Error(`the manifest of ${day} was deleted while the day was archived again`);
      run.log("lost", { day, because: "another run archived it meanwhile", holder: now.run_id });
      return now;
    }
  }
  const replaced = before?.manifest.parts.map((part) => part.key) ?? [];
  // Parts of an attempt before, whose manifest got no answer: its condition no longer holds, so that it cannot come any more.
  const others = parts.attempt === 1 ? [] : await Array.fromAsync(listObjects(bucket, dayPrefix(bucket, day)));
  const left = others
    .map(({ key }) => key)
    .filter((key) => key.includes(run.id) && !parts.list.some((part) => part.key === key));
  await removeObjects(bucket, [...replaced, ...left]).catch((error: Error) => warnOfLeft(run, day, error));
  return manifest;
}

function warnOfLeft(run: Run, day: string, { message }: Error): void {
  run.log("warning", {
    warning: `parts of ${day} were left that no manifest names; make verify-events removes them with CLEAN=1`,
    error: message,
  });
}

/** Called as rows pass, with those of one stream so far; waits where they are more than the limit allows. */
export type Pace = (sent: { rows: number }) => Promise<void>;

/** At most so many rows a second, of all streams together; each stream has its own Pace. */
export function createPace(run: Run, rowsPerSecond: number | undefined): () => Pace {
  let due = performance.now();
  return () => {
    let before = 0;
    return async ({ rows }) => {
      const fresh = rows - before;
      before = rows;
      if (!rowsPerSecond) return;
      due = Math.max(due, performance.now()) + (fresh / rowsPerSecond) * 1000;
      const wait = due - performance.now();
      if (wait > 1) await delay(wait, undefined, { signal: run.signal });
    };
  };
}

/**
 * Archives the days, so many at a time, and goes on past one that fails. Without FROM and TO the watermark follows, up to the
 * first day that failed.
 * @param archive archives a day, and says if that had been done already.
 * @throws Error at the end that lists the days that failed.
 */
export async function eachDay(
  run: Run,
  { days, incomplete }: { days: string[]; incomplete: string[] },
  window: Window,
  { CONCURRENCY, FORCE, ALLOW_SHRINK }: Pick<Env<typeof archiveVariables>, "CONCURRENCY" | "FORCE" | "ALLOW_SHRINK">,
  archive: (day: string) => Promise<{ manifest: Manifest; skipped: boolean }>,
): Promise<void> {
  const failed = new Map(
    incomplete.map((day) => [
      day,
      `is not over yet: the source can still get rows before its end (the safe bound is ${window.to})`,
    ]),
  );
  const total = days.length + incomplete.length;
  let [done, skipped] = [0, 0];
  const show = (): void => {
    const [seconds, at] = [run.seconds(), done / (days.length || 1)];
    const { rows, bytes } = run.totals;
    const bar = "#".repeat(Math.round(at * 20)).padEnd(20, "-");
    const left = done > skipped ? ` · ${duration((seconds / (done - skipped)) * (days.length - done))} left` : "";
    progress(
      `[${bar}] ${done}/${days.length} days · ${thousands(rows)} rows · ${thousands(bytes / 1e6)} MB · ${thousands(rows / seconds)} rows/s${left}`,
    );
  };
  const one = async (day: string): Promise<void> => {
    const started = run.seconds();
    try {
      const { manifest, skipped: before } = await archive(day);
      run.signal.throwIfAborted();
      run.restartDeadline();
      const { rows, run_id, parts } = manifest;
      const bytes = bytesOf(manifest);
      await recordDay(run, day, "succeeded", { run_id, rows, bytes });
      if (before) skipped += 1;
      else {
        run.totals.chunks += 1;
        run.totals.rows += rows;
        run.totals.bytes += bytes;
        if (!terminal())
          run.log("day", { day, rows, bytes, parts: parts.length, seconds: (run.seconds() - started).toFixed(3) });
      }
      if (!failed.size) {
        await advance(run, { from: run.watermark ?? window.from, to: startOf(addDays(day)).created_at }, window.origin);
      }
    } catch (error) {
      if (run.signal.aborted) throw error;
      const { message } = error as Error;
      failed.set(day, message);
      run.log("day", { day, failed: message });
      await recordDay(run, day, "failed", { run_id: run.id, error: redact(message) });
    }
    done += 1;
    show();
  };
  const queue = days.values();
  const worker = async (): Promise<void> => {
    for (const day of queue) await one(day);
  };
  await Promise.all(Array.from({ length: run.byHand ? CONCURRENCY : 1 }, worker));
  progress("");
  run.log("days", { archived: run.totals.chunks, skipped, failed: failed.size });
  if (!failed.size) return;
  const list = [...failed.keys()].sort();
  const again = FORCE ? ` FORCE=1${ALLOW_SHRINK ? " ALLOW_SHRINK=1" : ""}` : " (days that are done are skipped)";
  const next = `make backfill-events FROM=${list[0]} TO=${addDays(list.at(-1) ?? "")}${again}`;
  throw new Error(
    `${failed.size} of ${total} days failed${failed.size < total ? "; the others are archived" : ""}:\n${list.map((day) => `  ${day}: ${failed.get(day)}`).join("\n")}\nNext: ${next}`,
  );
}

/** Records that a day is being archived. Progress, for people: whether it is done, its manifest says. */
export async function startDay(run: Run, day: string): Promise<void> {
  await recordDay(run, day, "running", { run_id: run.id });
}

async function recordDay(
  run: Run,
  day: string,
  state: "running" | "succeeded" | "failed",
  by: { run_id: string; rows?: number; bytes?: number; error?: string },
): Promise<void> {
  const [from, to] = [startOf(day).created_at, startOf(addDays(day)).created_at];
  const started = state === "running";
  await run.etl`
    insert into etl.chunks as c (pipeline, chunk_from, chunk_to, state, rows, bytes, attempts, error, run_id, finished_at)
    values (${run.pipeline}, ${from}::text::timestamptz, ${to}::text::timestamptz, ${state}, ${by.rows ?? 0}, ${by.bytes ?? 0}, 1,
      ${by.error ?? null}, ${by.run_id}, case when not ${started} then now() end)
    on conflict (pipeline, chunk_from) do update
      set state = excluded.state, rows = excluded.rows, bytes = excluded.bytes, error = excluded.error, run_id = excluded.run_id,
          attempts = c.attempts + ${started}::int, finished_at = excluded.finished_at,
          started_at = case when ${started} then now() else c.started_at end`;
}

/**
 * The SELECT around `select` of JSON lines that Postgres reads back as they were: a column that is NULL is left out, so that
 * JSON's null stays apart from it.
 */
export function jsonLines(select: string, columns: Column[]): string {
  // What is JSON as it stands needs no to_json, which costs a fifth of the whole query here.
  const json = /^(int[248]|jsonb)$/;
  const pairs = columns.map(({ name, type, array }) => {
    const value = json.test(type) && !array ? `${quote(name)}::text` : `to_json(${quote(name)})`;
    return `'${JSON.stringify(name).replaceAll("'", "''")}:' || ${value}`;
  });
  return `select '{' || concat_ws(',', ${pairs.join(", ")}) || '}' from (${select}) source`;
}
