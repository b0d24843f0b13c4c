/**
 * Write, audit, publish: the raw tables are copied into a dataset of the run, where each model is made and checked; then one atomic job
 * puts its rows into the published table.
 */
import { setTimeout as delay } from "node:timers/promises";
import { isDeepStrictEqual } from "node:util";
import type { TableField, TableMetadata } from "@google-cloud/bigquery";
import { readIntervals } from "../alerts.ts";
import { bigqueryVariables, connectBigQuery, ignoreAlreadyThere, labels } from "../bigquery/client.ts";
import { type Env, flag, like, name, number, optional, required, UsageError } from "../env.ts";
import { thousands } from "../log.ts";
import { type Metrics, pushMetrics } from "../metrics.ts";
import { newRunId, type Run, runVariables } from "../run.ts";
import { duration, table } from "../table.ts";
import type { Model, Statement } from "./models.ts";

export const viewsVariables = {
  ...runVariables,
  ...bigqueryVariables,
  BIGQUERY_VIEWS_DATASET: required(name),
  ONLY: optional(like(/^[A-Za-z_]\w*$/, "may hold letters, digits and _ only")),
  DRY_RUN: optional(flag, false),
  ALLOW_STALE: optional(flag, false),
  ALLOW_SHRINK: optional(flag, false),
  MAX_BYTES_BILLED: optional(number(10 * 2 ** 20, 1e15), 100e9),
};

/**
 * Compares the watermarks of raw tables with their intervals in ops/alerts.yml: a model of a stuck pipeline is a wrong answer that looks new.
 * @throws Error where one is older than two of its intervals, unless `allowed`.
 */
export async function checkFresh(run: Run, raw: string[], allowed: boolean): Promise<void> {
  const intervals = readIntervals();
  const rows = await run.etl<{ pipeline: string; watermark: string; age: number | null }[]>`
    select t.pipeline, replace(date_trunc('second', watermark)::text, ' ', 'T') as watermark, extract(epoch from now() - watermark)::float8 as age
    from unnest(${`{${raw.join()}}`}::text::text[]) t (pipeline) left join etl.watermarks using (pipeline)`;
  const stale = rows.flatMap(({ pipeline, watermark, age }) => {
    const interval = intervals.get(pipeline);
    if (age === null) return `${pipeline} has no watermark: it never ran`;
    if (interval && age <= 2 * interval) return [];
    const expected = interval ? duration(interval) : "not in ops/alerts.yml";
    return `${pipeline} is stale: its watermark ${watermark} is ${duration(age)} old, its interval is ${expected}`;
  });
  if (stale.length && !allowed)
    throw new Error(
      `${stale.join("; ")}. Nothing was built. Next: make ${raw.join(" ")}, then make views; or make views ALLOW_STALE=1`,
    );
  for (const warning of stale) run.log("warning", { warning });
}

type Build = Awaited<ReturnType<typeof createBuild>>;

/** Creates the dataset in which the models of this run are made, and drops those of runs whose tables have expired. */
export async function createBuild(run: Run, env: Env<typeof viewsVariables>) {
  const bigquery = connectBigQuery(env);
  const published = env.BIGQUERY_VIEWS_DATASET;
  const [exists] = await bigquery.dataset(published).exists();
  if (!exists)
    throw new UsageError(
      `dataset ${env.BIGQUERY_PROJECT}.${published} (BIGQUERY_VIEWS_DATASET) does not exist. Run: make migrate`,
    );
  const [hours, prefix] = [24, `${published}_build_`]; // killed runs leave their dataset, and failed ones keep it
  const [datasets] = await bigquery.getDatasets({ filter: "labels.etl_pipeline:views" });
  const oldest = prefix + newRunId(Date.now() - hours * 3_600_000);
  const old = datasets.filter(({ id = "" }) => id.startsWith(prefix) && id < oldest);
  await Promise.all(old.map((dataset) => dataset.delete({ force: true })));
  const dataset = bigquery.dataset(prefix + run.id);
  const options = { labels: labels(run), defaultTableExpirationMs: String(hours * 3_600_000) };
  await dataset.create(options).catch(ignoreAlreadyThere);
  const build = {
    run,
    env,
    bigquery,
    dataset: prefix + run.id,
    /** Bytes that each model's statements, its checks' too, were billed. */
    billed: new Map<string, number>(),
    /** Leaves the dataset to its expiry, for whoever wants to look at what failed. */
    keep: false,
    [Symbol.asyncDispose]: async () => {
      if (build.keep)
        return run.log("kept", { dataset: dataset.id, because: "a model failed", expires_in_hours: hours });
      await dataset.delete({ force: true }).catch(({ message: error }: Error) => {
        run.log("warning", { warning: `${dataset.id} was not dropped; its tables expire in ${hours} h`, error });
      });
    },
  };
  return build;
}

