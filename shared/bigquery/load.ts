/** BigQuery: a staging table per chunk and attempt, a streamed load job, and one MERGE by primary key. */
import { pipeline } from "node:stream/promises";
import { promisify } from "node:util";
import type { BigQuery, Job, QueryRowsResponse } from "@google-cloud/bigquery";
import { copyJsonLines, type RowStream } from "../copy.ts";
import { UsageError } from "../env.ts";
import { progress, thousands } from "../log.ts";
import { isRefusal, nameRefused } from "../refused.ts";
import type { Run } from "../run.ts";
import type { Window } from "../session.ts";
import { addBilled, type BigQueryEnv, connectBigQuery, ignoreAlreadyThere, labels, ShortLoad } from "./client.ts";
import { type Contract, checkDestination, type JsonSelect } from "./contract.ts";
import { freeName } from "./types.ts";

/** A staging table that its run did not drop (killed, cut off) is deleted by BigQuery after this time. */
const STAGING_HOURS = 24;

/** A destination table, with what is needed to address it. */
export interface Destination {
  bigquery: BigQuery;
  contract: Contract;
  dataset: string;
  table: string;
  /** Name and time of creation: which table a watermark was written to. */
  identity: string;
  rows: number;
}

/**
 * The pipeline's table, compared with its contract.
 * @throws UsageError where it does not exist or differs.
 */
export async function openDestination(env: BigQueryEnv, contract: Contract): Promise<Destination> {
  const bigquery = connectBigQuery(env);
  const [dataset, table] = [env.BIGQUERY_DATASET, contract.pipeline];
  const where = `destination table ${env.BIGQUERY_PROJECT}.${dataset}.${table}`;
  const got = bigquery.dataset(dataset).table(table).getMetadata();
  const [metadata] = await got.catch(({ code, message }: { code?: number; message: string }) => {
    if (code === 404) {
      const rewind = `make rewind PIPELINE=${table} TO=0001-01-01`;
      throw new UsageError(`${where} does not exist. Run: make migrate. If it had rows before, then run: ${rewind}`);
    }
    const at = env.BIGQUERY_ENDPOINT ? "BIGQUERY_ENDPOINT" : "BIGQUERY_PROJECT and the Google credentials";
    throw new Error(`cannot read the ${where}: ${message}. Check ${at}; for the local stack: make up`);
  });
  checkDestination(contract, `${dataset}.${table}`, metadata);
  await checkRowAccess(bigquery, dataset, table);
  const created = new Date(Number(metadata.creationTime)).toISOString();
  const identity = `${bigquery.projectId}.${dataset}.${table}, created ${created}`;
  return { bigquery, contract, dataset, table, identity, rows: Number(metadata.numRows) };
}

const hidesRows = (name: string): string =>
  `table ${name}: a row access policy hides rows from an upsert, which inserts them again. ` +
  `Run in BigQuery: DROP ALL ROW ACCESS POLICIES ON ${name}`;

/** @throws UsageError where the table has a row access policy. */
async function checkRowAccess(bigquery: BigQuery, dataset: string, table: string): Promise<void> {
  const list = promisify<{ uri: string }, { rowAccessPolicies?: unknown[] }>(bigquery.request.bind(bigquery));
  const listed = list({ uri: `/datasets/${dataset}/tables/${table}/rowAccessPolicies` });
  const { rowAccessPolicies = [] } = await listed.catch((error: { code?: number }) => {
    // roles/bigquery.dataEditor may not list them; then the MERGE's own statistics tell.
    if (error.code === 403) return { rowAccessPolicies: [] };
    throw error;
  });
  if (rowAccessPolicies.length) throw new UsageError(hidesRows(`${dataset}.${table}`));
}

export interface Staging extends AsyncDisposable {
  name: string;
}

/**
 * Creates the staging table of one attempt, with the contract's fields and an expiry. It is dropped when the attempt ends, well or not;
 * where that fails it is left to its expiry.
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
  const drop = async (): Promise<void> => {
    await table.delete({ ignoreNotFound: true }).catch(({ message }: Error) => {
      const warning = `staging table ${name} was not dropped and expires in ${STAGING_HOURS} h`;
      run.log("warning", { warning, error: message });
    });
  };
  return { name, [Symbol.asyncDispose]: drop };
}

/**
 * Extracts the rows of [from, to) into the staging table: one COPY, one load job, and the rows read compared with the rows loaded.
 * @param lines the SELECT of JSON lines around another.
 * @returns what was sent.
 * @throws Error that names the row, where the source or BigQuery refuses one, for whatever reason.
 */
export async function loadChunk(
  run: Run,
  url: string,
  lines: JsonSelect,
  to: Destination,
  staging: Staging,
  chunk: Window,
): Promise<RowStream["sent"]> {
  const { fields, source, key } = to.contract;
  const load = async (select: string, into: Staging): Promise<RowStream["sent"]> => {
    await using stream = copyJsonLines(url, lines(select, fields), run.session, chunk);
    const loaded = await loadLines(run, to, into, stream);
    if (loaded !== stream.sent.rows) throw new ShortLoad(stream.sent.rows, loaded);
    return stream.sent;
  };
  return await load(source.select, staging).catch(async (error: Error) => {
    if (!isRefusal(error)) throw error;
    let step = 0;
    const settings = { "etl.from": chunk.from, "etl.to": chunk.to };
    throw await nameRefused(run, key, source.select, settings, async (select) => {
      await using part = await createStaging(run, to, `${staging.name.split("_").at(-1)}_part_${++step}`);
      await load(select, part);
    });
  });
}

