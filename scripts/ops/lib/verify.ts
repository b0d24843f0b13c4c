/**
 * Where a pipeline's table differs from its source: every row of the source is loaded into a staging table, as a run would load it,
 * and BigQuery compares it with the table. Nothing but counts and the rows that are printed comes back.
 *
 * Why no lock is needed to compare. The watermark W is read first, then the source (one COPY, so one snapshot), then the table.
 * - Every version of a row with a cursor before W was committed when W was computed: that is what makes the bound safe. What a
 *   transaction commits after the snapshot has a cursor at or past W.
 * - So a row that was changed or inserted at the source at any point, and may have been brought by a run at any later point, has on
 *   at least one side a cursor at or past W: it is `new`, the next run's. All others are settled on both sides.
 * - A row that was deleted after the snapshot is on both sides. One that was deleted before it is a true `extra`, unless its cursor
 *   at the table is past W; then the next verify says so.
 * - Only a sweep or a repair removes rows of the table. One that is at work beside it may remove what was deleted after the snapshot:
 *   make verify compares again where rows are missing.
 * A repair and a sweep compare again within the statement that writes, so they change only what differs at that moment.
 */
import { bigqueryVariables, isTransient } from "../../../shared/bigquery/client.ts";
import { type Contract, checkSource, readContract } from "../../../shared/bigquery/contract.ts";
import { address, createStaging, execute, loadChunk, mergeStatement, openDestination } from "../../../shared/bigquery/load.ts";
import { apiType, type Field } from "../../../shared/bigquery/types.ts";
import { type Env, number, optional, UsageError } from "../../../shared/env.ts";
import { progress } from "../../../shared/log.ts";
import { onSignal } from "../../../shared/main.ts";
import { type Metrics, pushMetrics } from "../../../shared/metrics.ts";
import { pipelineVariables, type Run, runPipeline, withRetry } from "../../../shared/run.ts";
import { distrust, readBound, readWatermark } from "../../../shared/watermark.ts";

/** The source has it only, the table has it only, both and they differ, the table has it more than once, no run will read it. */
export const kinds = ["missing", "extra", "different", "twice", "unreachable"] as const;
type Kind = (typeof kinds)[number];

/**
 * A key whose rows are not the same on both sides. `name` is for people, such as id=17; `columns` those that are `different`, with commas;
 * `newer` where the table has a later version than the source, which then went back.
 */
interface Difference {
  kind: Kind;
  name: string;
  columns: string;
  newer: boolean;
}

/**
 * How many rows of the source were compared; how many keys are the next run's (`fresh`: at or past the watermark on either side), and of
 * each kind; the first LIMIT of each kind.
 */
export interface Comparison {
  rows: number;
  fresh: number;
  counts: Record<Kind, number>;
  shown: Difference[];
}

export const total = ({ counts }: Comparison): number => kinds.reduce((sum, kind) => sum + counts[kind], 0);

/** What make verify and make sweep read. */
export const verifyVariables = { ...pipelineVariables, ...bigqueryVariables, LIMIT: optional(number(1, 100_000), 20) };
export type VerifyEnv = Env<typeof verifyVariables>;

/**
 * Does `work` as a run by hand of each of the pipelines, past one that fails, until a signal stops it. @param work adds what is wrong, in
 * words. @throws the error of the only one, or Error with all that failed.
 */
export async function eachPipeline(
  command: string,
  env: VerifyEnv & { PIPELINE?: string | undefined },
  all: string[],
  work: (run: Run, wrong: string[]) => Promise<void>,
): Promise<void> {
  let stopped = ""; // a run hears of a signal until it has ended
  onSignal((signal) => {
    stopped = `it was not begun: stopped by ${signal}. Next: make ${command}`;
  });
  const failures: string[] = [];
  for (const pipeline of env.PIPELINE ? [env.PIPELINE] : all) {
    const wrong: string[] = [];
    const working = async (run: Run): Promise<void> => {
      run.next = `the same command begins again. Next: make ${command} PIPELINE=${pipeline}`;
      await work(run, wrong);
    };
    if (stopped) failures.push(`${pipeline}: ${stopped}`);
    else
      await runPipeline(pipeline, { ...env, DRY_RUN: true }, working).catch((error: Error) => {
        if (env.PIPELINE && !wrong.length) throw error;
        failures.push(`${pipeline}: ${error.message}`);
      });
    failures.push(...wrong);
  }
  if (failures.length) throw new Error(failures.join("\n"));
}

/** What can be done with a table beside its source's rows. `deleteExtra` and `repair` return how many rows of the table they changed. */
type Both = { compare(): Promise<Comparison> } & Record<"deleteExtra" | "repair", () => Promise<number>>;

