/**
 * BigQuery: a staging table per chunk and attempt, a streamed load job, and one MERGE by primary key.
 */
import { randomUUID } from "node:crypto";
import { pipeline } from "node:stream/promises";
import type { BigQuery, Job } from "@google-cloud/bigquery";
import { copyJsonLines, type RowStream } from "../copy.ts";
import { UsageError } from "../env.ts";
import { progress, thousands } from "../log.ts";
import type { Run } from "../run.ts";
import { quote } from "../session.ts";
import { type BigQueryEnv, connectBigQuery, ignoreAlreadyThere, isRefusal, SHORT_LOAD } from "./client.ts";
import { type Contract, checkDestination, type JsonSelect } from "./contract.ts";
import { rowName } from "./types.ts";

/** A staging table that its run did not drop (killed, cut off) is deleted by BigQuery after this time. */
const STAGING_HOURS = 24;

/** What a chunk without rows moved. */
export const noRows = { rows: 0, bytes: 0, inserted: 0, updated: 0 };

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
      yield piece;
      progress(
        `${run.pipeline}: ${thousands(run.totals.rows + sent.rows)} rows, ${thousands(sent.bytes / 1e6)} MB of this chunk read`,
      );
    }
  };
}

/**
 * Extracts a chunk into the staging table: COPY, load, and the rows read compared with the rows loaded. A row that the source or
 * BigQuery refuses is named, whatever the reason.
 * @returns what was sent.
 */
export async function loadChunk(
  run: Run,
  { url, select, lines }: Extraction,
  to: Destination,
  staging: Staging,
  chunk: { from: string; to: string },
): Promise<RowStream["sent"]> {
  const load = async (rows: string, into: Staging): Promise<RowStream["sent"]> => {
    await using stream = copyJsonLines(url, lines(rows), run.session, chunk);
    const loaded = await loadLines(run, to, into, stream);
    compareCounts(stream.sent.rows, loaded);
    return stream.sent;
  };
  const tries = async (rows: string, step: number): Promise<Error | undefined> => {
    await using part = await createStaging(run, to, `${staging.name.split("_").at(-1)}_part_${step}`);
    return await load(rows, part).then(
      () => undefined,
      (error) => (isRefusal(error) ? error : Promise.reject(error)),
    );
  };
  return await load(select, staging).catch(async (error: Error) => {
    throw isRefusal(error) ? await nameRefused(run, to.contract, select, chunk, error, tries) : error;
  });
}

/** What the rows of a chunk are read with: sql/NAME.sql, and around it the SELECT of JSON lines. */
export interface Extraction {
  url: string;
  select: string;
  lines: JsonSelect;
}

/**
 * Reads a chunk again in halves, in the order of its keys, until one row is left: log2(n) steps.
 * @param tries loads some rows. It returns the error if they are refused.
 * @returns the error that names the row by its key.
 */
