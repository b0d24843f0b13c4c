/**
 * Where a pipeline's table differs from its source: every row of the source is loaded into a staging table, as a run would load it,
 * and one query of BigQuery compares it with the table. Nothing but counts and the rows that are printed comes back.
 *
 * Why no lock is needed to compare. The watermark W is read first, then the source (one COPY, so one snapshot), then the table.
 * - Every version of a row with a cursor before W was committed when W was computed: that is what makes the bound safe. What a
 *   transaction commits after the snapshot has a cursor at or past W.
 * - So a row that was changed or inserted at the source at any point, and may have been brought by a run at any later point, has on
 *   at least one side a cursor at or past W: it is `new`, the next run's. All others are settled on both sides.
 * - A row that was deleted after the snapshot is on both sides. One that was deleted before it is a true `extra`, unless its cursor
 *   at the table is past W; then the next verify says so.
 * - Only a sweep or a repair removes rows of the table. One that was at work may have removed what was deleted after the snapshot:
 *   where rows are missing and one was, compareTable compares again.
 */
import { bigqueryVariables, isTransient } from "../../../shared/bigquery/client.ts";
import { type Contract, checkSource, type JsonSelect, readContract } from "../../../shared/bigquery/contract.ts";
import {
  address,
  ask,
  change,
  checkKeys,
  createStaging,
  type Destination,
  loadChunk,
  mergeStatement,
  openDestination,
  type Staging,
} from "../../../shared/bigquery/load.ts";
import { apiType, type Field, freeName } from "../../../shared/bigquery/types.ts";
import { type Env, number, optional, UsageError } from "../../../shared/env.ts";
import { progress } from "../../../shared/log.ts";
import { pipelineVariables, type Run, withRetry } from "../../../shared/run.ts";
import { readSelect } from "../../../shared/source.ts";
import { distrust, readBound, readWatermark, type Watermark } from "../../../shared/watermark.ts";

/** The source has it only, the table has it only, both and they differ, the table has it more than once, no run will read it. */
export const kinds = ["missing", "extra", "different", "twice", "unreachable"] as const;
export type Kind = (typeof kinds)[number];

/** A key whose rows are not the same on both sides. */
export interface Difference {
  kind: Kind;
  /** The key for people, such as id=17. */
  name: string;
  /** In which columns, if it is `different`. */
  columns: string[];
  /** The table has a later version than the source, which then went back. */
  newer: boolean;
}

/** Counts are of keys. */
export interface Comparison {
  /** Rows of the source that were compared. */
  rows: number;
  /** At or past the watermark on either side: the next run's. */
  fresh: number;
  counts: Record<Kind, number>;
  newer: number;
  /** The first LIMIT of them, by key. */
  shown: Difference[];
}

export const total = ({ counts }: Comparison): number => kinds.reduce((sum, kind) => sum + counts[kind], 0);

/** What make verify and make sweep read. */
export const verifyVariables = {
  ...pipelineVariables,
  ...bigqueryVariables,
  LIMIT: optional(number(1, 100_000), 20),
};
type TableEnv = Env<typeof verifyVariables>;

/** A pipeline's table, on both sides. */
export interface Table {
  to: Destination;
  /** What sql/NAME.sql reads, and the SELECT of JSON lines around it. */
  select: string;
  lines: JsonSelect;
}

/** The cursor of every pipeline to BigQuery. */
const cursor = "updated_at";

/**
 * The pipeline's table at the source and at the destination, both compared with the contract.
 * @throws UsageError as a run does.
 */
export async function openTable(run: Run, env: TableEnv): Promise<Table> {
  const contract = readContract(run.pipeline);
  const select = readSelect(run.pipeline);
  const [lines, to] = await Promise.all([
    checkSource(run, contract, { table: `public.${run.pipeline}`, cursor, select }),
    openDestination(env, contract, cursor),
  ]);
  return { to, select, lines };
}

/** The watermark. @throws UsageError where there is none: nothing has been synced. */
export async function needWatermark({ etl, pipeline }: Run): Promise<Watermark> {
  const stored = await readWatermark(etl, pipeline);
  if (stored) return stored;
  throw new UsageError(
    `${pipeline} has no watermark: it has never run, and nothing of it is synced. Next: make ${pipeline}`,
  );
}

