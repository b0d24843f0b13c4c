/**
 * Write, audit, publish. The raw tables are copied into a dataset of the run, where each model is built and checked. Then one atomic job
 * puts its rows into the published table.
 */
import type { BigQuery, TableField, TableMetadata } from "@google-cloud/bigquery";
import { readIntervals } from "../alerts.ts";
import { bigqueryVariables, connectBigQuery, ignoreAlreadyThere, type JobResource, labels, runJob } from "../bigquery/client.ts";
import { type Env, flag, name, number, optional, required, UsageError } from "../env.ts";
import { thousands } from "../log.ts";
import { explain } from "../main.ts";
import { pushMetrics } from "../metrics.ts";
import { type Run, runVariables } from "../run.ts";
import { table } from "../table.ts";
import type { Model, Statement } from "./models.ts";

export const viewsVariables = {
  ...runVariables,
  ...bigqueryVariables,
  BIGQUERY_VIEWS_DATASET: required(name),
  ONLY: optional(name),
  ALLOW_STALE: optional(flag, false),
  ALLOW_SHRINK: optional(flag, false),
  MAX_BYTES_BILLED: optional(number(10 * 2 ** 20, 1e15), 100e9),
};

/**
 * Compares the watermarks of the raw tables with their intervals in ops/alerts.yml: built from old rows, a model is wrong and looks new.
 * @throws Error where one is older than two of its intervals, unless `allowed`.
 */
export async function checkFresh(run: Run, raw: string[], allowed: boolean): Promise<void> {
  const intervals = readIntervals();
  const expected = JSON.stringify(Object.fromEntries(raw.map((name) => [name, intervals.get(name) ?? 0])));
  const stale = await run.etl<{ warning: string }[]>`
    select format('%s is stale: its watermark is %s, its interval in ops/alerts.yml %s', pipeline,
      coalesce(etl.duration(age) || ' old', 'missing'), etl.duration(seconds::float8)) as warning
    from jsonb_each_text(${expected}::text::jsonb) intervals (pipeline, seconds) left join etl.watermarks using (pipeline)
    cross join lateral (select extract(epoch from now() - watermark)::float8) a (age)
    where age <= 2 * seconds::float8 is not true order by pipeline`;
  const all = stale.map(({ warning }) => warning).join("; ");
  if (all && !allowed)
    throw new Error(`${all}. Nothing was built. Next: make ${raw.join(" ")}, then make views; or make views ALLOW_STALE=1`);
  for (const { warning } of stale) run.log("warning", { warning });
}

const jobOf = ({ run, bigquery }: { run: Run; bigquery: BigQuery }, name: string, configuration: object): Promise<JobResource> =>
  runJob(run, bigquery, `etl_${run.id}_${name}`, configuration);

const copy = (projectId: string, from: string, to: string, tableId: string): object => {
  const [sourceTable, destinationTable] = [from, to].map((datasetId) => ({ projectId, datasetId, tableId }));
  return { copy: { sourceTable, destinationTable, writeDisposition: "WRITE_TRUNCATE" } };
};

type Build = Awaited<ReturnType<typeof createBuild>>;

/**
 * Creates the dataset in which the models of this run are built, and copies the raw tables into it (which costs nothing), so that all
 * models see the same rows. Its tables expire after a day, and the next run drops it.
 * @throws UsageError where the dataset of the published tables does not exist.
 */
export async function createBuild(run: Run, env: Env<typeof viewsVariables>, raw: string[]) {
  const [bigquery, published] = [connectBigQuery(env), env.BIGQUERY_VIEWS_DATASET];
  const [exists] = await bigquery.dataset(published).exists();
  if (!exists)
    throw new UsageError(`dataset ${env.BIGQUERY_PROJECT}.${published} (BIGQUERY_VIEWS_DATASET) does not exist. Run: make migrate`);
  const prefix = `${published}_build_`;
  const [datasets] = await bigquery.getDatasets({ filter: "labels.etl_pipeline:views" });
  const earlier = datasets.filter(({ id = "" }) => id.startsWith(prefix) && id < prefix + run.id);
  await Promise.all(earlier.map((dataset) => dataset.delete({ force: true })));
  const build = { run, env, bigquery, dataset: prefix + run.id, billed: new Map<string, number>() };
  const options = { labels: labels(run), defaultTableExpirationMs: String(24 * 3_600_000) };
  await bigquery.createDataset(build.dataset, options).catch(ignoreAlreadyThere);
  const copyRaw = (name: string) => copy(env.BIGQUERY_PROJECT, env.BIGQUERY_DATASET, build.dataset, name);
  await Promise.all(raw.map((name) => jobOf(build, `copy_${name}`, copyRaw(name)))).catch(({ message }: Error) => {
    throw new Error(`cannot copy the raw tables ${raw.join(", ")}: ${message}. Run: make doctor`);
  });
  run.log("copy", { tables: raw.join(), seconds: run.seconds() });
  return build;
}

