/** BigQuery: a staging table per chunk and attempt, a streamed load job, and one MERGE by primary key. */
import { pipeline } from "node:stream/promises";
import type { BigQueryOptions, Job } from "@google-cloud/bigquery";
import type { RowStream } from "../copy.ts";
import { UsageError } from "../env.ts";
import { progress, thousands } from "../log.ts";
import type { Run } from "../run.ts";
import type { Settings, Window } from "../session.ts";
import { type Column, driftError, nameRefused } from "../source.ts";
import { type ApiError, type BigQueryEnv, connectBigQuery, ignoreAlreadyThere, remedy, runJob } from "./client.ts";
import { type Contract, differingColumns, optionFaults } from "./contract.ts";
import { jsonLines } from "./types.ts";

export type Destination = Awaited<ReturnType<typeof openDestination>>;

/** The pipeline's table, compared with its contract. @throws UsageError where it does not exist or differs, or hides rows. */
export async function openDestination(env: BigQueryEnv, contract: Contract, options: BigQueryOptions = {}) {
  const bigquery = connectBigQuery(env, options);
  const [dataset, { pipeline }] = [env.BIGQUERY_DATASET, contract];
  const table = bigquery.dataset(dataset).table(pipeline);
  const [metadata] = await table.getMetadata().catch((error: ApiError) => {
    const where = `destination table ${env.BIGQUERY_PROJECT}.${dataset}.${pipeline}`;
    const rewind = `make rewind PIPELINE=${pipeline} TO=0001-01-01`;
    if (error.code === 404) throw new UsageError(`${where} does not exist. Run: make migrate. If it had rows before, then run: ${rewind}`);
    const next = env.BIGQUERY_ENDPOINT ? "Check BIGQUERY_ENDPOINT; for the local stack: make up" : remedy;
    throw new Error(`cannot read the ${where}: ${error.message}. ${next}`);
  });
  // roles/bigquery.dataEditor may not list them (403). Google documents that a MERGE under a policy needs access to every row of the table
  // ("Using row-level security with other BigQuery features", DML), so then BigQuery itself refuses it.
  const listed = table.request({ uri: "/rowAccessPolicies" });
  const [{ rowAccessPolicies = [] }] = await listed.catch((error: ApiError) => (error.code === 403 ? [{}] : Promise.reject(error)));
  const columns = differingColumns(contract, `${dataset}.${pipeline}`, metadata).map(({ fault }) => fault);
  const faults = [...columns, ...optionFaults(`${dataset}.${pipeline}`, metadata, rowAccessPolicies.length > 0)];
  if (faults.length) throw driftError("destination", faults, "For additions: make migrate. Anything else is your decision");
  // Which table a watermark was written to.
  const identity = `${bigquery.projectId}.${dataset}.${pipeline}, created ${new Date(Number(metadata.creationTime)).toISOString()}`;
  return { bigquery, contract, dataset, identity, rows: Number(metadata.numRows) };
}

export type Staging = Awaited<ReturnType<typeof createStaging>>;

/** Creates a table for the rows of one chunk, which is dropped when the attempt ends, well or not. @param attempt is part of its name. */
export async function createStaging(run: Run, to: Destination, attempt: number | string) {
  const { bigquery, dataset, contract } = to;
  const name = `${contract.pipeline}_staging_${run.id}_${run.totals.chunks + 1}_${attempt}`;
  const table = bigquery.dataset(dataset).table(name);
  const created = table.create({
    description: `Rows of run ${run.id} on their way to ${contract.pipeline}. Nothing reads it; it deletes itself.`,
    schema: { fields: contract.fields },
    expirationTime: String(Date.now() + 24 * 3_600_000), // where its run could not drop it
  });
  await created.catch(ignoreAlreadyThere);
  const drop = async (): Promise<void> => void (await table.delete({ ignoreNotFound: true }).catch(() => {}));
  return { to, name, table, attempt, [Symbol.asyncDispose]: drop };
}

/**
 * Extracts, loads and counts the rows of [from, to). @param columns as checkSource returns them. @returns what was loaded.
 * @throws Error that names the row, where the source or BigQuery refuses one, for whatever reason.
 */