/** Why the watermark cannot be trusted, in words with the next command, if it cannot. @throws UsageError where there is none. */
export async function distrusted(run: Run): Promise<string | undefined> {
  const stored = await needWatermark(run);
  return distrust(run.pipeline, stored, await readBound(run.source));
}

/**
 * Loads every row of the source into the staging table, whatever its cursor, with the fields of `to.contract`.
 * @returns how many.
 * @throws UsageError where a key comes twice.
 */
export async function stageAll(
  run: Run,
  env: TableEnv,
  to: Destination,
  { select, lines }: Table,
  staging: Staging,
): Promise<number> {
  const url = env.SOURCE_DATABASE_URL;
  const rows = { url, select, lines: (some: string) => lines(some, to.contract.fields) };
  const sent = await loadChunk(run, rows, to, staging, { from: "-infinity", to: "infinity" });
  progress("");
  await checkKeys(run, to, staging);
  return sent.rows;
}

/**
 * Compares the pipeline's table on both sides. @param repairs makes the table's rows what the source has, under the pipeline's lock.
 * @returns also the rows that were written and deleted.
 */
export async function compareTable(
  run: Run,
  env: TableEnv,
  table: Table,
  repairs = false,
): Promise<Comparison & { repaired: number }> {
  const { watermark } = await needWatermark(run);
  const { to } = table;
  const [began] = await run.etl<{ at: string }[]>`select now()::text as at`;
  let repaired = 0;
  const found = await withRetry(run, isTransient, async (attempt) => {
    await using staging = await createStaging(run, to, attempt);
    const rows = await stageAll(run, env, to, table, staging);
    const differing = { ...to, contract: { ...to.contract, fields: differenceFields(to.contract) } };
    await using differences = await createStaging(run, differing, `${attempt}_differences`);
    const tables = [to.table, staging.name, differences.name].map((name) => address(to, name));
    const { insert, after } = verifyStatements(to.contract, tables, to.version, watermark);
    await change(run, to, `etl_${differences.name}_insert`, insert);
    // Read only now: a run that is at work meanwhile writes nothing that is later.
    const [clock] = await run.source<{ at: string }[]>`select clock_timestamp()::text as at`;
    const statements = after(clock?.at ?? "");
    const result = await readDifferences(run, env, to, statements, rows);
    if (!repairs || !total(result)) return result;
    const deleted = await change(run, to, `etl_${differences.name}_delete`, statements.delete);
    const merged = await change(run, to, `etl_${differences.name}_merge`, statements.merge);
    repaired += deleted.deleted + merged.inserted + merged.updated;
    run.log("repaired", { written: merged.inserted + merged.updated, deleted: deleted.deleted });
    return result;
  });
  run.totals.chunks += 1; // the next comparison's tables and jobs have names of their own
  if (repairs) run.totals.rows += repaired;
  else if (found.counts.missing && run.totals.chunks === 1 && (await othersRan(run, began?.at ?? ""))) {
    run.log("again", { because: "another run was at work, and may have removed what is missing" });
    return await compareTable(run, env, table);
  }
  return { ...found, repaired };
}

/** Whether another run by hand, or one that has not ended, was at work since then. */
async function othersRan({ etl, pipeline, id }: Run, since: string): Promise<boolean> {
  const others = await etl`
    select from etl.runs where pipeline = ${pipeline} and run_id <> ${id} and (by_hand or state = 'running')
      and coalesce(finished_at, 'infinity') >= ${since}::text::timestamptz limit 1`;
  return others.count > 0;
}

async function readDifferences(
  run: Run,
  { LIMIT }: TableEnv,
  to: Destination,
  { count, list }: { count: string; list: string },
  loaded: number,
): Promise<Comparison> {
  const { key, fields } = to.contract;
  const counted = await ask<{ kind: string; keys: number; staged: number; newer: number }>(run, to, count);
  const of = (kind: string) => counted.find((one) => one.kind === kind);
  const counts = Object.fromEntries(kinds.map((kind) => [kind, of(kind)?.keys ?? 0])) as Record<Kind, number>;
  const shown = await ask<Record<string, string> & { kind: Kind; newer: boolean }>(run, to, `${list} LIMIT ${LIMIT}`);
  return {
    rows: loaded - (of("new")?.staged ?? 0),
    fresh: of("new")?.keys ?? 0,
    counts,
    newer: counted.reduce((sum, { kind, newer }) => sum + (kind === "new" ? 0 : newer), 0),
    shown: shown.map(({ kind, newer, columns, ...row }) => ({
      kind,
      newer,
      name: key.map((name, index) => `${name}=${row[`k${index}`]}`).join(", "),
      columns: kind === "different" ? (columns ?? "").split(",").map((index) => fields[Number(index)]?.name ?? "") : [],
    })),
  };
}