async function nameRefused(
  run: Run,
  { key }: Contract,
  select: string,
  { from, to }: { from: string; to: string },
  error: Error,
  tries: (rows: string, step: number) => Promise<Error | undefined>,
): Promise<Error> {
  const ask = async (column: string, rows: string): Promise<string | undefined> =>
    await run.source.begin("read only", async (sql) => {
      await sql`select set_config('etl.from', ${from}, true), set_config('etl.to', ${to}, true)`;
      return (await sql.unsafe<{ value: string }[]>(`select ${column} as value from (${rows}) q`))[0]?.value;
    });
  const part = (first: number, rows: number): string =>
    `select * from (${select}) q order by ${key.map(quote).join(", ")} offset ${first} limit ${rows}`;
  let [first, count, last] = [0, Number(await ask("count(*)", select)), undefined as Error | undefined];
  run.log("refused", { rows: count, error: error.message, next: "reads them again in halves to name the row" });
  for (let step = 1; count > 1; step++) {
    const half = Math.ceil(count / 2);
    const refused = await tries(part(first, half), step);
    [first, count, last] = refused ? [first, half, refused] : [first + half, count - half, last];
  }
  last = (await tries(part(first, 1), 0)) ?? new Error(`${error.message}. It is no longer refused. Run it again`);
  const name = await ask(rowName(key), part(first, 1));
  return new Error(
    `row ${name} of ${run.pipeline} is refused: ${last.message}. Correct it at the source, then: make ${run.pipeline}`,
  );
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
  const [[twice]] = await to.bigquery.query(named(run, duplicateKeysStatement(to.contract, address(to, staging.name))));
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
 * @param replaced the condition on t under which a row is replaced instead, newer or not.
 */
export function mergeStatement(
  contract: Contract,
  target: string,
  staging: string,
  version: string,
  replaced: string = `s.\`${version}\` >= t.\`${version}\``,
): string {
  const columns = contract.fields.map(({ name }) => `\`${name}\``);
  const values = columns.filter((column) => !contract.key.includes(column.slice(1, -1)));
  return [
    `MERGE ${target} t USING ${staging} s`,
    `ON ${contract.key.map((name) => `t.\`${name}\` = s.\`${name}\``).join(" AND ")}`,
    `WHEN MATCHED AND ${replaced} THEN UPDATE SET ${values.map((column) => `${column} = s.${column}`).join(", ")}`,
    `WHEN NOT MATCHED THEN INSERT (${columns.join(", ")}) VALUES (${columns.map((column) => `s.${column}`).join(", ")})`,
  ].join("\n");
}

/** A condition on rows t of the target that reads the parameter @read: they are changed only while they are what was read. */
export interface AsRead {
  condition: string;
  read: string[];
}

/**
 * Runs the MERGE of one staging table. @returns rows inserted and updated; the others were newer at the destination, or, with
 * `asRead`, are no longer what was read.
 */
export async function mergeStaging(
  run: Run,
  to: Destination,
  staging: Staging,
  asRead?: AsRead,
): Promise<{ inserted: number; updated: number }> {
  const [target, from] = [address(to, to.table), address(to, staging.name)];
  const merge = mergeStatement(to.contract, target, from, to.version, asRead?.condition);
  const { insertedRowCount, updatedRowCount } = await change(run, to, `etl_${staging.name}_merge`, merge, asRead);
  return { inserted: Number(insertedRowCount ?? 0), updated: Number(updatedRowCount ?? 0) };
}

/** Every row of the target as one query saw it, page by page. @param columns SQL, each a text. */
export function readKeys<T>(run: Run, to: Destination, columns: string): AsyncIterable<T> {
  const query = named(run, `SELECT ${columns} FROM ${address(to, to.table)}`);
  return to.bigquery.createQueryStream(query) as AsyncIterable<T>;
}

/** Deletes the rows of the target that `asRead` holds for. */
export function deleteStatement(target: string, { condition }: Pick<AsRead, "condition">): string {
  return `DELETE FROM ${target} t WHERE ${condition}`;
}

/** Runs it. @returns rows deleted. */
export async function deleteRows(run: Run, to: Destination, asRead: AsRead): Promise<number> {
  const sql = deleteStatement(address(to, to.table), asRead);
  const { deletedRowCount } = await change(run, to, `etl_${to.table}_${run.id}_delete_${randomUUID()}`, sql, asRead);
  return Number(deletedRowCount ?? 0);
}

/** Runs a statement that changes rows, as the job of that id; it is cancelled where the run is stopped. @returns what it changed. */
async function change(
  run: Run,
  { bigquery }: Destination,
  jobId: string,
  sql: string,
  asRead: AsRead | undefined,
): Promise<Record<string, string | undefined>> {
  const job = bigquery.job(jobId);
  using _cancel = run.onStop(() => job.cancel());
  const parameters = asRead && { params: { read: asRead.read }, types: { read: ["STRING"] } };
  await bigquery.createQueryJob({ ...named(run, sql), jobId, ...parameters }).catch(ignoreAlreadyThere);
  await job.getQueryResults({ maxResults: 0 }); // waits for the end, and throws the job's error
  const [metadata] = await job.getMetadata();
  if (metadata.status?.state !== "DONE" || metadata.status.errorResult) {
    throw new Error(
      `BigQuery job ${jobId} ended without a result: ${metadata.status?.errorResult?.message ?? metadata.status?.state}`,
    );
  }
  return metadata.statistics.query.dmlStats;
}

/** A query that can be found by its run: in the console by its text, in the list of jobs by its labels. */
const named = (run: Run, sql: string): { query: string; labels: Record<string, string> } => ({
  query: `/* etl:${run.pipeline} run=${run.id} */\n${sql}`,
  labels: labels(run),
});

export function labels(run: Run): Record<string, string> {
  return { etl_pipeline: run.pipeline, etl_run: run.id };
}
