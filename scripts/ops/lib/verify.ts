/**
 * Where a pipeline's table differs from its source: every row of the source is loaded into a staging table, as a run would load it,
 * and BigQuery compares it with the table. Nothing but counts and the rows that are printed comes back.
 *
 * No lock is needed to compare. The watermark W is read first, then the source (one COPY, so one snapshot), then the table. Every version
 * of a row with a cursor before W was committed when W was computed; what is committed after the snapshot has one at or past W. So a row
 * that changed meanwhile has one at or past W on at least one side: it is `new`. All others are settled, unless a sweep or a repair beside
 * this removes them. Those two compare again in the statement that writes, so they change only what differs at that moment.
 */
import { bigqueryVariables, withRetry } from "../../../shared/bigquery/client.ts";
import { type Contract, checkSource, readContract } from "../../../shared/bigquery/contract.ts";
import { address, createStaging, execute, loadChunk, openDestination } from "../../../shared/bigquery/load.ts";
import { apiType, type Field } from "../../../shared/bigquery/types.ts";
import { type Env, number, optional, UsageError } from "../../../shared/env.ts";
import { progress, thousands } from "../../../shared/log.ts";
import { onSignal } from "../../../shared/main.ts";
import { orWarn, pushMetrics } from "../../../shared/metrics.ts";
import { pipelineVariables, type Run, runPipeline } from "../../../shared/run.ts";
import { distrust, readBound, readWatermark } from "../../../shared/watermark.ts";

/** The next run's, which is no difference; only at the source; only in the table; in both, not the same; more than once; of the future. */
export const kinds = ["new", "missing", "extra", "different", "twice", "unreachable"] as const;
type Kind = (typeof kinds)[number];

/** How many rows the source has, how many keys are of each kind, and the first LIMIT of each. */
export type Comparison = { rows: number; counts: Record<Kind, number>; shown: Found[] };
/** `name`: such as id=17. `columns`: those that are different, with commas. `total`: how many keys there are of this kind. */
export type Found = { kind: Kind; name: string; columns: string; total: number };

export function comparison(rows: number, found: Found[]): Comparison {
  const total = (kind: Kind): number => found.find((one) => one.kind === kind)?.total ?? 0;
  const counts = Object.fromEntries(kinds.map((kind) => [kind, total(kind)])) as Comparison["counts"];
  return { rows, counts, shown: found.filter(({ kind }) => kind !== "new") };
}

/** The differences. */
export const total = ({ counts }: Comparison): number => kinds.reduce((sum, kind) => sum + counts[kind], -counts.new);

/** How many rows differ, with the first of each kind. */
export function describe(where: string, found: Comparison): string {
  const lines = found.shown.map(({ kind, name, columns }) => `  ${kind.padEnd(11)}  ${name}${kind === "different" ? `: ${columns}` : ""}`);
  const more = total(found) - lines.length;
  if (more) lines.push(`  … and ${thousands(more)} more (LIMIT=)`);
  return [`${thousands(total(found))} rows of ${where} differ:`, ...lines].join("\n");
}

/** What make verify and make sweep read. */
export const verifyVariables = { ...pipelineVariables, ...bigqueryVariables, LIMIT: optional(number(1, 100_000), 20) };
export type VerifyEnv = Env<typeof verifyVariables> & { PIPELINE?: string | undefined };

/**
 * Does `work` as a run by hand of each of the pipelines, past one that fails, until a signal stops it.
 * @throws the error of the only one, or Error with all that failed.
 */
export async function eachPipeline(command: string, env: VerifyEnv, all: string[], work: (run: Run) => Promise<void>): Promise<void> {
  const failures: string[] = [];
  const stopped = new AbortController();
  onSignal(() => stopped.abort());
  for (const pipeline of env.PIPELINE ? [env.PIPELINE] : all) {
    if (stopped.signal.aborted) break;
    const working = (run: Run): Promise<void> => {
      run.next = `the same command begins again. Next: make ${command} PIPELINE=${pipeline}`;
      return work(run);
    };
    await runPipeline(pipeline, { ...env, DRY_RUN: true }, working).catch((error: Error) => {
      if (env.PIPELINE) throw error;
      failures.push(`${pipeline}: ${error.message}`);
    });
  }
  if (failures.length) throw new Error(failures.join("\n"));
}

