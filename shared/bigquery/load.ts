/**
 * BigQuery: a staging table per chunk and attempt, a streamed load job, and one MERGE by primary key.
 */
import { pipeline } from "node:stream/promises";
import type { BigQuery, Job } from "@google-cloud/bigquery";
import { copyJsonLines, type RowStream } from "../copy.ts";
import { UsageError } from "../env.ts";
import { progress, thousands } from "../log.ts";
import type { Run } from "../run.ts";
import { quote } from "../session.ts";
import { type BigQueryEnv, connectBigQuery, ignoreAlreadyThere, isRefusal, labels, ShortLoad } from "./client.ts";
import { type Contract, checkDestination } from "./contract.ts";
import { freeName, rowName } from "./types.ts";

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

/** What a chunk without rows moved. */
export const noRows = { rows: 0, bytes: 0, inserted: 0, updated: 0 };

/** How rows are read: sql/NAME.sql, and around it, or around some of its rows, the SELECT of JSON lines. */
export interface Extraction {
  url: string;
  select: string;
  lines(select: string): string;
}

/**
 * The pipeline's table, compared with its contract.
 * @throws UsageError where it does not exist or differs.
 */
export async function openDestination(env: BigQueryEnv, contract: Contract, version: string): Promise<Destination> {
  const bigquery = connectBigQuery(env);
  const [dataset, table] = [env.BIGQUERY_DATASET, contract.pipeline];
  const where = `destination table ${env.BIGQUERY_PROJECT}.${dataset}.${table}`;
  const asked = bigquery.dataset(dataset).table(table).getMetadata();
  const [metadata] = await asked.catch(({ code, message }: { code?: number; message: string }) => {
    if (code === 404) throw new UsageError(`${where} does not exist. Run: make migrate`);
    const at = env.BIGQUERY_ENDPOINT ? "BIGQUERY_ENDPOINT" : "BIGQUERY_PROJECT and the Google credentials";
    throw new Error(`cannot read the ${where}: ${message}. Check ${at}; for the local stack: make up`);
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
  const drop = async (): Promise<void> => {
    await table.delete({ ignoreNotFound: true }).catch(({ message }: Error) => {
      const warning = `staging table ${name} was not dropped and expires in ${STAGING_HOURS} h`;
      run.log("warning", { warning, error: message });
    });
  };
  return { name, [Symbol.asyncDispose]: drop };
}

/**
 * Extracts the rows of [from, to) into the staging table: one COPY, one load job, and the rows read compared with the rows loaded. A row
 * that the source or BigQuery refuses, for whatever reason, is named.
 * @returns what was sent.
 */
export async function loadChunk(
  run: Run,
  rows: Extraction,
  to: Destination,
  staging: Staging,
  chunk: { from: string; to: string },
): Promise<RowStream["sent"]> {
  const load = async (select: string, into: Staging): Promise<RowStream["sent"]> => {
    await using stream = copyJsonLines(rows.url, rows.lines(select), run.session, chunk);
    const loaded = await loadLines(run, to, into, stream);
    if (loaded !== stream.sent.rows) throw new ShortLoad(stream.sent.rows, loaded);
    return stream.sent;
  };
  return await load(rows.select, staging).catch(async (error: Error) => {
    if (!isRefusal(error)) throw error;
    let step = 0;
    throw await nameRefused(run, to.contract.key, rows.select, chunk, async (select) => {
      await using part = await createStaging(run, to, `${staging.name.split("_").at(-1)}_part_${++step}`);
      return await load(select, part).then(
        () => undefined,
        (error) => (isRefusal(error) ? error : Promise.reject(error)),
      );
    });
  });
}

/**
 * Streams JSON lines into the staging table as one load job, whose id follows from the attempt.
 * @returns the rows that the job says it wrote. A stream that ended early would be a successful short load: compare
 * this with the rows sent.
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

/**
 * Reads the rows of a chunk again in halves, in the order of their keys, until one is left: log2(n) steps.
 * @param load loads some rows, and returns the error if they are refused.
 * @returns the error that names the row by its key.
 */
async function nameRefused(
  run: Run,
  key: string[],
  select: string,
  { from, to }: { from: string; to: string },
  load: (select: string) => Promise<Error | undefined>,
): Promise<Error> {
  const ask = async (value: string, rows: string): Promise<string | undefined> =>
    await run.source.begin("read only", async (sql) => {
      await sql`select set_config('etl.from', ${from}, true), set_config('etl.to', ${to}, true)`;
      return (await sql.unsafe<{ value: string }[]>(`select ${value} as value from (${rows}) q`))[0]?.value;
    });
  const part = (first: number, rows: number): string =>
    `select * from (${select}) q order by ${key.map(quote).join(", ")} offset ${first} limit ${rows}`;
  let [first, count] = [0, Number(await ask("count(*)", select))];
  run.log("refused", { rows: count, because: "a row is refused; reading them again in halves to name it" });
  for (; count > 1; ) {
    const half = Math.ceil(count / 2);
    [first, count] = (await load(part(first, half))) ? [first, half] : [first + half, count - half];
  }
  const refused = await load(part(first, 1));
  const row = await ask(rowName(key), part(first, 1));
  const why = refused ? `is refused: ${refused.message}. Correct it at the source` : "was refused, and no longer is";
  return new Error(`row ${row} of ${run.pipeline} ${why}, then: make ${run.pipeline}`);
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
    `sql/${run.pipeline}.sql returned the key ${JSON.stringify(twice)} more than once; nothing of this chunk was ` +
      `merged. Each row needs its own ${to.contract.key.join(", ")}: check the source's primary key, and joins in ` +
      `that file.`,
  );
}

/** A table of the destination's dataset, as SQL names it. */
export const address = ({ bigquery, dataset }: Destination, table: string): string =>
  `\`${bigquery.projectId}.${dataset}.${table}\``;

/**
 * The upsert: one MERGE on the primary key. A row at the destination that is newer than the staged one stays, so that a
 * run that was slow, or a window read again, never puts an old version back.
 * @param staging a table, or a subquery in parentheses.
 * @param compared a column of `staging` with the version that was compared: a row is replaced while it still has that one,
 * newer or not.
 */
export function mergeStatement(
  { fields, key }: Contract,
  target: string,
  staging: string,
  version: string,
  compared?: string,
): string {
  const [t, s] = [freeName(fields, "t"), freeName(fields, "s")];
  const columns = fields.map(({ name }) => `\`${name}\``);
  const values = columns.filter((column) => !key.includes(column.slice(1, -1)));
  const replaced = compared
    ? `${t}.\`${version}\` IS NOT DISTINCT FROM ${s}.\`${compared}\``
    : `${s}.\`${version}\` >= ${t}.\`${version}\``;
  return [
    `MERGE ${target} AS ${t} USING ${staging} AS ${s}`,
    `ON ${key.map((name) => `${t}.\`${name}\` = ${s}.\`${name}\``).join(" AND ")}`,
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
): Promise<Record<"inserted" | "updated" | "deleted", number>> {
  const job = bigquery.job(jobId);
  using _cancel = run.onStop(() => job.cancel());
  await bigquery.createQueryJob({ ...named(run, sql), jobId }).catch(ignoreAlreadyThere);
  await job.getQueryResults({ maxResults: 0 }); // waits for the end, and throws the job's error
  const [{ status, statistics }] = await job.getMetadata();
  if (status?.state !== "DONE" || status.errorResult)
    throw new Error(`BigQuery job ${jobId} ended without a result: ${status?.errorResult?.message ?? status?.state}`);
  const { insertedRowCount = 0, updatedRowCount = 0, deletedRowCount = 0 } = statistics.query.dmlStats ?? {};
  return { inserted: Number(insertedRowCount), updated: Number(updatedRowCount), deleted: Number(deletedRowCount) };
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