/**
 * Streams JSON lines into the staging table as one load job, whose id follows from the attempt.
 * @returns the rows that the job says it wrote. A stream that ended early would be a successful short load: compare this with the rows
 * sent.
 */
export async function loadLines(
  run: Run,
  to: Destination,
  staging: Staging,
  { lines, sent }: RowStream,
): Promise<number> {
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
  return Number(metadata.statistics.load.outputRows ?? 0);
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
    `sql/${run.pipeline}.sql returned the key ${JSON.stringify(twice)} more than once; nothing of this chunk was merged. ` +
      `Each row needs its own ${to.contract.key.join(", ")}: check the source's primary key, and joins in that file.`,
  );
}

/** A table of the destination's dataset, as SQL names it. */
export const address = ({ bigquery, dataset }: Destination, table: string): string =>
  `\`${bigquery.projectId}.${dataset}.${table}\``;

/**
 * The upsert: one MERGE on the primary key. A row at the destination that is newer than the staged one stays, so that a run that was
 * slow, or a window read again, never puts an old version back.
 * @param staging a table, or a subquery in parentheses.
 * @param compared a column of `staging` with the version that was compared: a row is replaced while it still has that one, newer or not.
 */
export function mergeStatement(
  { fields, key, source }: Contract,
  target: string,
  staging: string,
  compared?: string,
): string {
  const [t, s] = [freeName(fields, "t"), freeName(fields, "s")];
  const columns = fields.map(({ name }) => `\`${name}\``);
  const values = columns.filter((column) => !key.includes(column.slice(1, -1)));
  const version = `\`${source.cursor}\``; // says which of two versions of a row is newer
  const replaced = compared
    ? `${t}.${version} IS NOT DISTINCT FROM ${s}.\`${compared}\``
    : `${s}.${version} >= ${t}.${version}`;
  return [
    `MERGE ${target} AS ${t} USING ${staging} AS ${s}`,
    `ON ${key.map((name) => `${t}.\`${name}\` = ${s}.\`${name}\``).join(" AND ")}`,
    `WHEN MATCHED AND ${replaced} THEN UPDATE SET ${values.map((column) => `${column} = ${s}.${column}`).join(", ")}`,
    `WHEN NOT MATCHED THEN INSERT (${columns.join(", ")}) VALUES (${columns.map((column) => `${s}.${column}`).join(", ")})`,
  ].join("\n");
}

/** Runs the MERGE of one staging table. @returns rows inserted and updated; the others were newer at the destination. */
export const mergeStaging = (run: Run, to: Destination, { name }: Staging): Promise<Changed> =>
  change(run, to, `etl_${name}_merge`, mergeStatement(to.contract, address(to, to.table), address(to, name)));

type Changed = Record<"inserted" | "updated" | "deleted", number>;

/** Runs a statement that changes rows, as the job of that id; it is cancelled where the run is stopped. @returns rows changed. */
export async function change(
  run: Run,
  { bigquery, dataset, table }: Destination,
  jobId: string,
  sql: string,
): Promise<Changed> {
  const job = bigquery.job(jobId);
  using _cancel = run.onStop(() => job.cancel());
  await bigquery.createQueryJob({ ...traceable(run, sql), jobId }).catch(ignoreAlreadyThere);
  await job.getQueryResults({ maxResults: 0 }); // waits for the end, and throws the job's error
  const [{ status, statistics }] = await job.getMetadata();
  if (status?.state !== "DONE" || status.errorResult)
    throw new Error(`BigQuery job ${jobId} ended without a result: ${status?.errorResult?.message ?? status?.state}`);
  addBilled(run, statistics);
  if (statistics.rowLevelSecurityStatistics?.rowLevelSecurityApplied)
    throw new UsageError(hidesRows(`${dataset}.${table}`));
  const { insertedRowCount = 0, updatedRowCount = 0, deletedRowCount = 0 } = statistics.query.dmlStats ?? {};
  return { inserted: Number(insertedRowCount), updated: Number(updatedRowCount), deleted: Number(deletedRowCount) };
}

/** The rows of a query that returns few. */
export async function ask<T = Record<string, unknown>>(run: Run, { bigquery }: Destination, sql: string): Promise<T[]> {
  const [rows, , answer] = (await bigquery.query(traceable(run, sql))) as unknown as QueryRowsResponse;
  const [{ statistics }] = await bigquery.job(answer?.jobReference?.jobId ?? "").getMetadata();
  addBilled(run, statistics);
  return rows as T[];
}

/** A query that can be found by its run: in the console by its text, in the list of jobs by its labels. */
const traceable = (run: Run, sql: string): { query: string; labels: Record<string, string> } => ({
  query: `/* etl:${run.pipeline} run=${run.id} */\n${sql}`,
  labels: labels(run),
});