// biome-ignore lint/suspicious/noExplicitAny: the API's own Job resource
type Job = any;

/** Runs a job to its end; it is cancelled where the run is stopped. @throws Error with the job's error. */
async function runJob({ bigquery, run }: Build, name: string, configuration: object): Promise<Job> {
  run.signal.throwIfAborted();
  const jobId = `etl_${run.id}_${name}`;
  const job = bigquery.job(jobId);
  using _cancel = run.onStop(() => job.cancel());
  const created = bigquery.createJob({ jobId, configuration: { ...configuration, labels: labels(run) } });
  await created.catch(ignoreAlreadyThere);
  for (let pause = 50; ; pause = Math.min(2 * pause, 2000)) {
    const [metadata] = await job.getMetadata();
    const { state, errorResult } = metadata.status ?? {};
    if (errorResult) throw Object.assign(new Error(errorResult.message), { errors: [errorResult] });
    if (state === "DONE") return metadata;
    await delay(pause, undefined, { signal: run.signal });
  }
}

const copy = ({ bigquery: { projectId } }: Build, from: string, to: string, tableId: string): object => ({
  copy: {
    sourceTable: { projectId, datasetId: from, tableId },
    destinationTable: { projectId, datasetId: to, tableId },
    writeDisposition: "WRITE_TRUNCATE",
  },
});

/** Copies the raw tables into the build dataset (a copy job costs nothing), so that all models see the same rows. */
export async function copyRaw(build: Build, raw: string[]): Promise<void> {
  const { BIGQUERY_DATASET: from } = build.env;
  const copied = raw.map(async (name) => {
    await runJob(build, `copy_${name}`, copy(build, from, build.dataset, name)).catch((error) => {
      if (error.code !== 404 && error.errors?.[0]?.reason !== "notFound") throw error;
      throw new UsageError(`raw table ${from}.${name} does not exist. Run: make migrate ${name}`);
    });
    build.run.log("copy", { table: name, seconds: build.run.seconds() });
  });
  await Promise.all(copied);
}

/** Runs a query for the model, and adds what it was billed. BigQuery refuses, without charge, more than MAX_BYTES_BILLED. */
async function runQuery(build: Build, model: string, job: string, query: string, into: object = {}): Promise<Job> {
  const { bigquery, dataset: datasetId, env, billed } = build;
  const defaultDataset = { projectId: bigquery.projectId, datasetId };
  const maximumBytesBilled = String(env.MAX_BYTES_BILLED);
  const configuration = { query, useLegacySql: false, defaultDataset, maximumBytesBilled, ...into };
  const done = await runJob(build, job, { query: configuration }).catch((error) => {
    const [, bytes] = /bytes billed.* (\d+) or higher/.exec(error.message) ?? [];
    if (!bytes) throw error;
    throw new Error(
      `it would be billed ${bytes} bytes; MAX_BYTES_BILLED is ${maximumBytesBilled}. Let it read less, or run: ` +
        `make views ONLY=${model} MAX_BYTES_BILLED=${bytes}`,
    );
  });
  billed.set(model, (billed.get(model) ?? 0) + Number(done.statistics.query.totalBytesBilled));
  return done;
}

/** Runs a file's statement. @throws Error that begins with the file, also where BigQuery read a table that was not found in it. */
async function runStatement(build: Build, model: Model, { file, sql, reads }: Statement, job: string): Promise<Job> {
  try {
    const done = await runQuery(build, model.name, job, sql);
    for (const { datasetId, tableId } of done.statistics.query.referencedTables ?? [])
      if (datasetId !== build.dataset || !reads.includes(tableId))
        throw new Error(`table ${datasetId}.${tableId} was not found in the file, but read`);
    return done;
  } catch (error) {
    const message = (error as Error).message.replaceAll(`${build.bigquery.projectId}:`, "");
    const hint = /table.* not found/i.test(message)
      ? ". Name each table without a dataset, behind a FROM or JOIN of its own"
      : "";
    (error as Error).message = `${file}: ${message.replaceAll(`${build.dataset}.`, "")}${hint}`;
    throw error;
  }
}

