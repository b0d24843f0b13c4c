/**
 * BigQuery: a staging table per chunk and attempt, a streamed load job, and one MERGE by primary key.
 */
import { pipeline } from "node:stream/promises";
import type { BigQuery, Job } from "@google-cloud/bigquery";
import type { RowStream } from "../copy.ts";
import { UsageError } from "../env.ts";
import { progress, thousands } from "../log.ts";
import type { Run } from "../run.ts";
import { type BigQueryEnv, connectBigQuery, ignoreAlreadyThere, SHORT_LOAD } from "./client.ts";
import { type Contract, checkDestination } from "./contract.ts";
import { freeName } from "./types.ts";

/** A staging table that its run did not drop (killed, cut off) is deleted by BigQuery after this time. */
const STAGING_HOURS = 24;

/** A destination table, with what is needed to address it. */
export interface Destination {
  bigquery: BigQuery;
  contract: Contract;
  dataset: string;
  table: string;
  /** The column that says which of two versions of a row is newer. */
  version: string;
}

/**
 * The pipeline's table, compared with its contract.
 * @throws UsageError where it is not there or differs.
 */
export async function openDestination(env: BigQueryEnv, contract: Contract, version: string): Promise<Destination> {
  const bigquery = connectBigQuery(env);
  const dataset = env.BIGQUERY_DATASET;
  const table = contract.pipeline;
  const asked = bigquery.dataset(dataset).table(table).getMetadata();
  const [metadata] = await asked.catch(({ code, message }: { code?: number; message: string }) => {
    if (code === 404) {
      throw new UsageError(
        `destination table ${env.BIGQUERY_PROJECT}.${dataset}.${table} does not exist. Run: make migrate`,
      );
    }
    const at = env.BIGQUERY_ENDPOINT ? "BIGQUERY_ENDPOINT" : "BIGQUERY_PROJECT and the Google credentials";
    throw new Error(
      `cannot read the destination table ${dataset}.${table}: ${message}. Check ${at}; for the local stack: make up`,
    );
  });
  checkDestination(contract, `${dataset}.${table}`, metadata.schema?.fields ?? []);
  return { bigquery, contract, dataset, table, version };
}

export interface Staging extends AsyncDisposable {
  name: string;
}

/**
 * Creates the staging table of one attempt, with the contract's fields and an expiry. It is dropped when the attempt ends,
 * well or not; where that fails it is left to its expiry.
 */
export async function createStaging(run: Run, to: Destination, attempt: number | string): Promise<Staging> {
  const name = `${to.table}_staging_${run.id}_${run.totals.chunks + 1}_${attempt}`;
  const table = to.bigquery.dataset(to.dataset).table(name);
  const created = table.create({
    description: `Rows of run ${run.id} on their way to ${to.table}. Nothing reads it; it deletes itself.`,
    schema: { fields: to.contract.fields },
    expirationTime: String(Date.now() + STAGING_HOURS * 3_600_000),
  });
  await created.catch(ignoreAlreadyThere);
  return {
    name,
    [Symbol.asyncDispose]: async () => {
      await table.delete({ ignoreNotFound: true }).catch(({ message }: Error) => {
        const warning = `staging table ${name} was not dropped and expires in ${STAGING_HOURS} h`;
        run.log("warning", { warning, error: message });
      });
    },
  };
}

/**
 * Streams JSON lines into the staging table as one load job, whose id follows from the attempt.
 * @returns the rows that the job says it wrote. A stream that ended early would be a successful short load: compare
 * this with the rows sent.
 */
export async function loadLines(run: Run, to: Destination, staging: Staging, rows: RowStream): Promise<number> {
  const jobId = `etl_${staging.name}_load`;
  const upload = to.bigquery
    .dataset(to.dataset)
    .table(staging.name)
    .createWriteStream({
      jobId,
      sourceFormat: "NEWLINE_DELIMITED_JSON",
      schema: { fields: to.contract.fields },
      createDisposition: "CREATE_NEVER",
      writeDisposition: "WRITE_EMPTY",
    } as object);
  const completed = new Promise<Job>((resolve) => upload.once("complete", resolve));
  using _cancel = run.onStop(() => to.bigquery.job(jobId).cancel());
  await pipeline(rows.lines, showProgress(run, rows), upload, { signal: run.signal });
  const { metadata } = await completed;
  return Number(metadata.statistics.load.outputRows ?? 0);
}

function showProgress(run: Run, { sent }: RowStream): (lines: AsyncIterable<Buffer>) => AsyncIterable<Buffer> {
  return async function* (lines) {
    for await (const piece of lines) {
      yield Buffer.from(piece); // the upload may hold several
      progress(
        `${run.pipeline}: ${thousands(run.totals.rows + sent.rows)} rows, ${thousands(sent.bytes / 1e6)} MB of this chunk read`,
      );
    }
  };
}

/**
 * Compares the rows read with the rows loaded.
 * @throws Error where they differ; the next attempt starts with a new staging table.
 */
