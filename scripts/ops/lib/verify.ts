/**
 * Where source and destination differ: ranges of the primary key first, by their checksums; then, in those that differ, row by
 * row. And what mends it, by primary key.
 */
import { isTransient } from "../../../shared/bigquery/client.ts";
import { readContract, sourceColumns } from "../../../shared/bigquery/contract.ts";
import {
  compareCounts,
  createStaging,
  type Destination,
  deleteRows,
  labels,
  loadLines,
  mergeStaging,
  openDestination,
} from "../../../shared/bigquery/load.ts";
import { castSelect } from "../../../shared/bigquery/types.ts";
import { copyJsonLines } from "../../../shared/copy.ts";
import { bigquery, type Env, UsageError } from "../../../shared/env.ts";
import { readPosition, wentBack } from "../../../shared/restored.ts";
import { type Run, withRetry } from "../../../shared/run.ts";
import { type Column, readSelect } from "../../../shared/source.ts";
import { type Identity, readBound, readWatermark, sameServer } from "../../../shared/watermark.ts";
import {
  asRead,
  bigqueryLayout,
  bigquerySide,
  type Layout,
  postgresSide,
  type Row,
  rowsOfKeys,
  type Side,
  type Source,
  type Span,
  type Sum,
} from "./checksum.ts";

/** A row as it was read at the destination. */
export interface Version {
  /** Its key in canonical text, and the part of it that ranges are cut by. */
  key: string;
  range: string;
  /** Its cursor in canonical text; null where it is not there. */
  version: string | null;
}

/** A row that is not the same on both sides. */
export interface Difference extends Version {
  /** Its key for people, such as id=17. */
  name: string;
  kind: "missing" | "extra" | "different" | "twice";
  /** In which columns. */
  columns: string[];
  /** The destination has a later version than the source, which then went back. */
  newer: boolean;
}

export interface Comparison {
  /** Rows of the source that were compared, and those that were left out. */
  rows: number;
  leftOut: number;
  ranges: number;
  /** Ranges whose checksums differ. */
  differing: number;
  differences: Difference[];
}

/** Rows of a range that are worth a checksum of their own, and ranges of one query. */
const RANGE_ROWS = 1000;
const RANGES = 400;
/** Rows that are compared one by one at a time. */
const BATCH_ROWS = 20_000;
/** Where there are more, the table is to be loaded anew, not mended. */
const MOST_DIFFERENCES = 100_000;

/**
 * Compares the sides. The destination is always read before the source: a row that arrives meanwhile is then one that the
 * source has left out.
 * @throws Error where more rows differ than can be told one by one.
 */
export async function compare(layout: Layout, source: Source, destination: Side): Promise<Comparison> {
  const result: Comparison = { rows: 0, leftOut: 0, ranges: 0, differing: 0, differences: [] };
  const latest = await source.latest();
  const byRange = async (span: Span): Promise<void> => {
    const bounds = await source.bounds(span, RANGE_ROWS, RANGES);
    const there = await destination.sums(bounds, span);
    const here = await source.sums(bounds, span);
    const edges = [span.low, ...bounds, span.high];
    if (span.low === undefined && span.high === undefined) {
      result.ranges = bounds.length + 1;
      for (const { rows } of here.values()) result.rows += rows;
    }
    let batch = { ranges: [] as number[], rows: 0 };
    const byRow = async (): Promise<void> => {
      const { ranges } = batch;
      batch = { ranges: [], rows: 0 };
      if (!ranges.length) return;
      const part = { low: edges[Math.min(...ranges)], high: edges[Math.max(...ranges) + 1] };
      const there = await destination.rows(bounds, part, ranges);
      result.differences.push(...differences(layout, await source.rows(bounds, part, ranges), there, latest));
      if (result.differences.length > MOST_DIFFERENCES)
        throw new Error(
          `more than ${MOST_DIFFERENCES} rows differ, up to ${result.differences.at(-1)?.name}: the table is to be loaded anew, not mended`,
        );
    };
    for (let range = 0; range <= bounds.length; range++) {
      const [a, b] = [here.get(range) ?? nothing, there.get(range) ?? nothing];
      if (a.rows === b.rows && a.sum === b.sum) continue;
      result.differing += 1;
      const rows = a.rows + b.rows;
      if (rows > 2 * BATCH_ROWS && bounds.length) {
        await byRange({ low: edges[range], high: edges[range + 1] });
        continue;
      }
      if (b.rows > MOST_DIFFERENCES + a.rows)
        throw new Error(
          `the destination has ${b.rows} rows from ${edges[range] ?? "the first key"} to ${edges[range + 1] ?? "the last"}, the source ${a.rows}: the table is to be loaded anew, not mended`,
        );
      if (batch.rows + rows > 2 * BATCH_ROWS) await byRow();
      batch.ranges.push(range);
      batch.rows += rows;
    }
    await byRow();
  };
  await byRange({});
  return result;
}

