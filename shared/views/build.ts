/**
 * The weekly models. views/NAME.sql is one CREATE OR REPLACE TABLE NAME … AS SELECT with unqualified names, run as it stands
 * (paste it into the console); views/checks/*.sql return the rows that are wrong. Write, audit, publish: the raw tables are
 * copied into a build dataset of the run, where each model is made and checked, and only then copied over the published table.
 */
import { globSync, readFileSync } from "node:fs";
import { basename, join } from "node:path";
import { setTimeout as delay } from "node:timers/promises";
import { isDeepStrictEqual } from "node:util";
import type { BigQuery, Table, TableField, TableMetadata } from "@google-cloud/bigquery";
import { readIntervals } from "../alerts.ts";
import { bigqueryVariables, connectBigQuery, ignoreAlreadyThere, labels } from "../bigquery/client.ts";
import { type Env, flag, like, name, number, optional, required, root, UsageError } from "../env.ts";
import { type Fields, thousands } from "../log.ts";
import { type Metrics, pushMetrics } from "../metrics.ts";
import { pipelines } from "../pipelines.ts";
import { newRunId, type Run, runVariables } from "../run.ts";
import { duration, table } from "../table.ts";

export const viewsVariables = {
  ...runVariables,
  ...bigqueryVariables,
  BIGQUERY_VIEWS_DATASET: required(name),
  ONLY: optional(like(/^[A-Za-z_]\w*$/, "may hold letters, digits and _ only")),
  DRY_RUN: optional(flag, false),
  ALLOW_STALE: optional(flag, false),
  ALLOW_SHRINK: optional(flag, false),
  MAX_PARALLEL: optional(number(1, 32), 4),
  MAX_BYTES_BILLED: optional(number(10 * 2 ** 20, 1e15), 100e9),
  USD_PER_TIB: optional(number(0, 1000, false), 6.25),
};

/** What a run left in its build dataset (it was killed, or a model failed and somebody may want to look) is deleted by BigQuery after this time. */
const BUILD_HOURS = 24;

interface Check {
  /** From the project's root, for messages. */
  file: string;
  sql: string;
  /** Its SELECT, where it stands in the file, so that a message's line and column are the file's: what is dry-run. */
  select: string;
  /** Models and raw tables that it reads. */
  reads: string[];
}

export interface Model extends Check {
  name: string;
  checks: Check[];
  /** The models that have to be published before it: those that it or its checks read. */
  needs: string[];
}

interface Token {
  text: string;
  /** A word or a name in backticks; everything else is a sign. */
  word: boolean;
  at: number;
}