/** Why the watermark cannot be trusted, in words, if it cannot. @throws UsageError where there is none: nothing has been synced. */
export async function distrusted(run: Run): Promise<string | undefined> {
  const { pipeline, etl } = run;
  const stored = await readWatermark(etl, pipeline);
  if (stored) return await distrust(run, stored, await readBound(run.source));
  throw new UsageError(`${pipeline} has no watermark: it has never run, and nothing of it is synced. Next: make ${pipeline}`);
}

/**
 * Checks the source and the table as a run does, and loads every row of the source, whatever its cursor, into a staging table.
 * @param columns which are compared; the key and the cursor are enough to find rows that the source no longer has.
 */
export async function beside<T>(run: Run, env: VerifyEnv, columns: "all" | "key", work: (both: Both) => Promise<T>): Promise<T> {
  const contract = readContract(run.pipeline);
  const [from, table] = await Promise.all([checkSource(run, contract), openDestination(env, contract)]);
  const fields = contract.fields.filter(({ name }) => columns === "all" || [...contract.key, contract.source.cursor].includes(name));
  const to = { ...table, contract: { ...contract, fields } };
  run.totals.chunks += 1; // so that the tables and jobs of each comparison have their own names
  return await withRetry(run, isTransient, async (attempt) => {
    const watermark = (await readWatermark(run.etl, run.pipeline))?.watermark ?? "";
    // What a run at work beside this one may bring until this has ended is no row of the future.
    const [clock] = await run.source<{ at: string }[]>`
      select (clock_timestamp() + make_interval(secs => ${env.RUN_TIMEOUT_SECONDS}))::text as at`;
    await using staging = await createStaging(run, to, attempt);
    const { rows } = await loadChunk(run, from, staging, { from: "-infinity", to: "infinity" });
    progress("");
    const tables = { table: address(to, run.pipeline), staging: address(to, staging.name) };
    const sql = verifyStatements(to.contract, tables, { watermark, clock: clock?.at ?? "", shown: env.LIMIT });
    let comparisons = 0;
    const job = (name: string): string => `etl_${staging.name}_${name}`;
    return await work({
      compare: async () => {
        const jobId = job(`compare_${++comparisons}`);
        await execute(run, to, jobId, sql.compare);
        const [found] = await to.bigquery.job(jobId).getQueryResults();
        return comparison(rows, found);
      },
      deleteExtra: async () => (await execute(run, to, job("delete"), sql.deleteExtra)).deleted,
      repair: async () => {
        const { deleted } = await execute(run, to, job("delete"), sql.deleteWrong);
        const { inserted, updated } = await execute(run, to, job("merge"), sql.merge);
        run.log("repaired", { written: inserted + updated, deleted });
        return inserted + updated + deleted;
      },
    });
  });
}

/** A row of the comparison: a key, and how many keys of its kind there are, of which `staged` are at the source. */
export type Found = (Difference | { kind: "new" }) & { total: number; staged: number };

export function comparison(rows: number, found: Found[]): Comparison {
  const of = (kind: string) => found.find((one) => one.kind === kind);
  const counts = Object.fromEntries(kinds.map((kind) => [kind, of(kind)?.total ?? 0])) as Comparison["counts"];
  const shown = found.filter((one) => one.kind !== "new");
  return { rows: rows - (of("new")?.staged ?? 0), fresh: of("new")?.total ?? 0, counts, shown };
}

/**
 * SQL: whether two values of a field are distinct; NULL equals NULL, and NaN NaN (documented of IS DISTINCT FROM). JSON, arrays and structs
 * are not comparable; TO_JSON_STRING writes both sides' by one rule.
 */
function isDistinct({ type, mode }: Field, a: string, b: string): string {
  const opaque = /^(JSON|GEOGRAPHY|RECORD|STRUCT)$/.test(apiType(type)) || mode.toUpperCase() === "REPEATED";
  return opaque ? `TO_JSON_STRING(${a}) IS DISTINCT FROM TO_JSON_STRING(${b})` : `${a} IS DISTINCT FROM ${b}`;
}

/**
 * The statements of a comparison, a repair and a sweep, for make check too. Their text grows with the columns, their nesting does not.
 * @param limits the watermark, a time of the source that no run reaches before the statements are done, and keys to show of each kind.
 */