/** Columns of the table of differences: a row for each row of the table, and for each that it lacks. */
export function differenceFields({ fields, key }: Contract): Field[] {
  const keys = key.map((name, index) => {
    const { type, precision, scale } = fields.find((field) => field.name === name) as Field;
    return { name: `k${index}`, type, mode: "NULLABLE", ...(precision && { precision }), ...(scale && { scale }) };
  });
  const more = {
    in_source: "BOOLEAN",
    in_table: "BOOLEAN",
    staged: "TIMESTAMP",
    version: "TIMESTAMP",
    newer: "BOOLEAN",
    copies: "INTEGER",
    columns: "STRING",
  };
  return [...keys, ...Object.entries(more).map(([name, type]) => ({ name, type, mode: "NULLABLE" }))];
}

/**
 * Whether two values of a field are distinct, of which NULL equals NULL and NaN equals NaN (documented of IS DISTINCT FROM): SQL. JSON,
 * arrays and structs are not comparable; TO_JSON_STRING writes both sides' by one rule, each element in full.
 */
function isDistinct({ type, mode }: Field, a: string, b: string): string {
  const opaque = /^(JSON|GEOGRAPHY|RECORD|STRUCT)$/.test(apiType(type)) || mode.toUpperCase() === "REPEATED";
  return opaque ? `TO_JSON_STRING(${a}) IS DISTINCT FROM TO_JSON_STRING(${b})` : `${a} IS DISTINCT FROM ${b}`;
}

/** Aliases that no field's name meets, and a field or the key of a table by its alias: SQL. */
function naming({ fields, key }: Contract) {
  const at = (of: string, name: string): string => `${of}.\`${name}\``;
  return {
    s: freeName(fields, "s"),
    t: freeName(fields, "t"),
    d: freeName(fields, "d"),
    compared: freeName(fields, "compared"),
    at,
    keys: key.map((_, index) => `k${index}`).join(", "),
    same: (a: string, b: string): string => key.map((name) => `${at(a, name)} = ${at(b, name)}`).join(" AND "),
    differs: (a: string, d: string): string =>
      key.map((name, index) => `${at(a, name)} = ${d}.k${index}`).join(" AND "),
  };
}

/**
 * The statements of a comparison and a repair, for make check too. Their text grows with the columns, their nesting does not.
 * @param tables the table, the staging table and the table of differences, as SQL names them.
 * @returns the statement that compares, and those after it, which need the source's clock as it was then.
 */
