/**
 * The watermark: where a pipeline is, how far it may go, and in which steps.
 *
 * A window is half-open: `from` is the watermark, inclusive; `to` becomes the watermark, exclusive. Timestamps are text of a fixed width
 * in UTC with microseconds, from end to end, so that two of them compare as text; '-infinity', before the first run, is less than each.
 */
import { readFileSync } from "node:fs";
import { join } from "node:path";
import type { Sql } from "postgres";
import { root } from "./env.ts";
import type { Run } from "./run.ts";
import { quote, utc } from "./session.ts";
import type { Source } from "./source.ts";

/** The history that a watermark belongs to: after a restore or a failover it may mean nothing. */
export interface Origin {
  /** System identifier and timeline. */
  server: string;
  /** A database that was dropped and created again has another. Null in a watermark of an older version. */
  database_oid: string | null;
  /** The WAL position as a number of 20 digits, so that two of them compare as text. Null as above. */
  wal: string | null;
}

export interface Watermark extends Origin {
  watermark: string;
}

/** One row of sql/safe_bound.sql, which says what the fields mean. */
export interface Bound extends Origin {
  database: string;
  /** Why no bound is safe, and what to do. */
  refusal: string | null;
  holder: string | null;
  prepared: boolean;
  now: string;
  bound: string;
  hold_seconds: number;
}

export interface Window {
  /** Inclusive. '-infinity' before the first run. */
  from: string;
  /** Exclusive. */
  to: string;
  /** By how much a transaction keeps `to` from reaching now() − lag. */
  holdSeconds: number;
  /** Undefined for a re-run by hand, which leaves the watermark alone. */
  origin: Origin | undefined;
}

export interface Chunk {
  from: string;
  to: string;
  /** About how many rows; 0 is exact. A row that changes before it is read belongs to a later window. */
  rows: number;
}

/** The pipeline's watermark, or undefined before its first run. */
export async function readWatermark(etl: Sql, pipeline: string): Promise<Watermark | undefined> {
  const [stored] = await etl.unsafe<Watermark[]>(
    `select ${utc("watermark")} as watermark, server, database_oid, wal from etl.watermarks where pipeline = $1`,
    [pipeline],
  );
  return stored;
}

/**
 * The safe upper bound of the source. The session must have etl.lag_seconds set.
 * @throws Error where open transactions cannot be seen, so that no bound is safe.
 */
export async function readBound(source: Sql): Promise<Bound> {
  const [bound] = await source.unsafe<Bound[]>(readFileSync(join(root, "sql/safe_bound.sql"), "utf8"));
  if (!bound) throw new Error("sql/safe_bound.sql returned no row");
  if (bound.refusal) throw new Error(`source database ${bound.database}: no bound is safe: ${bound.refusal}`);
  return bound;
}

/**
 * Whether a watermark may be trusted: the one rule of run, status, verify, sweep and rewind.
 * @returns why not, in words with the next command, or undefined.
 */
export function distrust(pipeline: string, stored: Watermark, bound: Bound): string | undefined {
  const where = `source database ${bound.database}`;
  const runbook = `ops/runbook.md, "After a restore, a failover or a clock set back", with make rewind PIPELINE=${pipeline} TO=…`;
  const next = `Next: ${runbook}`;
  const restored = "it was restored or failed over, and rows that were synced since may be gone there";
  if (stored.server !== bound.server)
    return (
      `${where} is not the server that the watermark ${stored.watermark} was taken from (${bound.server}, expected ` +
      `${stored.server}): ${restored}. ${next}`
    );
  if (stored.database_oid && stored.database_oid !== bound.database_oid)
    return (
      `${where} is another one than the watermark ${stored.watermark} was taken from (oid ${bound.database_oid}, ` +
      `expected ${stored.database_oid}): ${restored}. ${next}`
    );
  if (stored.wal && bound.wal && stored.wal > bound.wal)
    return (
      `${where} went back: its WAL ends at ${bound.wal}, and was at ${stored.wal} when the watermark ` +
      `${stored.watermark} was set: ${restored}. ${next}`
    );
  if (stored.watermark > bound.now)
    return (
      `the clock of ${where} says ${bound.now}, which is before the watermark ${stored.watermark}: it was set back, ` +
      `or the watermark ahead, and rows written meanwhile would be missed. Next: correct the clock, or ${runbook}`
    );
  if (stored.watermark > bound.bound && bound.holder && !bound.prepared)
    return (
      `an open transaction of ${where} began before the watermark ${stored.watermark} and was not seen then, so its ` +
      `rows would be missed (${bound.holder}; began ${bound.bound}). Next: once it has ended, make rewind ` +
      `PIPELINE=${pipeline} TO=${bound.bound}; and raise WATERMARK_LAG_SECONDS`
    );
  return undefined;
}