export function compareCounts(sent: number, loaded: number): void {
  if (sent !== loaded)
    throw new Error(
      `${SHORT_LOAD}: ${sent} rows were read from the source, and ${loaded} were loaded; nothing of it was merged`,
    );
}

/** Rows of the staging table that share a key; the MERGE would insert each of them. */
export function duplicateKeysStatement(contract: Contract, staging: string): string {
  const key = contract.key.map((name) => `\`${name}\``).join(", ");
  return `SELECT ${key} FROM ${staging} GROUP BY ${key} HAVING COUNT(*) > 1 LIMIT 1`;
}

/** @throws UsageError where the SELECT returned a key twice: the source has no primary key on it, or a join repeats rows. */
export async function checkKeys(run: Run, to: Destination, staging: Staging): Promise<void> {
  const [twice] = await ask(run, to, duplicateKeysStatement(to.contract, address(to, staging.name)));
  if (!twice) return;
  throw new UsageError(
    `sql/${run.pipeline}.sql returned the key ${JSON.stringify(twice)} more than once; nothing of this chunk was merged. Each row needs its own ${to.contract.key.join(", ")}: check the source's primary key, and joins in that file.`,
  );
}

/** A table of the destination's dataset, as SQL names it. */
export function address({ bigquery, dataset }: Destination, table: string): string {
  return `\`${bigquery.projectId}.${dataset}.${table}\``;
}

/**
 * The upsert: one MERGE on the primary key. A row at the destination that is newer than the staged one stays, so that a
 * run that was slow, or a window read again, never puts an old version back.
 * @param staging a table, or a subquery in parentheses.
 * @param compared a column of `staging` with the version that was compared: a row is replaced while it still has that one,
 * newer or not.
 */
export function mergeStatement(
  contract: Contract,
  target: string,
  staging: string,
  version: string,
  compared?: string,
): string {
  const [t, s] = [freeName(contract.fields, "t"), freeName(contract.fields, "s")];
  const columns = contract.fields.map(({ name }) => `\`${name}\``);
  const values = columns.filter((column) => !contract.key.includes(column.slice(1, -1)));
  const at = (table: string, column: string): string => `${table}.\`${column}\``;
  const replaced = compared
    ? `${at(t, version)} IS NOT DISTINCT FROM ${at(s, compared)}`
    : `${at(s, version)} >= ${at(t, version)}`;
  return [
    `MERGE ${target} AS ${t} USING ${staging} AS ${s}`,
    `ON ${contract.key.map((name) => `${at(t, name)} = ${at(s, name)}`).join(" AND ")}`,
    `WHEN MATCHED AND ${replaced} THEN UPDATE SET ${values.map((column) => `${column} = ${s}.${column}`).join(", ")}`,
    `WHEN NOT MATCHED THEN INSERT (${columns.join(", ")}) VALUES (${columns.map((column) => `${s}.${column}`).join(", ")})`,
  ].join("\n");
}

/** Runs the MERGE of one staging table. @returns rows inserted and updated; the others were newer at the destination. */
export async function mergeStaging(
  run: Run,
  to: Destination,
  staging: Staging,
): Promise<{ inserted: number; updated: number }> {
  const merge = mergeStatement(to.contract, address(to, to.table), address(to, staging.name), to.version);
  const { inserted, updated } = await change(run, to, `etl_${staging.name}_merge`, merge);
  return { inserted, updated };
}

/** Runs a statement that changes rows, as the job of that id; it is cancelled where the run is stopped. @returns rows changed. */
export async function change(
  run: Run,
  { bigquery }: Destination,
  jobId: string,
  sql: string,
): Promise<{ inserted: number; updated: number; deleted: number }> {
  const job = bigquery.job(jobId);
  using _cancel = run.onStop(() => job.cancel());
  await bigquery.createQueryJob({ ...named(run, sql), jobId }).catch(ignoreAlreadyThere);
  await job.getQueryResults({ maxResults: 0 }); // waits for the end, and throws the job's error
  const [metadata] = await job.getMetadata();
  if (metadata.status?.state !== "DONE" || metadata.status.errorResult) {
    throw new Error(
      `BigQuery job ${jobId} ended without a result: ${metadata.status?.errorResult?.message ?? metadata.status?.state}`,
    );
  }
  const { insertedRowCount, updatedRowCount, deletedRowCount } = metadata.statistics.query.dmlStats;
  return {
    inserted: Number(insertedRowCount ?? 0),
    updated: Number(updatedRowCount ?? 0),
    deleted: Number(deletedRowCount ?? 0),
  };
}

/** The rows of a query that returns few. */
export async function ask<T = Record<string, unknown>>(run: Run, { bigquery }: Destination, sql: string): Promise<T[]> {
  const [rows] = await bigquery.query(named(run, sql));
  return rows as T[];
}

/** A query that can be found by its run: in the console by its text, in the list of jobs by its labels. */
const named = (run: Run, sql: string): { query: string; labels: Record<string, string> } => ({
  query: `/* etl:${run.pipeline} run=${run.id} */\n${sql}`,
  labels: labels(run),
});

export function labels(run: Run): Record<string, string> {
  return { etl_pipeline: run.pipeline, etl_run: run.id };
}