const nothing: Sum = { rows: 0, sum: 0n };

function differences(layout: Layout, here: Row[], there: Row[], latest: string | null): Difference[] {
  const names = layout.columns.map(({ name }) => name);
  const value = (row: Row, name: string | undefined): string | null => row.values[names.indexOf(name ?? "")] ?? null;
  const found: Difference[] = [];
  /** @param known a version of the source that the destination's should not be later than. */
  const add = (
    kind: Difference["kind"],
    row: Row,
    other?: Row,
    known: string | null = null,
    columns: string[] = [],
  ) => {
    const version = other ? value(other, layout.version) : null;
    found.push({
      key: row.key,
      range: value(row, layout.key[0]) ?? "",
      name: layout.key.map((name) => `${name}=${value(row, name)}`).join(", "),
      kind,
      columns,
      version,
      newer: version !== null && known !== null && /^-?\d+$/.test(known) && BigInt(version) > BigInt(known),
    });
  };
  const destination = Map.groupBy(there, ({ key }) => key);
  for (const row of here) {
    const [other, ...more] = destination.get(row.key) ?? [];
    destination.delete(row.key);
    if (row.leftOut) continue;
    const version = value(row, layout.version);
    const columns = names.filter((_, index) => row.values[index] !== other?.values[index]);
    if (!other) add("missing", row);
    else if (more.length) for (const one of [other, ...more]) add("twice", row, one, version);
    else if (columns.length) add("different", row, other, version, columns);
  }
  for (const rows of destination.values()) for (const row of rows) add("extra", row, row, latest);
  return found;
}

/** What make verify and make sweep read. */
export const verifyVariables = [
  "SOURCE_DATABASE_URL",
  "ETL_DATABASE_URL",
  ...bigquery,
  "PUSHGATEWAY_URL",
  "WATERMARK_LAG_SECONDS",
  "RUN_TIMEOUT_SECONDS",
  "LIMIT",
] as const;
type TableEnv = Env<(typeof verifyVariables)[number]>;

/** A pipeline's table, on both sides. */
export interface Table {
  to: Destination;
  layout: Layout;
  columns: Column[];
  /** What sql/NAME.sql reads. */
  select: string;
  /** All of its rows, whatever their cursor. */
  source: Source;
}

/** For all rows, whatever their cursor: the settings that sql/NAME.sql reads. */
const everything = { "etl.from": "-infinity", "etl.to": "infinity" };

/**
 * The pipeline's table at the source and at the destination, both compared with the contract.
 * @throws UsageError as a run does.
 */
export async function openTable(run: Run, env: TableEnv): Promise<Table> {
  const { pipeline } = run;
  const contract = readContract(pipeline);
  const [cursor, select] = ["updated_at", readSelect(pipeline)];
  const [columns, to] = await Promise.all([
    sourceColumns(run, contract, { table: `public.${pipeline}`, cursor, select }),
    openDestination(env, contract, cursor),
  ]);
  const layout = bigqueryLayout(contract.fields, contract.key, columns, cursor);
  return { to, layout, columns, select, source: postgresSide(run.source, layout, select, "true", everything) };
}

/** The watermark. @throws UsageError where there is none: nothing has been synced. */
async function needWatermark({ etl, pipeline }: Run): Promise<Identity & { watermark: string }> {
  const stored = await readWatermark(etl, pipeline);
  if (stored) return stored;
  throw new UsageError(
    `${pipeline} has no watermark: it has never run, and nothing of it is synced. Next: make ${pipeline}`,
  );
}

/**
 * Whether the source is not what the watermark was taken from, or went back: after a restore or a failover the watermark and rows
 * of the destination may be ahead of it. In words, with the next command.
 * @throws UsageError where there is no watermark.
 */
