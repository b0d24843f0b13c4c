/** BigQuery: a staging table per chunk and attempt, a streamed load job, and one MERGE by primary key. */
import { pipeline } from "node:stream/promises";
import type { BigQueryOptions, Job, QueryRowsResponse } from "@google-cloud/bigquery";
import type { RowStream } from "../copy.ts";
import { UsageError } from "../env.ts";
import { progress, thousands } from "../log.ts";
import type { Run } from "../run.ts";
import type { Settings, Window } from "../session.ts";
import { type Column, nameRefused } from "../source.ts";
import { type ApiError, type BigQueryEnv, connectBigQuery, ignoreAlreadyThere, labels, remedy, runJob } from "./client.ts";
import { type Contract, checkDestination, optionFaults } from "./contract.ts";
import { jsonLines } from "./types.ts";

/** A staging table that its run did not drop (killed, cut off) is deleted by BigQuery after this time. */
const STAGING_HOURS = 24;

export type Destination = Awaited<ReturnType<typeof openDestination>>;

/**
 * The pipeline's table, compared with its contract.
 * @throws UsageError where it does not exist or differs, or hides rows.
 */
export async function openDestination(env: BigQueryEnv, contract: Contract, options: BigQueryOptions = {}) {
  const bigquery = connectBigQuery(env, options);
  const [dataset, { pipeline }] = [env.BIGQUERY_DATASET, contract];
  const table = bigquery.dataset(dataset).table(pipeline);
  const [metadata] = await table.getMetadata().catch((error: ApiError) => {
    const where = `destination table ${env.BIGQUERY_PROJECT}.${dataset}.${pipeline}`;
    const rewind = `make rewind PIPELINE=${pipeline} TO=0001-01-01`;
    if (error.code === 404) throw new UsageError(`${where} does not exist. Run: make migrate. If it had rows before, then run: ${rewind}`);
    const next = env.BIGQUERY_ENDPOINT ? "Check BIGQUERY_ENDPOINT; for the local stack: make up" : remedy(error);
    throw new Error(`cannot read the ${where}: ${error.message}. ${next}`);
  });
  // roles/bigquery.dataEditor may not list them (403); then the MERGE's own statistics tell.
  const listed = table.request({ uri: "/rowAccessPolicies" });
  const [{ rowAccessPolicies = [] }] = await listed.catch((error: ApiError) => (error.code === 403 ? [{}] : Promise.reject(error)));
  checkDestination(contract, `${dataset}.${pipeline}`, metadata, rowAccessPolicies.length > 0);
  const created = new Date(Number(metadata.creationTime)).toISOString();
  // `identity`: which table a watermark was written to.
  const identity = `${bigquery.projectId}.${dataset}.${pipeline}, created ${created}`;
  return { bigquery, contract, dataset, identity, rows: Number(metadata.numRows) };
}

export type Staging = Awaited<ReturnType<typeof createStaging>>;

/**
 * Creates a table for the rows of one chunk, which is dropped when the attempt ends, well or not. @param attempt names it, with the run and
 * the chunk.
 */
export async function createStaging(run: Run, to: Destination, attempt: number | string) {
  const { bigquery, dataset, contract } = to;
  const name = `${contract.pipeline}_staging_${run.id}_${run.totals.chunks + 1}_${attempt}`;
  const table = bigquery.dataset(dataset).table(name);
  const created = table.create({
    description: `Rows of run ${run.id} on their way to ${contract.pipeline}. Nothing reads it; it deletes itself.`,
    schema: { fields: contract.fields },
    expirationTime: String(Date.now() + STAGING_HOURS * 3_600_000),
  });
  await created.catch(ignoreAlreadyThere);
  const drop = async (): Promise<void> => {
    await table.delete({ ignoreNotFound: true }).catch(({ message }: Error) => {
      const warning = `staging table ${name} was not dropped and expires in ${STAGING_HOURS} h`;
      run.log("warning", { warning, error: message });
    });
  };
  return { to, name, table, attempt, [Symbol.asyncDispose]: drop };
}

/**
 * Extracts, loads and counts the rows of [from, to). @param columns as checkSource returns them. @returns what was loaded.
 * @throws UsageError where a key comes twice; Error that names the row, where the source or BigQuery refuses one, for whatever reason.
 */
export async function loadChunk(run: Run, columns: Column[], staging: Staging, { from, to }: Window): Promise<RowStream["sent"]> {
  const { contract } = staging.to;
  const settings = { "etl.from": from, "etl.to": to };
  const fill = (table: Staging, select: string) => load(run, table, jsonLines(contract, select, columns), settings);
  const { key, source } = contract;
  return await fill(staging, source.select).catch(async (error: Error) => {
    let step = 0;
    throw await nameRefused(error, run, { key, settings, select: source.select }, async (select) => {
      await using part = await createStaging(run, staging.to, `${staging.attempt}_part_${++step}`);
      await fill(part, select);
    });
  });
}

/**
 * Streams the JSON lines of a SELECT into the table as one load job, whose id follows from the attempt. One request for all of them: a
 * resumable upload would have to keep what BigQuery has not confirmed, since a COPY cannot be read again from its middle; the next attempt
 * reads all again. Where uploads break off for their length, lower CHUNK_ROWS.
 * @throws Error, worth another attempt, where the job wrote other than what was read: a stream that ended early is a successful short load.
 */