/** Makes the model in the build dataset. @returns its table. */
export async function buildModel(build: Build, model: Model, attempt: number): Promise<TableMetadata> {
  await runStatement(build, model, model, `${model.name}_build_${attempt}`);
  const [metadata] = await build.bigquery.dataset(build.dataset).table(model.name).getMetadata();
  return metadata;
}

/** Runs the model's checks. @throws Error with each that returned rows, and the first of these. */
export async function runChecks(build: Build, model: Model, attempt: number): Promise<void> {
  const results = model.checks.map(async (check) => {
    const { jobReference } = await runStatement(build, model, check, `${model.name}_${check.name}_${attempt}`);
    const options = { maxResults: 1, autoPaginate: false };
    const [[row], , answer]: Job = await build.bigquery.job(jobReference.jobId).getQueryResults(options);
    return row ? `${check.file} returned ${thousands(answer.totalRows)} rows, for example ${JSON.stringify(row)}` : "";
  });
  const failed = (await Promise.all(results)).filter(Boolean);
  if (failed.length) throw new Error(failed.join("; "));
}

/**
 * Puts the model's rows into the published table, by one atomic job. A copy makes the table. Later runs query into it with WRITE_TRUNCATE_DATA,
 * which keeps its row access policies, policy tags, descriptions and labels, and may add columns; a copy would remove the policies. See
 * docs.cloud.google.com/bigquery/docs: reference/auditlogs/rest/Shared.Types/BigQueryAuditMetadata.WriteDisposition, reference/rest/v2/Job
 * (schemaUpdateOptions), using-row-level-security-with-features (Copy jobs).
 * @throws Error where rows, columns or layout are not to replace the published ones, with the command that lets them.
 */
export async function publishModel(build: Build, model: Model, made: TableMetadata, attempt: number): Promise<void> {
  const { bigquery, dataset, env } = build;
  const [{ name, file }, to, job] = [model, env.BIGQUERY_VIEWS_DATASET, `${model.name}_publish_${attempt}`];
  const published = bigquery.dataset(to).table(name);
  const [exists] = await published.exists();
  const [before]: [TableMetadata, unknown?] = exists ? await published.getMetadata() : [{ numRows: "0" }];
  const [rows, rowsBefore] = [Number(made.numRows), Number(before.numRows)];
  if (!env.ALLOW_SHRINK && (rows === 0 || rows * 2 < rowsBefore))
    throw new Error(
      `${file}: it has ${thousands(rows)} rows, and the published ${to}.${name} ` +
        `${exists ? thousands(rowsBefore) : "does not exist"}. If that is right: make views ONLY=${name} ` +
        `ALLOW_SHRINK=1`,
    );
  const lost = exists ? lostParts(before, made) : [];
  if (lost.length)
    throw new Error(
      `${file} no longer has ${lost.join(", ")} of the published ${to}.${name}. Run: DROP TABLE ${to}.${name} ` +
        `(its access policies go with it); then: make views ONLY=${name}`,
    );
  if (!exists) await runJob(build, job, copy(build, dataset, to, name));
  else
    await runQuery(build, name, job, `SELECT * FROM \`${name}\``, {
      destinationTable: { projectId: bigquery.projectId, datasetId: to, tableId: name },
      writeDisposition: "WRITE_TRUNCATE_DATA",
      schemaUpdateOptions: ["ALLOW_FIELD_ADDITION", "ALLOW_FIELD_RELAXATION"],
    });
  const [{ description, schema, expirationTime }] = await published.getMetadata();
  const fields = describe(schema.fields, made.schema?.fields);
  const wanted = { description: made.description ?? description, schema: { fields }, expirationTime: undefined };
  // The dataset's default may have set an expiry.
  if (!isDeepStrictEqual({ description, schema, expirationTime }, wanted))
    await published.setMetadata({ ...wanted, expirationTime: null } as object);
}

/** What a table has that another lacks: columns of that name and type, PARTITION BY and CLUSTER BY. */
function lostParts(before: TableMetadata, made: TableMetadata): string[] {
  const shape = ({ name, type, mode, precision, scale, maxLength, fields }: TableField): string =>
    JSON.stringify([name, type, mode === "REPEATED", precision, scale, maxLength, fields?.map(shape)]);
  const layout = ({ timePartitioning: time, rangePartitioning, clustering }: TableMetadata): string =>
    JSON.stringify([time?.type, time?.field, rangePartitioning, clustering]);
  const shapes = made.schema?.fields?.map(shape) ?? [];
  const fields: TableField[] =
    before.schema?.fields?.filter((field: TableField) => !shapes.includes(shape(field))) ?? [];
  const columns = fields.map(({ name, type }) => `column ${name} ${type}`);
  return layout(before) === layout(made) ? columns : [...columns, "PARTITION BY or CLUSTER BY"];
}