/** The SQL without comments; a string is one sign, whatever is in it. */
function tokens(sql: string): Token[] {
  const forms =
    /--.*|#.*|\/\*[\s\S]*?\*\/|"""[\s\S]*?"""|'''[\s\S]*?'''|"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*'|`[^`]*`|\w+|\S/g;
  return [...sql.matchAll(forms)]
    .filter(([text]) => !/^(--|#|\/\*)/.test(text))
    .map(({ 0: text, index }) => ({ text: text.replaceAll("`", ""), word: /^[\w`]/.test(text), at: index }));
}

/** What follows the statement's own AS, with the text before it blanked. */
function selectOf(sql: string, all: Token[]): string | undefined {
  let depth = 0;
  for (const { text, word, at } of all) {
    if (text === "(") depth += 1;
    else if (text === ")") depth -= 1;
    else if (depth === 0 && word && text.toUpperCase() === "AS")
      return sql.slice(0, at + 2).replaceAll(/./g, " ") + sql.slice(at + 2);
  }
  return undefined;
}

/** Where a FROM clause, and with it its commas between tables, ends. */
const clause = /^(SELECT|WHERE|GROUP|HAVING|QUALIFY|WINDOW|ORDER|LIMIT|UNION|INTERSECT|EXCEPT)$/i;

/** The known tables that the SQL names behind FROM, JOIN or a comma between them. `make check` compares it with Google's analyser. */
export function tablesRead(sql: string, known: string[]): string[] {
  const found = new Set<string>();
  const outside: boolean[] = [];
  let [inFrom, expected] = [false, false];
  for (const { text, word } of tokens(sql)) {
    if (word && /^(FROM|JOIN)$/i.test(text)) [inFrom, expected] = [true, true];
    else if (text === "(") {
      outside.push(inFrom);
      inFrom = expected;
    } else if (text === ")") [inFrom, expected] = [outside.pop() ?? false, false];
    else if (text === ",") expected = inFrom;
    else {
      if (expected && word && known.includes(text)) found.add(text);
      if (word && clause.test(text)) inFrom = false;
      expected = false;
    }
  }
  return [...found].sort();
}

/** The single statement of a file, without the semicolon at its end, as tokens. */
function statement(file: string, sql: string, faults: string[]): Token[] {
  const all = tokens(sql);
  const count = all.filter(({ text }, at) => text !== ";" && (at === 0 || all[at - 1]?.text === ";")).length;
  if (count !== 1) faults.push(`${file} holds ${count} statements: it must hold one`);
  return all;
}

function readFiles(folder: string): { file: string; sql: string }[] {
  const files = globSync(`${folder}/*.sql`, { cwd: root });
  return files.sort().map((file) => ({ file, sql: readFileSync(join(root, file), "utf8") }));
}

/**
 * The models with their checks, in an order in which each comes after those that it needs.
 * @param only this one and what it needs.
 * @throws UsageError with everything that is wrong in the files, and with the names of models that need one another.
 */
export function readModels(only?: string): Model[] {
  const faults: string[] = [];
  const files = readFiles("views").map(({ file, sql }) => ({ file, sql, name: basename(file, ".sql") }));
  const names = files.map(({ name }) => name);
  const known = [...names, ...pipelines()];
  const models = files.map(({ file, sql, name }): Model => {
    const all = statement(file, sql, faults);
    const text = all.map((token) => token.text).join(" ");
    const words = text.replaceAll(" . ", ".").split(" ");
    const [begin, made] = [words.slice(0, 4).join(" "), words[4]];
    const select = selectOf(sql, all);
    if (begin.toUpperCase() !== "CREATE OR REPLACE TABLE" || !select)
      faults.push(`${file} begins with "${begin}": it must be CREATE OR REPLACE TABLE ${name} … AS SELECT …`);
    else if (made !== name)
      faults.push(`${file} creates the table ${made}: it must be named as its file, ${name}, without a dataset`);
    if (pipelines().includes(name)) faults.push(`${file}: ${name} is the name of a raw table`);
    const reads = tablesRead(sql, known);
    return {
      name,
      file,
      sql,
      select: select ?? sql,
      reads,
      checks: [],
      needs: reads.filter((one) => names.includes(one)),
    };
  });
  const ordered = inOrder(models, faults);
  for (const { file, sql } of readFiles("views/checks")) {
    const [first] = statement(file, sql, faults);
    if (!/^(SELECT|WITH)$/i.test(first?.text ?? "")) faults.push(`${file} must be a SELECT of the rows that are wrong`);
    const reads = tablesRead(sql, known);
    const owner = ordered.findLast(({ name }) => reads.includes(name));
    if (!owner) faults.push(`${file} reads no model: nothing would run it`);
    owner?.checks.push({ file, sql, select: sql, reads });
    // It runs once all are made that it reads: they come before its model in the order, but its model need not read them.
    for (const name of reads)
      if (names.includes(name) && name !== owner?.name && !owner?.needs.includes(name)) owner?.needs.push(name);
  }
  if (!names.length) faults.push("views/ holds no model");
  if (only && !names.includes(only))
    faults.push(`ONLY=${only}: there is no views/${only}.sql. There are: ${names.join(", ")}`);
  if (faults.length) throw new UsageError(`nothing was built:\n${faults.map((fault) => `  ${fault}`).join("\n")}`);
  const wanted = new Set(only ? [only] : names);
  for (const { name, needs } of ordered.toReversed())
    if (wanted.has(name)) for (const needed of needs) wanted.add(needed);
  return ordered.filter(({ name }) => wanted.has(name));
}

/** Sorts them so that each comes after those that it reads, by name where there is a choice. */
function inOrder(models: Model[], faults: string[]): Model[] {
  const ordered: Model[] = [];
  for (let left = models; left.length; left = models.filter((model) => !ordered.includes(model))) {
    const next = left.find(({ needs }) => needs.every((name) => ordered.some((done) => done.name === name)));
    if (next) ordered.push(next);
    else {
      const path: Model[] = []; // each of these reads another of them, so this comes back to where it was
      let at = left[0] as Model;
      for (; !path.includes(at); at = left.find(({ name }) => at.needs.includes(name)) as Model) path.push(at);
      const circle = [...path.slice(path.indexOf(at)), at];
      faults.push(`models read one another in a circle: ${circle.map(({ file }) => file).join(" reads ")}`);
      return models;
    }
  }
  return ordered;
}

/** The raw tables that the models and their checks read. */
function rawTables(models: Model[]): string[] {
  const read = new Set(models.flatMap(({ reads, checks }) => [...reads, ...checks.flatMap((check) => check.reads)]));
  return pipelines().filter((name) => read.has(name));
}

/**
 * Compares the watermarks of the raw tables with the expected intervals of ops/alerts.yml: a model of a pipeline that is stuck
 * would be a wrong answer that looks like a new one.
 * @throws Error where one is older than two of its intervals, unless `allowed`.
 */
export async function checkFresh(run: Run, models: Model[], allowed: boolean): Promise<void> {
  const intervals = readIntervals();
  const tables = rawTables(models);
  const rows = await run.etl<{ pipeline: string; watermark: string | null; age: number | null }[]>`
    select t.pipeline, replace(date_trunc('second', watermark)::text, ' ', 'T') as watermark, extract(epoch from now() - watermark)::float8 as age
    from unnest(${`{${tables.join()}}`}::text::text[]) t (pipeline) left join etl.watermarks using (pipeline)`;
  const stale: string[] = [];
  for (const { pipeline, watermark, age } of rows) {
    const interval = intervals.get(pipeline);
    if (!interval)
      throw new UsageError(
        `ops/alerts.yml has no etl_expected_interval_seconds for ${pipeline}: whether it is fresh cannot be told`,
      );
    if (age === null) stale.push(`${pipeline} has no watermark: it never ran`);
    else if (age > 2 * interval)
      stale.push(
        `${pipeline} is stale: its watermark ${watermark} is ${duration(age)} old, its interval is ${duration(interval)}`,
      );
  }
  if (!stale.length) return;
  if (!allowed)
    throw new Error(
      `${stale.join("; ")}. Nothing was built. Next: make ${tables.join(" ")}, then make views; or make views ALLOW_STALE=1`,
    );
  for (const warning of stale) run.log("warning", { warning });
}

type ViewsEnv = Env<typeof viewsVariables>;

/** Where the models of one run are made. */
export interface Build extends AsyncDisposable {
  run: Run;
  env: ViewsEnv;
  bigquery: BigQuery;
  dataset: string;
  /** Leaves the dataset to its expiry, for whoever wants to look at what failed. */
  keep: boolean;
}

/** Creates the build dataset, in which every table expires, and drops those of runs whose tables have expired. */
export async function createBuild(run: Run, env: ViewsEnv): Promise<Build> {
  const bigquery = connectBigQuery(env);
  const published = env.BIGQUERY_VIEWS_DATASET;
  const [there] = await bigquery.dataset(published).exists();
  if (!there)
    throw new UsageError(
      `dataset ${env.BIGQUERY_PROJECT}.${published} (BIGQUERY_VIEWS_DATASET) does not exist. Run: make migrate`,
    );
  const prefix = `${published}_build_`;
  const [datasets] = await bigquery.getDatasets({ filter: "labels.etl_pipeline:views" });
  const oldest = prefix + newRunId(Date.now() - BUILD_HOURS * 3_600_000);
  const old = datasets.filter(({ id = "" }) => id.startsWith(prefix) && id < oldest);
  await Promise.all(old.map((dataset) => dataset.delete({ force: true })));
  const dataset = bigquery.dataset(prefix + run.id);
  const created = dataset.create({
    description: `Where run ${run.id} of views makes its models. Its tables delete themselves.`,
    labels: labels(run),
    defaultTableExpirationMs: String(BUILD_HOURS * 3_600_000),
  });
  await created.catch(ignoreAlreadyThere);
  const build: Build = {
    run,
    env,
    bigquery,
    dataset: dataset.id ?? "",
    keep: false,
    [Symbol.asyncDispose]: async () => {
      if (build.keep)
        return run.log("kept", { dataset: dataset.id, because: "a model failed", expires_in_hours: BUILD_HOURS });
      await dataset.delete({ force: true }).catch(({ message }: Error) => {
        run.log("warning", {
          warning: `${dataset.id} was not dropped; its tables expire in ${BUILD_HOURS} h`,
          error: message,
        });
      });
    },
  };
  return build;
}

/** Copies the raw tables into the build dataset (a copy job costs nothing), so that all models see the same rows. */
export async function copyRaw(build: Build, models: Model[]): Promise<void> {
  const { BIGQUERY_DATASET } = build.env;
  await Promise.all(
    rawTables(models).map(async (name) => {
      const copied = runJob(build, `copy_${name}`, copy(build, [BIGQUERY_DATASET, name], [build.dataset, name]));
      await copied.catch((error) => {
        if (error.code !== 404 && error.errors?.[0]?.reason !== "notFound") throw error;
        throw new UsageError(`raw table ${BIGQUERY_DATASET}.${name} does not exist. Run: make migrate ${name}`);
      });
      build.run.log("copy", { table: name, seconds: build.run.seconds() });
    }),
  );
}

type Name = [dataset: string, table: string];
const reference = (build: Build, [datasetId, tableId]: Name): object => ({
  projectId: build.bigquery.projectId,
  datasetId,
  tableId,
});
const copy = (build: Build, from: Name, to: Name): object => ({
  copy: {
    sourceTable: reference(build, from),
    destinationTable: reference(build, to),
    writeDisposition: "WRITE_TRUNCATE",
  },
});

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

interface Estimate {
  bytes: number;
  tables: { datasetId: string; tableId: string }[];
  fields: TableField[];
}

const query = (build: Build, sql: string, limit?: number): object => ({
  query: {
    query: sql,
    useLegacySql: false,
    defaultDataset: { projectId: build.bigquery.projectId, datasetId: build.dataset },
    ...(limit && { maximumBytesBilled: String(limit) }),
  },
});

/** What BigQuery says of a SELECT without running it; it costs nothing. (The local server dry-runs no CREATE TABLE with a list of columns.) */
async function dryRun(build: Build, sql: string): Promise<Estimate> {
  const configuration = { ...query(build, sql), dryRun: true, labels: labels(build.run) };
  const [, answer]: Job = await build.bigquery.createJob({ configuration });
  const { totalBytesProcessed, referencedTables = [], schema } = answer.statistics.query;
  return { bytes: Number(totalBytesProcessed ?? 0), tables: referencedTables, fields: schema?.fields ?? [] };
}

/**
 * What a statement may be billed: its estimate and a quarter, and the 10 MiB that BigQuery bills at least for each table read.
 * @throws Error where the estimate is above the cap.
 */
function byteLimit(build: Build, { bytes, tables }: Estimate): number {
  const cap = build.env.MAX_BYTES_BILLED;
  if (bytes > cap)
    throw new Error(
      `it would read ${thousands(bytes)} bytes, more than MAX_BYTES_BILLED, ${thousands(cap)}: let it read less, or raise that`,
    );
  return Math.min(cap, Math.ceil(bytes * 1.25) + 10 * 2 ** 20 * Math.max(1, tables.length));
}

/** Runs a statement of a file, after its dry run. Its messages begin with the file. */
async function runStatement(build: Build, { file, sql, select, reads }: Check, job: string, own: string): Promise<Job> {
  try {
    const estimate = await dryRun(build, select);
    for (const { datasetId, tableId } of estimate.tables) {
      if (datasetId !== build.dataset)
        throw new Error(
          `it reads ${datasetId}.${tableId}: give names without a dataset, so that all models see the same rows`,
        );
      if (tableId !== own && !reads.includes(tableId))
        throw new Error(`it reads ${tableId}, which was not found behind a FROM or JOIN in it: write it so`);
    }
    return await runJob(build, job, query(build, sql, byteLimit(build, estimate)));
  } catch (error) {
    throw named(build, file, error as Error);
  }
}

/** The error with the file in its message, and without the name of the build dataset, which is not in the file. */
function named(build: Build, file: string, error: Error): Error {
  const missing = /not ?found/i.test(error.message) && /table/i.test(error.message);
  const hint = missing ? `. A model reads models of views/ and ${pipelines().join(", ")}, by these names` : "";
  error.message = `${file}: ${error.message.replaceAll(`${build.bigquery.projectId}:${build.dataset}.`, "").replaceAll(`${build.dataset}.`, "")}${hint}`;
  return error;
}

/** What became of a model. */
export interface Outcome {
  model: Model;
  rows: number;
  /** Bytes that the model and its checks read, or, in a dry run, would read. */
  bytes: number;
  seconds: number;
  /** Why it was not published. */
  error?: Error;
}

type Made = Pick<Outcome, "rows" | "bytes"> & { metadata: TableMetadata };

const bytesOf = (job: Job): number => Number(job.statistics?.query?.totalBytesProcessed ?? 0);

/** Makes the model in the build dataset. */
export async function buildModel(build: Build, model: Model, attempt: number): Promise<Made> {
  const job = await runStatement(build, model, `${model.name}_build_${attempt}`, model.name);
  const [metadata] = await build.bigquery.dataset(build.dataset).table(model.name).getMetadata();
  return { rows: Number(metadata.numRows), bytes: bytesOf(job), metadata };
}

/** Runs the model's checks. @throws Error with each that returned rows, and some of these. */
export async function runChecks(build: Build, { name, checks }: Model, made: Made, attempt: number): Promise<void> {
  const results = await Promise.all(
    checks.map(async (check) => {
      const job = await runStatement(build, check, `${name}_${basename(check.file, ".sql")}_${attempt}`, "");
      made.bytes += bytesOf(job);
      const options = { maxResults: 3, autoPaginate: false };
      const [rows, , answer]: Job = await build.bigquery.job(job.jobReference.jobId).getQueryResults(options);
      const total = Number(answer?.totalRows ?? rows.length);
      return total ? `${check.file} returned ${thousands(total)} rows, for example ${JSON.stringify(rows[0])}` : "";
    }),
  );
  const failed = results.filter(Boolean);
  if (failed.length) throw new Error(failed.join("; "));
}

/** @throws Error where the model has no rows, or fewer than half of the published table's, without ALLOW_SHRINK=1. */
export async function guardRows(build: Build, { name, file }: Model, made: Made): Promise<void> {
  const before = await metadataOf(publishedTable(build, name));
  const published = Number(before?.numRows ?? 0);
  if (build.env.ALLOW_SHRINK || (made.rows > 0 && made.rows * 2 >= published)) return;
  throw new Error(
    `${file}: it has ${thousands(made.rows)} rows, and the published ${build.env.BIGQUERY_VIEWS_DATASET}.${name} ${before ? thousands(published) : "is not there"}. If that is right: make views ONLY=${name} ALLOW_SHRINK=1`,
  );
}

const publishedTable = ({ bigquery, env }: Build, name: string): Table =>
  bigquery.dataset(env.BIGQUERY_VIEWS_DATASET).table(name);

async function metadataOf(of: Table): Promise<TableMetadata | undefined> {
  try {
    const [metadata] = await of.getMetadata();
    return metadata;
  } catch (error) {
    if ((error as { code?: number }).code === 404) return undefined;
    throw error;
  }
}

const layout = ["timePartitioning", "rangePartitioning", "clustering"] as const;

/**
 * Copies the model over the published table, as one atomic job. What a copy does not bring along, or the dataset puts on it, is
 * set right afterwards: descriptions, and no expiry. (The local server's copy brings the rows only, so partitioning and clustering too.)
 */
export async function publishModel(build: Build, { name, file }: Model, made: Made, attempt: number): Promise<void> {
  const published = publishedTable(build, name);
  const to: Name = [build.env.BIGQUERY_VIEWS_DATASET, name];
  const before = await metadataOf(published);
  await runJob(build, `${name}_publish_${attempt}`, copy(build, [build.dataset, name], to)).catch((error: Error) => {
    const moved = before && layout.some((part) => !isDeepStrictEqual(before[part], made.metadata[part]));
    const hint = moved
      ? `. Its PARTITION BY or CLUSTER BY has changed: DROP TABLE ${to.join(".")}, then make views ONLY=${name}`
      : "";
    error.message = `${file} was not copied to ${to.join(".")}: ${error.message}${hint}`;
    throw error;
  });
  const [now] = await published.getMetadata();
  const wanted = {
    ...made.metadata,
    schema: { fields: describe(now.schema.fields, made.metadata.schema?.fields ?? []) },
  };
  const differ = ([...layout, "description", "schema"] as const).filter(
    (part) => !isDeepStrictEqual(now[part], wanted[part]),
  );
  const change = Object.fromEntries(differ.map((part) => [part, wanted[part] ?? null]));
  if (now.expirationTime) change.expirationTime = null;
  if (Object.keys(change).length) await published.setMetadata(change);
}

/** The fields with the descriptions of others of the same names. */
function describe(fields: TableField[], others: TableField[]): TableField[] {
  return fields.map(({ description: _, ...field }) => {
    const other = others.find(({ name }) => name === field.name);
    return {
      ...field,
      ...(other?.description && { description: other.description }),
      ...(field.fields && { fields: describe(field.fields, other?.fields ?? []) }),
    };
  });
}

/**
 * Says what the model and its checks would read. Nothing is built, so that each table stands in for itself: a raw or published
 * one as a view of it, and one that has other columns now, or was never published, as an empty table: its readers then read more than is said.
 */
export async function estimateModel(build: Build, model: Model): Promise<Made> {
  const { bigquery, env } = build;
  const estimate = async ({ file, select }: Check): Promise<Estimate> => {
    return await dryRun(build, select).catch((error) => Promise.reject(named(build, file, error)));
  };
  const { bytes, fields } = await estimate(model);
  const before = await metadataOf(publishedTable(build, model.name));
  const types = (of: TableField[] = []): string => JSON.stringify(of.map(({ name, type }) => [name, type]));
  if (before && types(before.schema?.fields) === types(fields))
    await standIn(build, env.BIGQUERY_VIEWS_DATASET, model.name);
  else await bigquery.dataset(build.dataset).createTable(model.name, { schema: { fields } });
  const checks = await Promise.all(model.checks.map(estimate));
  return { rows: 0, bytes: checks.reduce((sum, check) => sum + check.bytes, bytes), metadata: {} };
}

async function standIn({ bigquery, dataset }: Build, of: string, name: string): Promise<void> {
  const view = `SELECT * FROM \`${bigquery.projectId}.${of}.${name}\``;
  await bigquery.dataset(dataset).createTable(name, { view: { query: view, useLegacySql: false } });
}

/** Lets the raw tables be seen in the build dataset: for dry runs, which read nothing. */
export async function viewRaw(build: Build, models: Model[]): Promise<void> {
  await Promise.all(rawTables(models).map((name) => standIn(build, build.env.BIGQUERY_DATASET, name)));
}

/**
 * Does `work` for each model once all that it needs are done, `parallel` of them at a time. One that fails does not keep the
 * others from going on, except those that need it.
 */
export async function eachModel(
  run: Run,
  models: Model[],
  parallel: number,
  work: (model: Model) => Promise<Pick<Outcome, "rows" | "bytes">>,
): Promise<Outcome[]> {
  const outcomes = new Map<string, Promise<Outcome>>();
  const waiting: (() => void)[] = [];
  let free = parallel;
  const one = async (model: Model): Promise<Outcome> => {
    const outcome: Outcome = { model, rows: 0, bytes: 0, seconds: 0 };
    const needed = await Promise.all(model.needs.map((name) => outcomes.get(name)));
    const missing = needed.filter((need) => need?.error).map((need) => need?.model.name);
    if (missing.length) outcome.error = new Error(`it needs ${missing.join(", ")}`);
    else {
      if (free > 0) free -= 1;
      else await new Promise<void>((resolve) => waiting.push(resolve));
      const started = run.seconds();
      try {
        run.signal.throwIfAborted();
        const { rows, bytes } = await work(model);
        Object.assign(outcome, { rows, bytes });
      } catch (error) {
        outcome.error = error as Error;
      }
      outcome.seconds = Math.round(1000 * (run.seconds() - started)) / 1000;
      const next = waiting.shift();
      if (next) next();
      else free += 1;
    }
    const { rows, bytes, seconds, error } = outcome;
    const fields: Fields = error
      ? { failed: error.message.split("\n")[0] }
      : { rows, bytes, checks: model.checks.length };
    run.log("model", { model: model.name, ...fields, seconds });
    return outcome;
  };
  for (const model of models) outcomes.set(model.name, one(model)); // in their order: what a model needs is there before it
  return await Promise.all(outcomes.values());
}

/** Prints what each model would read and cost. @throws Error where one could not be analysed. */
export function reportEstimates(outcomes: Outcome[], usdPerTib: number): void {
  const row = (model: string, bytes: number): Record<string, string> => ({
    model,
    bytes: thousands(bytes),
    "cost in usd": ((bytes / 2 ** 40) * usdPerTib).toFixed(4),
  });
  const rows = outcomes.map(({ model, bytes, error }) => ({
    ...row(model.name, bytes),
    "would be built": error ? `no: ${error.message.split("\n")[0]}` : "yes",
    needs: model.needs.join(", ") || "-",
  }));
  const total = outcomes.reduce((sum, { bytes }) => sum + bytes, 0);
  process.stdout.write(`${table([...rows, { ...row("total", total), "would be built": "", needs: "" }])}\n`);
  throwFailed(outcomes);
}

/** Prints the table, pushes a metric for each model. @throws Error that names the models that were not published, and why. */
export async function reportModels(build: Build, outcomes: Outcome[], pushgateway: string): Promise<void> {
  const { run } = build;
  const rows = outcomes.map(({ model, rows: count, bytes, seconds, error }) => ({
    model: model.name,
    rows: error ? "-" : thousands(count),
    bytes: error ? "-" : thousands(bytes),
    seconds: seconds.toFixed(1),
    checks: error ? "-" : `${model.checks.length} passed`,
    published: error ? `no: ${error.message.split("\n")[0]}` : "yes",
  }));
  process.stdout.write(`${table(rows)}\n`);
  const done = outcomes.filter(({ error }) => !error);
  run.totals = {
    chunks: done.length,
    rows: done.reduce((sum, one) => sum + one.rows, 0),
    bytes: done.reduce((sum, one) => sum + one.bytes, 0),
  };
  build.keep = done.length < outcomes.length;
  const now = Date.now() / 1000;
  const pushed = outcomes.map(({ model, rows, bytes, seconds, error }) => {
    const values: Metrics = error
      ? { etl_model_last_failure_timestamp_seconds: now }
      : {
          etl_model_last_success_timestamp_seconds: now,
          etl_model_rows: rows,
          etl_model_bytes: bytes,
          etl_model_duration_seconds: seconds,
        };
    return pushMetrics(pushgateway, run.pipeline, values, { model: model.name });
  });
  const lost = (await Promise.allSettled(pushed)).find((push) => push.status === "rejected");
  if (lost)
    run.log("warning", {
      warning: "models' metrics were not pushed; the run itself is not affected",
      error: lost.reason.message,
    });
  throwFailed(outcomes);
}

function throwFailed(outcomes: Outcome[]): void {
  const failed = outcomes.filter(({ error }) => error);
  if (!failed.length) return;
  const lines = failed.map(({ model, error }) => `  ${model.name}: ${error?.message}`);
  throw new Error(
    `${failed.length} of ${outcomes.length} models failed, and are published as they were before:\n${lines.join("\n")}\nNext: mend them, then: make views`,
  );
}