async function load(run: Run, { to, name, table }: Staging, select: string, settings: Settings): Promise<RowStream["sent"]> {
  await using stream = run.copy(select, settings); // where it fails, its COPY ends before BigQuery is asked anything more
  const [{ lines, sent }, jobId] = [stream, `etl_${name}_load`];
  const upload = table.createWriteStream({
    jobId,
    sourceFormat: "NEWLINE_DELIMITED_JSON",
    schema: { fields: to.contract.fields },
    createDisposition: "CREATE_NEVER",
    writeDisposition: "WRITE_EMPTY",
  } as object);
  // An upload that fails after its last byte was sent tells nobody but its own listeners: pipeline() would wait for ever.
  const completed = new Promise<Job>((resolve, reject) => upload.once("complete", resolve).once("error", reject));
  using _cancel = run.onStop(() => to.bigquery.job(jobId).cancel());
  const shown = async function* (): AsyncGenerator<Buffer> {
    for await (const piece of lines) {
      yield piece;
      const [rows, megabytes] = [thousands(run.totals.rows + sent.rows), thousands(sent.bytes / 1e6)];
      progress(`${run.pipeline}: ${rows} rows, ${megabytes} MB of this chunk read`);
    }
  };
  const [{ metadata }] = await Promise.all([completed, pipeline(shown(), upload, { signal: run.signal })]);
  const loaded = Number(metadata.statistics.load.outputRows ?? 0);
  const differ = `the counts differ: ${sent.rows} rows were read from the source, and ${loaded} were loaded; nothing was merged`;
  if (loaded !== sent.rows) throw Object.assign(new Error(differ), { errors: [{ reason: "backendError" }] });
  await checkKeys(run, to, name);
  return sent;
}

/** Rows of the staging table that share a key; the MERGE would insert each of them. */
export function duplicateKeysStatement(contract: Contract, staging: string): string {
  const key = contract.key.map((name) => `\`${name}\``).join(", ");
  return `SELECT ${key} FROM ${staging} GROUP BY ${key} HAVING COUNT(*) > 1 LIMIT 1`;
}

/** @throws UsageError where the SELECT returned a key twice: the source has no primary key on it, or a join repeats rows. */
async function checkKeys(run: Run, to: Destination, staging: string): Promise<void> {
  const [twice] = await ask(run, to, duplicateKeysStatement(to.contract, address(to, staging)));
  if (!twice) return;
  throw new UsageError(
    `sql/${run.pipeline}.sql returned the key ${JSON.stringify(twice)} more than once; nothing of this chunk was merged. ` +
      `Each row needs its own ${to.contract.key.join(", ")}: check the source's primary key, and joins in that file.`,
  );
}

/** A table of the destination's dataset, as SQL names it. */
export const address = ({ bigquery, dataset }: Destination, table: string): string => `\`${bigquery.projectId}.${dataset}.${table}\``;

/**
 * The upsert: one MERGE on the primary key. A row at the destination that is newer than the staged one stays, so that a run that was
 * slow, or a window read again, never puts an old version back.
 */
export function mergeStatement({ fields, key, source }: Contract, target: string, staging: string): string {
  const [t, s] = ["etl__t", "etl__s"]; // no field has such a name
  const columns = fields.map(({ name }) => `\`${name}\``);
  const values = columns.filter((column) => !key.includes(column.slice(1, -1)));
  const version = `\`${source.cursor}\``; // says which of two versions of a row is newer
  return [
    `MERGE ${target} AS ${t} USING ${staging} AS ${s}`,
    `ON ${key.map((name) => `${t}.\`${name}\` = ${s}.\`${name}\``).join(" AND ")}`,
    `WHEN MATCHED AND ${s}.${version} >= ${t}.${version} THEN UPDATE SET ${values.map((column) => `${column} = ${s}.${column}`).join(", ")}`,
    `WHEN NOT MATCHED THEN INSERT (${columns.join(", ")}) VALUES (${columns.map((column) => `${s}.${column}`).join(", ")})`,
  ].join("\n");
}

/** Runs the MERGE of one staging table. @returns rows inserted and updated; the others were newer at the destination. */
export const mergeStaging = (run: Run, { to, name }: Staging): Promise<Changed> =>
  change(run, to, `etl_${name}_merge`, mergeStatement(to.contract, address(to, to.contract.pipeline), address(to, name)));

type Changed = Record<"inserted" | "updated" | "deleted", number>;

/** Runs a statement that changes rows, as the job of that id. @returns rows changed. */
export async function change(run: Run, to: Destination, jobId: string, sql: string): Promise<Changed> {
  const { bigquery, dataset, contract } = to;
  const query = { query: traceable(run, sql), useLegacySql: false };
  const { statistics } = await runJob(run, bigquery, jobId, { query });
  if (statistics.rowLevelSecurityStatistics?.rowLevelSecurityApplied)
    throw new UsageError(
      `${optionFaults(`${dataset}.${contract.pipeline}`, {}, true)}; then: make verify PIPELINE=${contract.pipeline} REPAIR=1`,
    );
  const { insertedRowCount = 0, updatedRowCount = 0, deletedRowCount = 0 } = statistics.query.dmlStats ?? {};
  return { inserted: Number(insertedRowCount), updated: Number(updatedRowCount), deleted: Number(deletedRowCount) };
}

/** The rows of a query that returns few. */
export async function ask<T = Record<string, unknown>>(run: Run, { bigquery }: Destination, sql: string): Promise<T[]> {
  const query = { query: traceable(run, sql), labels: labels(run) };
  const [rows, , answer] = (await bigquery.query(query)) as unknown as QueryRowsResponse;
  const [{ statistics }] = await bigquery.job(answer?.jobReference?.jobId ?? "").getMetadata();
  run.totals.bytes_billed += Number(statistics.query?.totalBytesBilled ?? 0);
  return rows as T[];
}

/** A query that the console finds by its run; the list of jobs has it by its labels. */
const traceable = (run: Run, sql: string): string => `/* etl:${run.pipeline} run=${run.id} */\n${sql}`;