/**
 * Runs a statement for the model, and adds what it was billed to the model's. BigQuery refuses, without charge, one above MAX_BYTES_BILLED.
 * @throws Error that begins with the file, also where BigQuery read a table that was not found in it.
 */
async function runStatement(build: Build, model: Model, statement: Omit<Statement, "name">, job: string, into = {}): Promise<JobResource> {
  const { bigquery, dataset, env, billed } = build;
  const { file, sql, reads } = statement;
  const defaultDataset = { projectId: bigquery.projectId, datasetId: dataset };
  const query = { query: sql, useLegacySql: false, defaultDataset, maximumBytesBilled: String(env.MAX_BYTES_BILLED), ...into };
  const done = await jobOf(build, `${model.name}_${job}`, { query }).catch((error: Error) => {
    const [, bytes] = /bytes billed.* (\d+) or higher/.exec(error.message) ?? [];
    const next = bytes ? ` Let it read less, or run: make views ONLY=${model.name} MAX_BYTES_BILLED=${bytes}` : "";
    error.message = `${file}: ${error.message}${next}`;
    throw error;
  });
  const { totalBytesBilled = 0, referencedTables = [] } = done.statistics.query;
  billed.set(model.name, (billed.get(model.name) ?? 0) + Number(totalBytesBilled));
  for (const { datasetId, tableId } of referencedTables)
    if (datasetId !== dataset || !reads.includes(tableId))
      throw new Error(`${file}: it read ${datasetId}.${tableId}. Name each table behind FROM or JOIN, without a dataset`);
  return done;
}

/** Builds the model in the build dataset. */
export async function buildModel(build: Build, model: Model, attempt: number): Promise<void> {
  await runStatement(build, model, model, `build_${attempt}`);
}

/** Runs the model's checks. @throws Error with each that returned rows, and the first of these. */
export async function runChecks(build: Build, model: Model, attempt: number): Promise<void> {
  const results = model.checks.map(async (check) => {
    const { jobReference } = await runStatement(build, model, check, `${check.name}_${attempt}`);
    const options = { maxResults: 1, autoPaginate: false };
    const [[row], , answer]: JobResource = await build.bigquery.job(jobReference.jobId).getQueryResults(options);
    return row ? `${check.file} returned ${thousands(answer.totalRows)} rows, for example ${JSON.stringify(row)}` : "";
  });
  const failed = (await Promise.all(results)).filter(Boolean);
  if (failed.length) throw new Error(failed.join("; "));
}

/**
 * Puts the model's rows into the published table, by one atomic job. A copy creates the table. Later runs query into it with
 * WRITE_TRUNCATE_DATA, which keeps its row access policies, policy tags, descriptions and labels, and may add columns; a copy would remove
 * the policies. See docs.cloud.google.com/bigquery/docs: reference/auditlogs/rest/Shared.Types/BigQueryAuditMetadata.WriteDisposition,
 * reference/rest/v2/Job (schemaUpdateOptions), using-row-level-security-with-features (Copy jobs).
 * @throws Error where rows, columns or layout must not replace the published ones, with the command that lets them. @returns rows.
 */
export async function publishModel(build: Build, model: Model, attempt: number): Promise<number> {
  const { bigquery, dataset, env } = build;
  const [{ name, file }, to, job] = [model, env.BIGQUERY_VIEWS_DATASET, `publish_${attempt}`];
  const published = bigquery.dataset(to).table(name);
  const [made]: [TableMetadata, unknown] = await bigquery.dataset(dataset).table(name).getMetadata();
  const [exists] = await published.exists();
  const [before]: [TableMetadata?, unknown?] = exists ? await published.getMetadata() : [];
  const [rows, rowsBefore] = [Number(made.numRows), Number(before?.numRows ?? 0)];
  const shrinks = `${file}: it has ${thousands(rows)} rows, and the published ${to}.${name} ${thousands(rowsBefore)}`;
  if (!env.ALLOW_SHRINK && (rows === 0 || rows * 2 < rowsBefore))
    throw new Error(`${shrinks}. If that is right: make views ONLY=${name} ALLOW_SHRINK=1`);
  const lost = before ? parts(before).filter((part) => !parts(made).includes(part)) : [];
  const drop = `DROP TABLE ${to}.${name} (its access policies go with it); then: make views ONLY=${name}`;
  if (lost.length) throw new Error(`${file} no longer has ${lost.join(", ")} of the published ${to}.${name}. Run: ${drop}`);
  if (!before) await jobOf(build, `${name}_${job}`, copy(env.BIGQUERY_PROJECT, dataset, to, name));
  else
    await runStatement(build, model, { file, sql: `SELECT * FROM \`${name}\``, reads: [name] }, job, {
      destinationTable: before.tableReference,
      writeDisposition: "WRITE_TRUNCATE_DATA",
      schemaUpdateOptions: ["ALLOW_FIELD_ADDITION", "ALLOW_FIELD_RELAXATION"],
    });
  // A query brings no descriptions.
  const [now] = await published.getMetadata();
  const described = new Map(made.schema?.fields?.map(({ name, description }) => [name, description]));
  const fields = now.schema.fields.map((field: TableField) => ({ ...field, description: described.get(field.name) ?? field.description }));
  await published.setMetadata({ description: made.description, schema: { fields }, ...noExpiry(now) } as object);
  return rows;
}