export async function loadChunk(run: Run, columns: Column[], staging: Staging, { from, to }: Window): Promise<RowStream["sent"]> {
  const { fields, source } = staging.to.contract;
  const settings = { "etl.from": from, "etl.to": to };
  const fill = (table: Staging, select: string) => load(run, table, jsonLines(fields, select, columns), settings);
  return await fill(staging, source.select).catch(async (error: Error) => {
    let step = 0;
    throw await nameRefused(error, run, source, settings, async (select) => {
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
  const soFar = () => `${run.pipeline}: ${thousands(run.totals.rows + sent.rows)} rows, ${thousands(sent.bytes / 1e6)} MB of this chunk`;
  upload.on("drain", () => progress(soFar()));
  const [{ metadata }] = await Promise.all([completed, pipeline(lines, upload, { signal: run.signal })]);
  const loaded = Number(metadata.statistics.load.outputRows ?? 0);
  const differ = `the counts differ: ${sent.rows} rows were read from the source, and ${loaded} were loaded; nothing was merged`;
  if (loaded !== sent.rows) throw Object.assign(new Error(differ), { errors: [{ reason: "backendError" }] });
  return sent;
}

/** A table of the destination's dataset, as SQL names it. */
export const address = ({ bigquery, dataset }: Destination, table: string): string => `\`${bigquery.projectId}.${dataset}.${table}\``;

/**
 * The upsert: one MERGE on the primary key. A row at the destination that is newer than the staged one stays, so that a run that was
 * slow, or a window read again, never puts an old version back. A key that was staged twice would be inserted twice: the MERGE fails.
 */
export function mergeStatement(contract: Contract, target: string, staging: string): string {
  const { pipeline, fields, key, source } = contract;
  const [t, s] = ["etl__t", "etl__s"]; // no field has such a name
  const columns = fields.map(({ name }) => `\`${name}\``);
  const keys = key.map((name) => `\`${name}\``);
  const values = columns.filter((column) => !keys.includes(column));
  const version = `\`${source.cursor}\``; // says which of two versions of a row is newer
  const named = `TO_JSON_STRING(STRUCT(${keys.map((name) => `${name} AS ${name}`).join(", ")}))`;
  const twice = `CONCAT('sql/${pipeline}.sql returned the key ', ${named}, ' more than once; nothing of this chunk was merged. ' ||
    'Each row needs its own: check the primary key of the source, and joins in that file')`;
  return [
    `MERGE ${target} AS ${t}`,
    `USING (SELECT * FROM ${staging} WHERE TRUE QUALIFY IF(COUNT(*) OVER (PARTITION BY ${keys}) > 1, ERROR(${twice}), TRUE)) AS ${s}`,
    `ON ${keys.map((name) => `${t}.${name} = ${s}.${name}`).join(" AND ")}`,
    `WHEN MATCHED AND ${s}.${version} >= ${t}.${version} THEN UPDATE SET ${values.map((name) => `${name} = ${s}.${name}`).join(", ")}`,
    `WHEN NOT MATCHED THEN INSERT (${columns.join(", ")}) VALUES (${columns.map((column) => `${s}.${column}`).join(", ")})`,
  ].join("\n");
}

/** Runs the MERGE of one staging table. @returns rows inserted and updated; the others were newer at the destination. */
export const mergeStaging = (run: Run, { to, name }: Staging): Promise<Changed> =>
  execute(run, to, `etl_${name}_merge`, mergeStatement(to.contract, address(to, to.contract.pipeline), address(to, name)));

type Changed = Record<"inserted" | "updated" | "deleted", number>;

/** Runs a statement as the job of that id; the console finds it by its run. @returns rows changed. */
export async function execute(run: Run, { bigquery }: Destination, jobId: string, sql: string): Promise<Changed> {
  const query = { query: `/* etl:${run.pipeline} run=${run.id} */\n${sql}`, useLegacySql: false };
  const { statistics } = await runJob(run, bigquery, jobId, { query });
  const { insertedRowCount = 0, updatedRowCount = 0, deletedRowCount = 0 } = statistics.query.dmlStats ?? {};
  return { inserted: Number(insertedRowCount), updated: Number(updatedRowCount), deleted: Number(deletedRowCount) };
}
