/**
 * The watermark: where a pipeline is, how far it may go, and in which steps.
 *
 * A window is half-open: `from` is the watermark, inclusive; `to` becomes the watermark, exclusive. Timestamps are text of a fixed width
 * in UTC with microseconds, from end to end, so that two of them compare as text; '-infinity', before the first run, is less than each.
 */
import type { Sql } from "postgres";
import type { Run } from "./run.ts";
import { queryFile, queryWith, quote, utc, type Window } from "./session.ts";
import type { Source } from "./source.ts";

/**
 * What a watermark belongs to: after a restore, a failover, or at another table it may mean nothing. Server and WAL position (see
 * sql/history.sql), the database's oid (one that was created again has another), the table written to; null where it is not known.
 */
type Origin = Record<"server" | "database_oid" | "wal" | "destination", string | null>;

type Watermark = Origin & { watermark: string };

/** A row of sql/safe_bound.sql, which says what the fields mean, and of sql/history.sql. `unknown`: why the server does not tell these. */
type Bound = Omit<Origin, "destination"> &
  Record<"database" | "now" | "bound", string> &
  Record<"refusal" | "holder", string | null> & { hold_seconds: number; unknown?: string };

/** A table that a pipeline writes to: its name and time of creation; its rows; what it is written from. */
export type Target = { identity: string; rows: number; contract: { source: Source } };

/** About how many rows; 0 is exact. A row that changes before it is read belongs to a later window. */
export type Chunk = Window & { rows: number };

/** The pipeline's watermark, or undefined before its first run. */
export async function readWatermark(etl: Sql, pipeline: string): Promise<Watermark | undefined> {
  const query = `select ${utc("watermark")} as watermark, server, database_oid, wal, destination from etl.watermarks where pipeline = $1`;
  return (await etl.unsafe<Watermark[]>(query, [pipeline]))[0];
}

/**
 * The safe upper bound of the source. The session must have etl.lag_seconds set.
 * @throws Error where open transactions cannot be seen, so that no bound is safe.
 */
export async function readBound(source: Sql): Promise<Bound> {
  const [bound] = (await queryFile(source, "safe_bound", {})) as [Bound];
  if (bound.refusal) throw new Error(`source database ${bound.database}: no bound is safe: ${bound.refusal}`);
  const told = await queryFile(source, "history", {}).catch((error: Error & { code?: string }) => {
    if (!/^(42501|42883|0A000|55000)$/.test(error.code ?? "")) throw error; // a managed server may refuse these functions, or lack them
    return [{ server: null, wal: null, unknown: error.message }];
  });
  return { ...bound, ...told[0] };
}

/**
 * Whether a watermark may be trusted: the one rule of run, status, verify, sweep and rewind.
 * @param target the table that rows are written to, where they go to one.
 * @returns why not, in words with the next command, or undefined.
 */
export async function distrust({ pipeline, source }: Pick<Run, "pipeline" | "source">, stored: Watermark, bound: Bound, target?: Target) {
  const [where, at] = [`source database ${bound.database}`, `the watermark ${stored.watermark}`];
  const rewind = `make rewind PIPELINE=${pipeline} TO=`;
  const guide = `ops/runbook.md, "After a restore, a failover or a clock set back", with ${rewind}…`;
  const restored = `it was restored or failed over, and rows that were synced since may be gone there. Next: ${guide}`;
  const [expected, found] = [stored, bound].map(({ server, database_oid }) => `server ${server}, oid ${database_oid}`);
  const other = (a: string | null, b: string | null): boolean => Boolean(a && b && a !== b);
  if (other(stored.server, bound.server) || other(stored.database_oid, bound.database_oid))
    return `${where} is another one than ${at} was taken from (expected ${expected}, found ${found}): ${restored}`;
  if (stored.wal && bound.wal && stored.wal > bound.wal)
    return `${where} went back: its WAL ends at ${bound.wal}, and was at ${stored.wal} when ${at} was set: ${restored}`;
  if (stored.watermark > bound.now)
    return `the clock of ${where} says ${bound.now}, which is before ${at}: it was set back, or that ahead. Next: correct it, or ${guide}`;
  const late = `once it has ended, ${rewind}${bound.bound}; and raise WATERMARK_LAG_SECONDS`;
  if (stored.watermark > bound.bound && bound.holder && bound.bound !== "-infinity")
    return `an open transaction of ${where} began before ${at} and was not seen then, at ${bound.bound} (${bound.holder}). Next: ${late}`;
  if (!target) return undefined;
  const replaced = other(stored.destination, target.identity) && `it is another one than ${at} was written to (${stored.destination})`;
  const before = { "etl.from": "-infinity", "etl.to": stored.watermark };
  const anyRow = `select from (${target.contract.source.select}) q limit 1`;
  const emptied = target.rows === 0 && (await queryWith(source, before, anyRow)).length > 0;
  const missing = replaced || (emptied && `it is empty, and the source has rows before ${at}`);
  return missing ? `destination table ${target.identity}: ${missing}. Run: ${rewind}0001-01-01; it reads every row again` : undefined;
}