/** What takes a table's expiry from it, and its partitions': a dataset may give its tables one, which their creation cannot refuse. */
export const noExpiry = ({ timePartitioning }: TableMetadata): object => ({
  expirationTime: null,
  ...(timePartitioning && { timePartitioning: { ...timePartitioning, expirationMs: null } }),
});

/** What a new table must have too to replace the published one. A change inside a column is BigQuery's to refuse. */
function parts({ schema, timePartitioning: time, rangePartitioning, clustering }: TableMetadata): string[] {
  const columns = schema?.fields?.map(({ name, type }: TableField) => `column ${name} ${type}`) ?? [];
  const layout = { by: time?.field, type: time?.type, range: rangePartitioning, cluster: clustering?.fields };
  return [...columns, `PARTITION BY or CLUSTER BY ${JSON.stringify(layout)}`];
}

/** What became of a model: rows, bytes billed for its statements and checks, and why it was not published. */
type Outcome = Record<"rows" | "checks" | "bytes_billed" | "seconds", number> & { model: string; error: string | null };

/** A model's line in the log, and in the table. */
const describe = ({ error, ...outcome }: Outcome) => ({ ...outcome, published: error ? `no: ${error.split("\n")[0]}` : "yes" });

/** Does `work`, which returns rows, for each model once those that it needs are published. A failure holds back only those that need it. */
export async function eachModel({ run, billed }: Build, models: Model[], work: (model: Model) => Promise<number>): Promise<Outcome[]> {
  const outcomes = new Map<string, Promise<Outcome>>();
  const one = async (model: Model): Promise<Outcome> => {
    const needed = await Promise.all(model.needs.map((name) => outcomes.get(name)));
    const missing = needed.flatMap((need) => (need?.error ? need.model : []));
    const started = run.seconds();
    const outcome: Outcome = { model: model.name, rows: 0, checks: model.checks.length, bytes_billed: 0, seconds: 0, error: null };
    try {
      if (missing.length) throw new Error(`it needs ${missing.join(", ")}`);
      outcome.rows = await work(model);
    } catch (error) {
      outcome.error = explain(error as Error);
    }
    outcome.bytes_billed = billed.get(model.name) ?? 0;
    outcome.seconds = Number((run.seconds() - started).toFixed(3));
    run.log("model", describe(outcome));
    return outcome;
  };
  for (const model of models) outcomes.set(model.name, one(model)); // in order: what a model needs has its promise before it
  return await Promise.all(outcomes.values());
}

/** Prints the table, pushes the metrics of each model. @throws Error that names the models that were not published, and why. */
export async function reportModels({ run, env, dataset }: Build, outcomes: Outcome[]): Promise<void> {
  process.stdout.write(`${table(outcomes.map(describe))}\n`);
  await run.etl`insert into etl.models ${run.etl(outcomes.map((outcome) => ({ run_id: run.id, ...outcome })))}`;
  const failed = outcomes.filter(({ error }) => error);
  run.totals.chunks = outcomes.length - failed.length;
  for (const { rows } of outcomes) run.totals.rows += rows;
  const now = Date.now() / 1000;
  const pushed = outcomes.map(async ({ model, rows, bytes_billed, seconds, error }) => {
    const built = { etl_model_rows: rows, etl_model_bytes: bytes_billed, etl_model_duration_seconds: seconds };
    const values = { ...built, etl_model_last_success_timestamp_seconds: now };
    if (!error) await pushMetrics(env.PUSHGATEWAY_URL, run.pipeline, values, { model });
  });
  await Promise.all(pushed).catch(({ message: error }: Error) => {
    run.log("warning", { warning: "the models' metrics were not pushed; the run itself is not affected", error });
  });
  if (!failed.length) return;
  const list = failed.map(({ model, error }) => `  ${model}: ${error}\n`).join("");
  const next = `Their rows are in dataset ${dataset}. Correct the models, then run: make views`;
  throw new Error(`${failed.length} of ${outcomes.length} models failed; their published tables stay as they were\n${list}${next}`);
}