export function verifyStatements(
  contract: Contract,
  [table = "", staging = "", differences = ""]: string[],
  version: string,
  watermark: string,
): { insert: string; after(clock: string): Record<"count" | "list" | "delete" | "merge", string> } {
  const { s, t, d, compared, at, keys, differs } = naming(contract);
  const w = `TIMESTAMP '${watermark}'`;
  const insert = `INSERT INTO ${differences} (${keys}, in_source, in_table, staged, version, columns, newer, copies)
SELECT * FROM (
  SELECT *, COALESCE(version > COALESCE(staged, (SELECT MAX(${at(s, version)}) FROM ${staging} AS ${s})), FALSE) AS newer,
    COUNT(*) OVER (PARTITION BY ${keys}) AS copies
  FROM (${comparison(contract, table, staging, version)}) AS compared
) AS counted
WHERE copies > 1 OR NOT in_source OR NOT in_table OR columns <> '' OR staged >= ${w} OR version >= ${w}`;
  const after = (clock: string) => {
    // What the table has twice, and what lies in the future, no run corrects.
    const found = `(SELECT *, CASE WHEN staged > TIMESTAMP '${clock}' THEN 'unreachable' WHEN copies > 1 THEN 'twice'
    WHEN (staged >= ${w} OR version >= ${w}) AND NOT COALESCE(version > TIMESTAMP '${clock}', FALSE) THEN 'new'
    WHEN NOT in_table THEN 'missing' WHEN NOT in_source THEN 'extra' ELSE 'different' END AS kind FROM ${differences})`;
    const each = `SELECT kind, ${keys}, LOGICAL_OR(in_source) AS staged, LOGICAL_OR(newer) AS newer, MAX(columns) AS columns
  FROM ${found} AS f GROUP BY kind, ${keys}`;
    const texts = contract.key.map((name, index) => `${keyText(contract, name, `e.k${index}`)} AS k${index}`);
    const rows = `(
  SELECT ${s}.*, ${d}.version AS ${compared} FROM ${staging} AS ${s} JOIN (
    SELECT ${keys}, MAX(version) AS version FROM ${found} AS f WHERE kind IN ('missing', 'different', 'twice') GROUP BY ${keys}
  ) AS ${d} ON ${differs(s, d)}
)`;
    return {
      count: `SELECT kind, COUNT(*) AS \`keys\`, COUNTIF(staged) AS staged, COUNTIF(newer) AS newer FROM (${each}) AS e GROUP BY kind`,
      list: `SELECT kind, ${texts.join(", ")}, newer, columns
FROM (${each}) AS e WHERE kind <> 'new' ORDER BY ${keys.replaceAll("k", "e.k")}`,
      delete: `DELETE FROM ${table} AS ${t} WHERE EXISTS (
  SELECT 1 FROM ${found} AS ${d}
  WHERE ${differs(t, d)} AND ${d}.version IS NOT DISTINCT FROM ${at(t, version)} AND ${d}.kind IN ('extra', 'twice'))`,
      // After the DELETE no row that was twice is matched, but one that has come since: it has another version, and stays.
      merge: mergeStatement(contract, table, rows, version, compared),
    };
  };
  return { insert, after };
}

/** A row for each pair of rows with the same key. `columns` has the indexes of fields: names would make the text twice as long. */
function comparison(contract: Contract, table: string, staging: string, version: string): string {
  const { s, t, at, same } = naming(contract);
  const { fields, key } = contract;
  const distinct = fields.flatMap((field, index) =>
    key.includes(field.name) ? [] : `IF(${isDistinct(field, at(s, field.name), at(t, field.name))}, '${index}', NULL)`,
  );
  const first = key[0] ?? "";
  return `
    SELECT ${key.map((name, index) => `COALESCE(${at(s, name)}, ${at(t, name)}) AS k${index}`).join(", ")},
      ${at(s, first)} IS NOT NULL AS in_source, ${at(t, first)} IS NOT NULL AS in_table,
      ${at(s, version)} AS staged, ${at(t, version)} AS version,
      COALESCE(ARRAY_TO_STRING([${distinct.join(",\n")}], ','), '') AS columns
    FROM ${staging} AS ${s} FULL OUTER JOIN ${table} AS ${t} ON ${same(s, t)}
  `;
}

/** A key's value for people: SQL. */
function keyText({ fields }: Contract, name: string, value: string): string {
  const bytes = apiType(fields.find((field) => field.name === name)?.type ?? "") === "BYTES";
  return bytes ? `TO_HEX(${value})` : `CAST(${value} AS STRING)`;
}

/**
 * The statements of a sweep, for make check too. A row before the watermark that is not among the staged keys was deleted at the source,
 * whatever happens meanwhile: one that is inserted again has a cursor at or past it.
 * @param tables the table, and the staging table with the keys of the source.
 */
export function sweepStatements(
  contract: Contract,
  [table = "", staging = ""]: string[],
  version: string,
  watermark: string,
): Record<"count" | "list" | "delete", string> {
  const { key } = contract;
  const { s, t, same } = naming(contract);
  const settled = `${t}.\`${version}\` < TIMESTAMP '${watermark}'`;
  const both = `FROM ${table} AS ${t} LEFT JOIN ${staging} AS ${s} ON ${same(s, t)}`;
  const gone = `${settled} AND ${s}.\`${key[0]}\` IS NULL`;
  const name = key.map((column) => keyText(contract, column, `${t}.\`${column}\``)).join(", '/', ");
  return {
    count: `SELECT COUNT(*) AS \`rows\`, COUNTIF(${gone}) AS gone ${both}`,
    list: `SELECT CONCAT(${name}) AS name ${both} WHERE ${gone} ORDER BY name`,
    delete: `DELETE FROM ${table} AS ${t} WHERE ${settled} AND NOT EXISTS (SELECT 1 FROM ${staging} AS ${s} WHERE ${same(s, t)})`,
  };
}
