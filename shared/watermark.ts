/**
 * The watermark: where a pipeline is, how far it may go, and in which steps.
 *
 * A window is half-open: `from` is the watermark, inclusive; `to` becomes the watermark, exclusive. Timestamps are text
 * in UTC with microseconds from end to end; Postgres compares them, never JavaScript.
 */
import { readFileSync } from "node:fs";
import { join } from "node:path";
import type { Sql } from "postgres";
import { type Env, root } from "./env.ts";
import type { Run } from "./run.ts";
import { quote } from "./session.ts";
import type { Source } from "./source.ts";

/** Which server a watermark was taken from: after a restore or a failover it may mean nothing. */
export interface Identity {
  system_identifier: string;
  timeline: number;
}

export function sameServer(a: Identity, b: Identity): boolean {
  return a.system_identifier === b.system_identifier && a.timeline === b.timeline;
}

/** One row of sql/safe_bound.sql, which says what the fields mean. */
export interface Bound extends Identity {
  role: string;
  database: string;
  standby: boolean;
  sees_all: boolean;
  untracked: string | null;
  prepared: string | null;
  holder: string | null;
  now: string;
  bound: string;
  hold_seconds: number;
}

export interface Window {
  /** Inclusive. '-infinity' before the first run. */
  from: string;
  /** Exclusive. */
  to: string;
  /** The safe upper bound, where `to` is not it. */
  bound?: string;
  /** Undefined for a re-run by hand, which leaves the watermark alone. */
  identity?: Identity;
  /** Who keeps `to` from reaching now() − lag, in words, and by how much. */
  holder: string | null;
  holdSeconds: number;
}

export interface Chunk {
  from: string;
  to: string;
  /** About how many rows; 0 is exact. A row that changes before it is read moves on to a later window. */
  rows: number;
}

/** The pipeline's watermark, or undefined before its first run. */
export async function readWatermark(
  etl: Sql,
  pipeline: string,
): Promise<(Identity & { watermark: string }) | undefined> {
  const [row] = await etl<(Identity & { watermark: string })[]>`
    select replace(watermark::text, ' ', 'T') as watermark, system_identifier, timeline
    from etl.watermarks where pipeline = ${pipeline}`;
  return row;
}

/** The safe upper bound of the source, as it is: nothing is judged here. The session must have etl.lag_seconds set. */
export async function readBound(source: Sql): Promise<Bound> {
  const [row] = await source.unsafe<Bound[]>(readFileSync(join(root, "sql/safe_bound.sql"), "utf8"));
  if (!row) throw new Error("sql/safe_bound.sql returned no row");
  return row;
}

/**
 * The window of a run: from the watermark to the safe upper bound. Where somebody holds the bound the window is shorter,
 * or empty: the rows are taken by a later run, never skipped. A re-run by hand reads [FROM, TO), and no further than the bound.
 * @throws Error wherever the bound or the watermark cannot be trusted, with the reason and the remedy.
 */
export async function takeWindow(run: Run, { FROM, TO }: Env<"FROM" | "TO">): Promise<Window> {
  run.window = FROM && TO ? await capAtBound(run.source, FROM, TO) : await watermarkToBound(run);
  const { from, to, holder, holdSeconds } = run.window;
  if (holder) run.log("held", { by: holder, hold_seconds: Math.round(holdSeconds) });
  run.log("window", { from, to });
  return run.window;
}

/**
 * With updated_at = now() an open transaction may yet commit an older updated_at over a newer row; had a re-run past the bound
 * taken that newer row, the upsert would refuse the older one for ever.
 */
async function capAtBound(source: Sql, from: string, to: string): Promise<Window> {
  const bound = await readBound(source);
  checkVisible(bound);
  if (bound.prepared)
    throw new Error(
      `no bound is safe while a transaction is prepared (${bound.prepared}). Finish it, then run this again.`,
    );
  const [cut] = await source<{ to: string; past: boolean }[]>`
    select replace(greatest(${from}::text::timestamptz, least(${to}::text::timestamptz, ${bound.bound}::text::timestamptz))::text, ' ', 'T') as to,
           ${to}::text::timestamptz > ${bound.bound}::text::timestamptz as past`;
  if (!cut?.past) return { from, to, holder: null, holdSeconds: 0 };
  return { from, to: cut.to, bound: bound.bound, holder: bound.holder, holdSeconds: bound.hold_seconds };
}