/** The kinds that are written. A key that is twice is deleted, and then missing. */
const written = { compare: [], repair: ["missing", "extra", "different", "twice"], sweep: ["extra"] };

/** `write` makes the table's rows the source's, where they are of a kind that it may change. @returns how many it changed. */
type Both = { compare(): Promise<Comparison>; write(): Promise<number> };

/**
 * Checks the source and the table as a run does, and loads every row of the source, whatever its cursor, into a staging table.
 * @param purpose of a sweep the key and the cursor are enough.
 * @throws UsageError where nothing is synced yet, or it would write from a source that is not the one that was synced.
 */
export async function beside<T>(run: Run, env: VerifyEnv, purpose: keyof typeof written, work: (both: Both) => Promise<T>): Promise<T> {
  const { pipeline, etl } = run;
  const stored = await readWatermark(etl, pipeline);
  if (!stored) throw new UsageError(`${pipeline} has no watermark: it has never run, and nothing of it is synced. Next: make ${pipeline}`);
  const distrusted = await distrust(run, stored, await readBound(run.source));
  if (distrusted && purpose !== "compare") throw new UsageError(`nothing was written or deleted: ${distrusted}`);
  if (distrusted) run.log("warning", { warning: distrusted });
  const contract = readContract(pipeline);
  const [from, table] = await Promise.all([checkSource(run, contract), openDestination(env, contract)]);
  const fields = contract.fields.filter(({ name }) => purpose !== "sweep" || [...contract.key, contract.source.cursor].includes(name));
  const to = { ...table, contract: { ...contract, fields } };
  run.totals.chunks += 1; // so that the tables and jobs of each comparison have their own names
  return await withRetry(run, async (attempt) => {
    await using staging = await createStaging(run, to, attempt);
    const { rows } = await loadChunk(run, from, staging, { from: "-infinity", to: "infinity" });
    progress("");
    const tables = { table: address(to, pipeline), staging: address(to, staging.name) };
    const limits = { watermark: stored.watermark, seconds: env.RUN_TIMEOUT_SECONDS, shown: env.LIMIT, written: written[purpose] };
    const sql = verifyStatements(to.contract, { ...tables, ...limits });
    let jobs = 0;
    const job = (name: string): string => `etl_${staging.name}_${name}_${++jobs}`;
    return await work({
      compare: async () => {
        const jobId = job("compare");
        await execute(run, to, jobId, sql.compare);
        const [found] = await to.bigquery.job(jobId).getQueryResults();
        return comparison(rows, found);
      },
      write: async () => {
        const { inserted, updated, deleted } = await execute(run, to, job("write"), sql.write);
        return inserted + updated + deleted;
      },
    });
  });
}

/** NULL equals NULL, and NaN NaN. Of what is not comparable TO_JSON_STRING writes both sides' value by one rule. */
function isDistinct({ name, type, mode }: Field): string {
  const isOpaque = /^(JSON|GEOGRAPHY|RECORD|STRUCT)$/.test(apiType(type)) || mode.toUpperCase() === "REPEATED";
  const [s, t] = ["s", "t"].map((side) => (isOpaque ? `TO_JSON_STRING(etl__${side}.\`${name}\`)` : `etl__${side}.\`${name}\``));
  return `${s} IS DISTINCT FROM ${t}`;
}

/** `seconds` a run may take: what one beside this brings is not of the future. `shown` keys of each kind. The kinds that are `written`. */
type Limits = Record<"table" | "staging" | "watermark", string> & Record<"seconds" | "shown", number> & { written: string[] };