/** The fields, described as others of the same names are; where those are not, as they were. */
function describe(fields: TableField[], others: TableField[] = []): TableField[] {
  return fields.map((field) => {
    const { description, fields } = others.find(({ name }) => name === field.name) ?? {};
    const nested = field.fields && { fields: describe(field.fields, fields) };
    return { ...field, ...(description && { description }), ...nested };
  });
}

/** What became of a model. */
export interface Outcome {
  model: Model;
  rows: number;
  /** What its statements and checks were billed, also where it failed. */
  bytes: number;
  seconds: number;
  /** Why it was not published. */
  error?: Error;
}

/** Does `work` for each model once those that it needs are published; one that fails holds back only those that need it. */
export async function eachModel(
  { run, billed }: Build,
  models: Model[],
  work: (model: Model) => Promise<TableMetadata>,
): Promise<Outcome[]> {
  const outcomes = new Map<string, Promise<Outcome>>();
  const one = async (model: Model): Promise<Outcome> => {
    const outcome: Outcome = { model, rows: 0, bytes: 0, seconds: 0 };
    const needed = await Promise.all(model.needs.map((name) => outcomes.get(name)));
    const started = run.seconds();
    try {
      const missing = needed.flatMap((need) => (need?.error ? need.model.name : []));
      if (missing.length) throw new Error(`it needs ${missing.join(", ")}`);
      outcome.rows = Number((await work(model)).numRows);
    } catch (error) {
      outcome.error = error as Error;
    }
    outcome.bytes = billed.get(model.name) ?? 0;
    outcome.seconds = Math.round(1000 * (run.seconds() - started)) / 1000;
    const { rows, bytes, seconds, error } = outcome;
    const fields = error ? { failed: error.message.split("\n")[0] } : { rows, checks: model.checks.length };
    run.log("model", { model: model.name, ...fields, bytes_billed: bytes, seconds });
    return outcome;
  };
  for (const model of models) outcomes.set(model.name, one(model)); // in their order: what a model needs has its promise before it
  return await Promise.all(outcomes.values());
}

/** DRY_RUN=1: prints the models in the order in which they would be built, with the tables that each reads. */
export function reportOrder(models: Model[]): void {
  const row = ({ name, reads, checks }: Model) => ({ model: name, reads: reads.join(", "), checks: checks.length });
  process.stdout.write(`${table(models.map(row))}\n`);
}

/** Prints the table, pushes a metric for each model. @throws Error that names the models that were not published, and why. */
export async function reportModels(build: Build, outcomes: Outcome[]): Promise<void> {
  const { run, env } = build;
  const rows = outcomes.map(({ model, rows, bytes, seconds, error }) => ({
    model: model.name,
    rows: error ? "-" : thousands(rows),
    "bytes billed": thousands(bytes),
    seconds: seconds.toFixed(1),
    checks: error ? "-" : `${model.checks.length} passed`,
    published: error ? `no: ${error.message.split("\n")[0]}` : "yes",
  }));
  process.stdout.write(`${table(rows)}\n`);
  const failed = outcomes.filter(({ error }) => error);
  build.keep = failed.length > 0;
  run.totals.chunks = outcomes.length - failed.length;
  for (const { rows, bytes } of outcomes)
    [run.totals.rows, run.totals.bytes] = [run.totals.rows + rows, run.totals.bytes + bytes];
  const now = Date.now() / 1000;
  const pushed = outcomes.map(({ model, rows, bytes, seconds, error }) => {
    const values: Metrics = error
      ? { etl_model_last_failure_timestamp_seconds: now }
      : { etl_model_last_success_timestamp_seconds: now, etl_model_rows: rows, etl_model_bytes: bytes };
    if (!error) values.etl_model_duration_seconds = seconds;
    return pushMetrics(env.PUSHGATEWAY_URL, run.pipeline, values, { model: model.name });
  });
  await Promise.all(pushed).catch(({ message: error }: Error) => {
    run.log("warning", { warning: "models' metrics were not pushed; the run itself is not affected", error });
  });
  if (!failed.length) return;
  const lines = failed.map(({ model, error }) => `  ${model.name}: ${error?.message}`);
  throw new Error(
    `${failed.length} of ${outcomes.length} models failed, and are published as they were ` +
      `before:\n${lines.join("\n")}\nNext: correct them, then: make views`,
  );
}