export async function sourceWentBack(run: Run): Promise<string | undefined> {
  const { source, etl, pipeline } = run;
  const [stored, bound] = await Promise.all([needWatermark(run), readBound(source)]);
  const next = `Next: ops/runbook.md, "After a restore, a failover or a clock set back", with make rewind PIPELINE=${pipeline} TO=…`;
  const where = `source database ${bound.database}`;
  if (!sameServer(stored, bound)) return `${where} is not the server that the watermark was taken from. ${next}`;
  const [clock] = await source<{ back: boolean }[]>`
    select ${stored.watermark}::text::timestamptz > ${bound.now}::text::timestamptz as back`;
  if (clock?.back)
    return `the clock of ${where} says ${bound.now}, which is before the watermark ${stored.watermark}. ${next}`;
  const position = await readPosition(source);
  return position && (await wentBack(etl, pipeline, position));
}

/** Keys that changed since the watermark are left out one by one. */
const MOST_LEFT_OUT = 100_000;
const TRIES = 3;

/**
 * Compares the pipeline's table on both sides, but keys whose updated_at at the source is at or past the watermark: they are the
 * next run's. Begins again where the watermark moved meanwhile.
 */
export async function compareTable(run: Run, { to, layout, select }: Table): Promise<Comparison> {
  for (let tries = 1; ; tries++) {
    const { watermark } = await needWatermark(run);
    const settled = `q."${to.version}" < '${watermark}'::timestamptz`;
    const source = postgresSide(run.source, layout, select, settled, everything);
    const leftOut = await source.leftOut(MOST_LEFT_OUT + 1);
    if (leftOut.length > MOST_LEFT_OUT)
      throw new Error(
        `more than ${MOST_LEFT_OUT} rows of ${run.pipeline} changed since the watermark ${watermark}. Next: make ${run.pipeline}, then make verify PIPELINE=${run.pipeline}`,
      );
    const found = await compare(layout, source, bigquerySide(to, layout, leftOut, labels(run)));
    const { watermark: now } = await needWatermark(run);
    if (now === watermark) return { ...found, leftOut: leftOut.length };
    run.log("again", { because: "the watermark moved meanwhile", from: watermark, to: now });
    if (tries === TRIES)
      throw new Error(
        `the watermark of ${run.pipeline} moved in each of ${TRIES} comparisons: nothing is known. Next: make verify PIPELINE=${run.pipeline} between two runs`,
      );
  }
}

/** Rows of one statement. */
const STATEMENT_ROWS = 5000;

/**
 * Makes rows of the destination what the source has now, in place of what was read there: newer or not. Those that changed at the
 * source since the watermark are left to the next run; those that changed at the destination meanwhile stay. Safe to repeat.
 */
export async function repair(
  run: Run,
  env: TableEnv,
  table: Table,
  found: Difference[],
): Promise<{ written: number; deleted: number }> {
  const { to, layout, columns, select } = table;
  const { fields, key } = to.contract;
  const done = { written: 0, deleted: 0 };
  for (let at = 0; at < found.length; at += STATEMENT_ROWS) {
    const rows = found.slice(at, at + STATEMENT_ROWS);
    const there = rows.filter(({ version }) => version !== null);
    // Rows of a key that is there twice go first; then it is missing.
    const twice = rows.filter(({ kind }) => kind === "twice");
    if (twice.length)
      done.deleted += await withRetry(run, isTransient, () => deleteRows(run, to, asRead(layout, twice)));
    const again = castSelect(run.pipeline, fields, key, rowsOfKeys(layout, select, rows), columns);
    const window = { from: "-infinity", to: (await needWatermark(run)).watermark };
    const written = await withRetry(run, isTransient, async (attempt) => {
      await using staging = await createStaging(run, to, attempt);
      await using lines = await copyJsonLines(env.SOURCE_DATABASE_URL, again, run.session, window);
      const loaded = await loadLines(run, to, staging, lines);
      compareCounts(lines.sent.rows, loaded);
      return await mergeStaging(run, to, staging, asRead(layout, there));
    });
    done.written += written.inserted + written.updated;
    run.totals.chunks += 1;
    done.deleted += await deleteGone(run, table, there);
    run.log("repaired", { ...done });
  }
  run.totals.rows += done.written + done.deleted;
  return done;
}

/** Deletes those of the rows, as they were read at the destination, that the source has not now. */
export async function deleteGone(run: Run, { to, layout, source }: Table, rows: Version[]): Promise<number> {
  let deleted = 0;
  for (let at = 0; at < rows.length; at += STATEMENT_ROWS) {
    const some = rows.slice(at, at + STATEMENT_ROWS);
    const present = await source.present(some);
    const gone = some.filter(({ key }) => !present.has(key));
    if (!gone.length) continue;
    deleted += await withRetry(run, isTransient, () => deleteRows(run, to, asRead(layout, gone)));
  }
  return deleted;
}