/**
 * The window of a run: from the watermark to the safe upper bound. Where somebody holds the bound the window is shorter, or empty: a
 * later run takes the rows, and none is skipped. A re-run by hand reads [FROM, TO), and no further than the bound: past it an open
 * transaction may yet commit an older updated_at over a newer row, which the upsert would refuse for ever, had the re-run taken that.
 * @throws Error wherever the bound or the watermark cannot be trusted, with the reason and the next command.
 */
export async function takeWindow(run: Run, asked: { FROM?: string | undefined; TO?: string | undefined }, target?: Target) {
  const stored = await readWatermark(run.etl, run.pipeline);
  const bound = await readBound(run.source); // after it: a run beside this one may move the watermark up to a later bound
  const reason = stored && (await distrust(run, stored, bound, target));
  if (reason) throw new Error(reason);
  const unknown = "the server does not tell its history, so that a restore or a failover is not noticed";
  if (bound.unknown) run.log("warning", { warning: `${unknown}: ${bound.unknown}` });
  const { FROM: from = stored?.watermark ?? "-infinity", TO = bound.bound } = asked;
  const end = TO < bound.bound ? TO : bound.bound;
  const early = `may not be read yet: the safe bound is ${bound.bound} (${bound.holder ?? "no transaction is open"})`;
  if (asked.FROM && end < from) throw new Error(`what changed from ${from} on ${early}. Run this again once it is later`);
  const to = end < from ? from : end; // a bound behind the watermark without a holder is a lag that was raised: the clock will catch up
  if (bound.holder && to >= bound.bound) run.log("held", { by: bound.holder, hold_seconds: Math.round(bound.hold_seconds) });
  run.log("window", { from, to });
  run.window = { from, to };
  run.metrics.etl_watermark_hold_seconds = bound.hold_seconds;
  return { from, to, origin: { ...bound, destination: target?.identity ?? null } };
}

/**
 * Cuts [from, to) into chunks of at most `chunkRows` rows, each when the one before is done: it ends at the cursor of the row after them,
 * and where that equals its start, at the next distinct one, since one timestamp is never split.
 */
export async function* cutChunks(run: Run, { select, cursor }: Source, { from, to }: Window, chunkRows: number): AsyncGenerator<Chunk> {
  const column = quote(cursor);
  const [first, end] = ["etl.from", "etl.to"].map((name) => `current_setting('${name}')::timestamptz`);
  const cut = `case when count(*) <= ${chunkRows} then ${end} when max(c) > ${first} then max(c)
    else coalesce((select min(${column}) from q where ${column} > ${first}), ${end}) end`;
  const query = `
    with q as not materialized (${select}), head as materialized (select ${column} as c from q order by 1 limit ${chunkRows + 1})
    select least(count(*), ${chunkRows})::int as rows, ${utc(cut)} as to from head`;
  for (let start = from; start < to; ) {
    const [chunk] = (await queryWith(run.source, { "etl.from": start, "etl.to": to }, query)) as [Omit<Chunk, "from">];
    yield { from: start, ...chunk };
    start = chunk.to;
  }
}

/**
 * Moves the watermark from `chunk.from` to `chunk.to`, if it is still there (compare-and-set). Does nothing in a re-run by hand.
 * @throws Error where another run, or a person, moved it meanwhile.
 */
export async function advance(run: Run, { from, to }: Window, origin: Origin): Promise<void> {
  const { pipeline, etl, id } = run;
  if (run.byHand) return;
  run.signal.throwIfAborted();
  const moved = await etl`
    insert into etl.watermarks as w (pipeline, watermark, server, database_oid, wal, destination, run_id)
    select ${pipeline}, ${to}::text::timestamptz, ${origin.server}, ${origin.database_oid}, ${origin.wal}, ${origin.destination}, ${id}
    where ${from}::text = '-infinity' or exists (select from etl.watermarks where pipeline = ${pipeline})
    on conflict (pipeline) do update
      set watermark = excluded.watermark, server = excluded.server, database_oid = excluded.database_oid,
          wal = excluded.wal, destination = excluded.destination, run_id = excluded.run_id, updated_at = now()
      where w.watermark = ${from}::text::timestamptz`;
  if (moved.count !== 1) {
    const found = (await readWatermark(etl, pipeline))?.watermark ?? "none";
    const kept = "nothing is lost, the rows of this run are upserted. Next: make status";
    throw new Error(`another run moved the watermark of ${pipeline} (expected ${from}, found ${found}): ${kept}`);
  }
  run.watermark = to;
  run.metrics.etl_watermark_timestamp_seconds = Date.parse(to.replace("+00", "Z")) / 1000;
}