/**
 * The window of a run: from the watermark to the safe upper bound. Where somebody holds the bound the window is shorter,
 * or empty: a later run takes the rows, and none is skipped. A re-run by hand reads [FROM, TO), and no further than the bound.
 * @throws Error wherever the bound or the watermark cannot be trusted, with the reason and the next command.
 */
export async function takeWindow(
  run: Run,
  { FROM, TO }: { FROM?: string | undefined; TO?: string | undefined },
): Promise<Window> {
  const stored = await readWatermark(run.etl, run.pipeline);
  const bound = await readBound(run.source); // after it: a run beside this one may move the watermark up to a later bound
  const { prepared, holder, hold_seconds: holdSeconds } = bound;
  const reason = stored && !FROM && distrust(run.pipeline, stored, bound);
  if (reason) throw new Error(reason);
  let [from, to] = [stored?.watermark ?? "-infinity", bound.bound];
  if (FROM && TO) {
    // Past the bound an open transaction may yet commit an older updated_at over a newer row: had the re-run taken that, the upsert
    // would refuse the older one for ever.
    if (prepared)
      throw new Error(`no bound is safe while a transaction is prepared (${holder}). Finish it, then run this again.`);
    [from, to] = [FROM, TO < bound.bound ? TO : bound.bound];
  }
  // A prepared transaction's start is not known (prepared is the time of PREPARE), so nothing can be taken past the watermark.
  // A bound behind the watermark without a holder is a lag that was raised since: the clock will catch up.
  if (prepared || to < from) to = from;
  if (holder && (prepared || to === bound.bound))
    run.log("held", { by: holder, hold_seconds: Math.round(holdSeconds) });
  run.log("window", { from, to });
  run.window = { from, to, holdSeconds };
  return { from, to, holdSeconds, origin: FROM ? undefined : bound };
}

/**
 * Cuts the next chunk of at most `chunkRows` rows off [from, to): it ends at the cursor of the row after them, and where
 * that equals `from`, at the next distinct one, since one timestamp is never split. Undefined where nothing is left to cut.
 */
export async function nextChunk(
  run: Run,
  { select, cursor }: Source,
  { from, to }: { from: string; to: string },
  chunkRows: number,
): Promise<Chunk | undefined> {
  if (from === to) return undefined;
  const column = quote(cursor);
  return await run.source.begin("read only", async (sql) => {
    await sql`select set_config('etl.from', ${from}, true), set_config('etl.to', ${to}, true)`;
    const ask = async (query: string) => (await sql.unsafe<{ rows: number; at: string | null }[]>(query))[0];
    const cut = await ask(`select count(*)::int as rows, ${utc("max(c)")} as at
       from (select ${column} as c from (${select}) q order by ${column} limit ${chunkRows + 1}) head`);
    if (!cut?.at || cut.rows <= chunkRows) return { from, to, rows: cut?.rows ?? 0 };
    if (cut.at > from) return { from, to: cut.at, rows: chunkRows };
    const next = await ask(`select 0 as rows, ${utc(`min(${column})`)} as at from (${select}) q
       where ${column} > current_setting('etl.from')::timestamptz`);
    return { from, to: next?.at ?? to, rows: cut.rows };
  });
}

/**
 * Moves the watermark from `chunk.from` to `chunk.to`, if it is still there (compare-and-set). Does nothing in a re-run by hand.
 * @throws Error where another run, or a person, moved it meanwhile.
 */
export async function advance(
  run: Run,
  chunk: { from: string; to: string },
  origin: Origin | undefined,
): Promise<void> {
  const { pipeline, etl, id } = run;
  if (!origin) return;
  run.signal.throwIfAborted();
  const moved = await etl`
    insert into etl.watermarks as w (pipeline, watermark, server, database_oid, wal, run_id)
    select ${pipeline}, ${chunk.to}::text::timestamptz, ${origin.server}, ${origin.database_oid}, ${origin.wal}, ${id}
    where ${chunk.from}::text = '-infinity' or exists (select from etl.watermarks where pipeline = ${pipeline})
    on conflict (pipeline) do update
      set watermark = excluded.watermark, server = excluded.server, database_oid = excluded.database_oid,
          wal = excluded.wal, run_id = excluded.run_id, updated_at = now()
      where w.watermark = ${chunk.from}::text::timestamptz`;
  if (moved.count !== 1) {
    const now = await readWatermark(etl, pipeline);
    throw new Error(
      `another run moved the watermark of ${pipeline} (expected ${chunk.from}, found ` +
        `${now?.watermark ?? "none"}): nothing is lost, the rows of this run are upserted. Next: make status`,
    );
  }
  run.watermark = chunk.to;
}