export function verifyStatements(
  contract: Contract,
  { table, staging }: { table: string; staging: string },
  { watermark, clock, shown }: { watermark: string; clock: string; shown: number },
) {
  const { key, fields, source } = contract;
  const [s, t, d, compared] = ["etl__s", "etl__t", "etl__d", "etl__compared"]; // no field has such a name
  const at = (alias: string, name: string): string => `${alias}.\`${name}\``;
  const [staged, version, first] = [at(s, source.cursor), at(t, source.cursor), key[0] ?? ""];
  const keys = key.map((_, index) => `k${index}`).join(", ");
  const same = (alias: string) => key.map((name, index) => `${at(alias, name)} = ${d}.k${index}`).join(" AND ");
  const distinct = fields.flatMap((field) =>
    key.includes(field.name) ? [] : `IF(${isDistinct(field, at(s, field.name), at(t, field.name))}, '${field.name}', NULL)`,
  );
  const columns = `COALESCE(ARRAY_TO_STRING([${distinct.join(",\n")}], ', '), '')`;
  const each = (columns: string): string => `(SELECT *, CASE
  WHEN staged > TIMESTAMP '${clock}' THEN 'unreachable'
  WHEN (staged >= TIMESTAMP '${watermark}' OR version >= TIMESTAMP '${watermark}')
    AND NOT COALESCE(version > TIMESTAMP '${clock}', FALSE) THEN 'new'
  WHEN copies > 1 THEN 'twice' WHEN NOT in_table THEN 'missing' WHEN NOT in_source THEN 'extra'
  WHEN columns <> '' THEN 'different' ELSE 'same' END AS kind
FROM (
  SELECT ${keys}, COUNT(*) AS copies, LOGICAL_OR(in_source) AS in_source, LOGICAL_OR(in_table) AS in_table,
    MAX(staged) AS staged, MAX(version) AS version, MAX(columns) AS columns
  FROM (
    SELECT ${key.map((name, index) => `COALESCE(${at(s, name)}, ${at(t, name)}) AS k${index}`).join(", ")},
      ${at(s, first)} IS NOT NULL AS in_source, ${at(t, first)} IS NOT NULL AS in_table,
      ${staged} AS staged, ${version} AS version, ${columns} AS columns
    FROM ${staging} AS ${s} FULL OUTER JOIN ${table} AS ${t}
    ON ${key.map((name) => `${at(s, name)} = ${at(t, name)}`).join(" AND ")}
  ) AS pairs GROUP BY ${keys}
) AS keys)`;
  const deletes = (of: string): string => `DELETE FROM ${table} AS ${t} WHERE EXISTS (
  SELECT 1 FROM ${each("''")} AS ${d} WHERE ${same(t)} AND ${d}.kind IN (${of}))`;
  const rows = `(SELECT ${s}.*, ${d}.version AS ${compared} FROM ${staging} AS ${s}
  JOIN ${each(columns)} AS ${d} ON ${same(s)} WHERE ${d}.kind IN ('missing', 'different'))`;
  const order = keys.replaceAll("k", "found.k");
  const bytes = (name: string): boolean => fields.some((field) => field.name === name && apiType(field.type) === "BYTES");
  const texts = key.map((name, index) => `'${name}=' || ${bytes(name) ? `TO_HEX(k${index})` : `CAST(k${index} AS STRING)`}`);
  return {
    compare: `SELECT kind, ${texts.join(" || ', ' || ")} AS name, columns,
  COALESCE(version > COALESCE(staged, (SELECT MAX(${staged}) FROM ${staging} AS ${s})), FALSE) AS newer,
  COUNT(*) OVER kinds AS total, COUNTIF(in_source) OVER kinds AS staged
FROM ${each(columns)} AS found
WHERE kind <> 'same' QUALIFY ROW_NUMBER() OVER (PARTITION BY kind ORDER BY ${order}) <= ${shown}
WINDOW kinds AS (PARTITION BY kind) ORDER BY ${order}`,
    deleteExtra: deletes("'extra'"),
    deleteWrong: deletes("'extra', 'twice'"),
    // After the DELETE the keys that were twice are missing.
    merge: mergeStatement(contract, table, rows, compared),
  };
}

/**
 * Pushes how much differs, and where nothing does the time; a Pushgateway that is away costs a warning. Records the proof for make report.
 * @param rows that were compared. @param differences rows, of events days, that differ. @param found the same in words.
 */
export async function recordVerified(run: Run, url: string, rows: number, differences: number, found: string | null): Promise<void> {
  const { pipeline, etl, totals } = run;
  const values: Metrics = { etl_verify_differences: differences };
  if (!differences) values.etl_verify_last_success_timestamp_seconds = Date.now() / 1000;
  await pushMetrics(url, pipeline, values, { command: "verify" }).catch(({ message }: Error) =>
    run.log("warning", { warning: "the metrics were not pushed", error: message }),
  );
  await etl`
    insert into etl.verifications (pipeline, rows, differences, found, bytes_billed)
    values (${pipeline}, ${rows}, ${differences}, ${found}, ${totals.bytes_billed})`;
}