/** The statements of a comparison, and of a repair or a sweep, for make check too. No field's name begins with etl__. */
export function verifyStatements({ key, fields, source }: Contract, limits: Limits) {
  const { table, staging, watermark, seconds, shown, written } = limits;
  const list = (names: string[], each = (name: string) => `\`${name}\``, separator = ", "): string => names.map(each).join(separator);
  const [keys, [first = ""], cursor] = [list(key), key, `\`${source.cursor}\``];
  const names = fields.map(({ name }) => name);
  const values = fields.filter(({ name }) => !key.includes(name));
  const differ = values.map((field) => `IF(${isDistinct(field)}, '${field.name}', NULL)`);
  const future = `TIMESTAMP_ADD(CURRENT_TIMESTAMP(), INTERVAL ${Math.ceil(seconds)} SECOND)`;
  const each = `(SELECT *, CASE
  WHEN etl__staged > ${future} THEN 'unreachable'
  WHEN (etl__staged >= TIMESTAMP '${watermark}' OR etl__version >= TIMESTAMP '${watermark}')
    AND NOT COALESCE(etl__version > ${future}, FALSE) THEN 'new'
  WHEN etl__copies > 1 THEN 'twice' WHEN NOT etl__in_table THEN 'missing' WHEN NOT etl__in_source THEN 'extra'
  WHEN etl__columns <> '' THEN 'different' ELSE 'same' END AS etl__kind
FROM (
  SELECT ${keys}, COUNT(*) AS etl__copies, MAX(etl__s.${cursor}) AS etl__staged, MAX(etl__t.${cursor}) AS etl__version,
    LOGICAL_OR(etl__s.\`${first}\` IS NOT NULL) AS etl__in_source, LOGICAL_OR(etl__t.\`${first}\` IS NOT NULL) AS etl__in_table,
    MAX(COALESCE(ARRAY_TO_STRING([${differ.join(",\n")}], ', '), '')) AS etl__columns
  FROM ${staging} AS etl__s FULL OUTER JOIN ${table} AS etl__t USING (${keys}) GROUP BY ${keys}
) AS etl__keys)`;
  const text = (name: string): string => `'${name}=' || TO_JSON_STRING(\`${name}\`)`;
  return {
    compare: `SELECT etl__kind AS kind, ${list(key, text, " || ', ' || ")} AS name, etl__columns AS columns,
  COUNT(*) OVER (PARTITION BY etl__kind) AS total
FROM ${each} AS etl__found
WHERE etl__kind <> 'same' QUALIFY ROW_NUMBER() OVER (PARTITION BY etl__kind ORDER BY ${keys}) <= ${shown} ORDER BY ${keys}`,
    write: `MERGE ${table} AS etl__t
USING (
  SELECT ${list(names)}, etl__kind FROM ${each} AS etl__found LEFT JOIN ${staging} AS etl__s USING (${keys})
  WHERE etl__kind IN (${list(written, (kind) => `'${kind}'`)})
) AS etl__s ON ${list(key, (name) => `etl__t.\`${name}\` = etl__s.\`${name}\``, " AND ")}
WHEN MATCHED AND etl__kind = 'different' THEN UPDATE SET ${values.map(({ name }) => `\`${name}\` = etl__s.\`${name}\``).join(", ")}
WHEN MATCHED AND etl__kind IN ('extra', 'twice') THEN DELETE
WHEN NOT MATCHED AND etl__kind = 'missing' THEN INSERT (${list(names)}) VALUES (${list(names, (name) => `etl__s.\`${name}\``)})`,
  };
}

/** Pushes and records how many rows, of events days, differ, and the time where none does. @param found the same in words. */
export async function recordVerified(run: Run, url: string, rows: number, differences: number, found: string | null): Promise<void> {
  const { pipeline, etl, totals } = run;
  const success = differences ? {} : { etl_verify_last_success_timestamp_seconds: Date.now() / 1000 };
  const pushed = pushMetrics(url, pipeline, { etl_verify_differences: differences, ...success }, { command: "verify" });
  await orWarn("the metrics were not pushed", pushed);
  await etl`
    insert into etl.verifications (pipeline, rows, differences, found, bytes_billed)
    values (${pipeline}, ${rows}, ${differences}, ${found}, ${totals.bytes_billed})`;
}