/** @throws Error where open transactions of the source cannot be seen, so that no bound is safe. */
export function checkVisible(bound: Bound): void {
  const where = `source database ${bound.database}`;
  if (bound.standby) {
    throw new Error(
      `${where} is a standby: transactions open on its primary are not visible there, so no bound is safe. Point SOURCE_DATABASE_URL at the primary.`,
    );
  }
  if (!bound.sees_all) {
    throw new Error(
      `role ${bound.role} may not see when other sessions' transactions began, so no bound is safe. Run as a superuser: grant pg_read_all_stats to ${bound.role};`,
    );
  }
  if (bound.untracked) {
    throw new Error(
      `a session of ${where} is not seen whole (it runs, or ran, with track_activities off, or writes over a replication connection), so its transaction's start is not known and no bound is safe: ${bound.untracked}. Run: alter role … reset track_activities; then end that session (select pg_terminate_backend(pid);).`,
    );
  }
}

async function watermarkToBound({ source, etl, pipeline }: Run): Promise<Window> {
  const stored = await readWatermark(etl, pipeline);
  const bound = await readBound(source);
  checkVisible(bound);
  const where = `source database ${bound.database}`;
  const from = stored?.watermark ?? "-infinity";
  const rewind = `make rewind PIPELINE=${pipeline} TO=…`;
  if (stored && !sameServer(stored, bound)) {
    throw new Error(
      `${where} is not the server that the watermark ${from} was taken from (system identifier ${bound.system_identifier}, timeline ${bound.timeline}; expected ${stored.system_identifier}, ${stored.timeline}): a restore or a failover may have undone rows that were synced. Next: ${rewind} with a time before it.`,
    );
  }
  const [check] = await source<{ clockBack: boolean; late: boolean }[]>`
    select ${from}::text::timestamptz > ${bound.now}::text::timestamptz as "clockBack",
           ${from}::text::timestamptz > ${bound.bound}::text::timestamptz as late`;
  if (check?.clockBack) {
    throw new Error(
      `the clock of ${where} says ${bound.now}, which is before the watermark ${from}: it was set back, or the watermark was set ahead, and rows written meanwhile would be missed. Next: correct the clock, or ${rewind} with a time before it.`,
    );
  }
  if (check?.late && bound.holder) {
    throw new Error(
      `an open transaction of ${where} began before the watermark ${from} and was not seen then, so its rows would be missed (${bound.holder}; began ${bound.bound}). Next: once it has ended, ${rewind.replace("…", bound.bound)}; and raise WATERMARK_LAG_SECONDS.`,
    );
  }
  // A prepared transaction's start is not known (prepared is the time of PREPARE), so nothing can be taken past the watermark.
  // A bound behind the watermark without a holder is a lag that was raised since: the clock will catch up.
  const to = bound.prepared || check?.late ? from : bound.bound;
  return { from, to, identity: bound, holder: bound.prepared ?? bound.holder, holdSeconds: bound.hold_seconds };
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
    const [cut] = await sql.unsafe<{ rows: number; last: string; tied: boolean }[]>(
      `select count(*)::int as rows, regexp_replace(max(c)::text, ' ', 'T') as last, max(c) = current_setting('etl.from')::timestamptz as tied
       from (select ${column} as c from (${select}) q order by ${column} limit ${chunkRows + 1}) head`,
    );
    if (!cut || cut.rows <= chunkRows) return { from, to, rows: cut?.rows ?? 0 };
    if (!cut.tied) return { from, to: cut.last, rows: chunkRows };
    const [next] = await sql.unsafe<{ at: string }[]>(
      `select regexp_replace(${column}::text, ' ', 'T') as at from (${select}) q
       where ${column} > current_setting('etl.from')::timestamptz order by ${column} limit 1`,
    );
    return { from, to: next?.at ?? to, rows: cut.rows };
  });
}

/**
 * Moves the watermark from `chunk.from` to `chunk.to`, if it is still there (compare-and-set). Does nothing in a re-run by hand.
 * @throws Error where another run, or a person, moved it meanwhile.
 */
export async function advance(run: Run, chunk: { from: string; to: string }): Promise<void> {
  const { pipeline, etl, id, window } = run;
  if (!window?.identity) return;
  run.signal.throwIfAborted();
  const { system_identifier, timeline } = window.identity;
  const moved = await etl`
    insert into etl.watermarks as w (pipeline, watermark, system_identifier, timeline, run_id)
    select ${pipeline}, ${chunk.to}::text::timestamptz, ${system_identifier}, ${timeline}, ${id}
    where ${chunk.from}::text = '-infinity' or exists (select from etl.watermarks where pipeline = ${pipeline})
    on conflict (pipeline) do update
      set watermark = excluded.watermark, system_identifier = excluded.system_identifier,
          timeline = excluded.timeline, run_id = excluded.run_id, updated_at = now()
      where w.watermark = ${chunk.from}::text::timestamptz`;
  if (moved.count !== 1) {
    const now = await readWatermark(etl, pipeline);
    throw new Error(
      `another run advanced the watermark of ${pipeline} (expected ${chunk.from}, found ${now?.watermark ?? "none"}): nothing is lost, the rows of this run are upserted. Next: make status`,
    );
  }
  run.watermark = chunk.to;
}
