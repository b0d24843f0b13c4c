/**
 * A shop of one's own for a test: a source database with schema etl, a BigQuery dataset and a Pushgateway group, on the
 * local stack's servers, and the scripts run against it as real processes, in the roles that production uses.
 */
import assert from "node:assert/strict";
import { type ChildProcess, spawn } from "node:child_process";
import { randomBytes } from "node:crypto";
import { once } from "node:events";
import { globSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { createInterface } from "node:readline";
import { suite } from "node:test";
import { type ClickHouseClient, ClickHouseLogLevel, createClient } from "@clickhouse/client";
import postgres, { type Sql } from "postgres";
import { migrateClickHouse, migratePostgres } from "../../scripts/ops/lib/migrations.ts";
import { readContract } from "../../shared/bigquery/contract.ts";
import { type Bucket, connectS3, listObjects, removeObjects } from "../../shared/events/s3.ts";
import { createSource, sourceFiles } from "../data/source.ts";
import { type Env, localEnv, root } from "../stack/env.ts";
import { checkPort } from "../stack/process.ts";
import { digest } from "../stack/stack.ts";
import { createServers } from "./servers.ts";

/** The pipelines to BigQuery, each with a text column of its table that a test may write to. */
export const textColumns = { orders: "status", users: "age_band" };
export type Pipeline = keyof typeof textColumns;
const pipelines = Object.keys(textColumns) as Pipeline[];

/**
 * Whose tests are run of what the script's steps hold, whatever the table's columns are: those of orders, and with SOAK=1 of each pipeline.
 * The scripts are the same, step for step (docs/recipes.test.ts).
 */
export const ofSteps: Pipeline[] = process.env.SOAK === "1" ? pipelines : ["orders"];

/**
 * The same tests for each of these. The pipelines' go on at the same time, so that one's waiting is the other's work; within a pipeline
 * `concurrency` of them do.
 */
export function stepsOfPipeline(tests: (pipeline: Pipeline) => void, concurrency = 1): void {
  suite("each pipeline", { concurrency: true }, () => {
    for (const pipeline of ofSteps) suite(pipeline, { concurrency }, () => tests(pipeline));
  });
}

export interface Result {
  code: number | null;
  signal: NodeJS.Signals | null;
  stdout: string;
  stderr: string;
}

export interface Process {
  child: ChildProcess;
  /** Resolves with the first line of stderr, past or to come, that matches. Rejects where the process ends without it. */
  line(pattern: RegExp): Promise<string>;
  ended: Promise<Result>;
}

/** ClickHouse, as an environment says. */
export const connectClickHouse = (env: Env): ClickHouseClient =>
  createClient({
    url: env.CLICKHOUSE_URL ?? "",
    username: env.CLICKHOUSE_USER ?? "",
    password: env.CLICKHOUSE_PASSWORD ?? "",
    database: env.CLICKHOUSE_DATABASE ?? "",
    log: { level: ClickHouseLogLevel.OFF },
  });

/** The bucket of an environment. */
export function connectBucket(env: Env): Bucket {
  const { S3_ENDPOINT, S3_BUCKET = "", S3_PREFIX = "", AWS_REGION = "" } = env;
  const { AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY } = env;
  Object.assign(process.env, { AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY }); // where S3's client looks for them
  return connectS3({ S3_ENDPOINT, S3_BUCKET, S3_PREFIX, AWS_REGION });
}

export interface ShopOptions {
  pipeline?: Pipeline;
  /** Where the project's code is, if not here (a scratch copy). */
  folder?: string;
  /** The variables of its servers, if not the local stack's. */
  stack?: Env;
  /** WATERMARK_LAG_SECONDS. */
  lag?: number;
  /** With its database in ClickHouse. */
  clickhouse?: boolean;
  /** false: nothing in BigQuery, for tests of events or sensors alone. */
  bigquery?: boolean;
  /** The encoding of its source database, if not UTF8. */
  encoding?: string;
  /** A Pushgateway of its own, for tests that look at the metrics (their names are the same in every shop). */
  pushgateway?: boolean;
}

export type Shop = Awaited<ReturnType<typeof createShop>>;

export async function createShop(options: ShopOptions = {}) {
  const { pipeline = "orders", folder = root, stack: base = localEnv(), lag = 0, encoding = "UTF8" } = options;
  const text = textColumns[pipeline];
  const name = `test_${randomBytes(5).toString("hex")}`;
  const at = (url: string | undefined): string => Object.assign(new URL(url ?? ""), { pathname: `/${name}` }).href;
  const env: Env = {
    ...base,
    SOURCE_DATABASE_URL: at(base.SOURCE_DATABASE_URL),
    ETL_DATABASE_URL: at(base.ETL_DATABASE_URL),
    STACK_ADMIN_DATABASE_URL: at(base.STACK_ADMIN_DATABASE_URL),
    REPLICATION_DATABASE_URL: at(base.REPLICATION_DATABASE_URL),
    BIGQUERY_DATASET: name,
    BIGQUERY_VIEWS_DATASET: `${name}_warehouse`,
    S3_PREFIX: `${name}/`,
    CLICKHOUSE_DATABASE: name,
    SENSORS_TOPIC: `${name}.public.sensor_readings`,
    SENSORS_GROUP: name,
    METRICS_PORT: "0",
    WATERMARK_LAG_SECONDS: String(lag),
  };
  const gateway = options.pushgateway ? await createServers(["pushgateway"]) : undefined;
  Object.assign(env, gateway?.env);
  const bucket = connectBucket(env);
  const server = postgres(base.STACK_ADMIN_DATABASE_URL ?? "", { max: 1, onnotice: () => {} });
  if (encoding === "UTF8")
    await server.unsafe(`create database ${name} template ${await templateDatabase(server, base)} strategy file_copy`);
  else {
    await server.unsafe(`create database ${name} template template0 encoding ${encoding} locale 'C'`);
    await createSource(env.STACK_ADMIN_DATABASE_URL ?? "", []);
    await migrateMetadata(env.ETL_DATABASE_URL);
  }
  const clickhouse = connectClickHouse(env);
  const { open, ...source } = sourceOf(env, pipeline);
  const { children, ...scripts } = scriptsOf(folder, env);
  const bigquery = bigqueryOf(env, pipeline);
  // There are more than a hundred shops, and each process that makes one less is worth it; the bucket is all shops'.
  const without = { S3_BUCKET: "", ...(options.clickhouse ? {} : { CLICKHOUSE_URL: "" }) };
  if (folder !== root && options.bigquery !== false) await scripts.succeed("scripts/ops/migrate.ts", without);
  else {
    if (options.bigquery !== false) await createDestination(env, bigquery.api);
    if (options.clickhouse) await createReadings(env);
  }
  const dispose = async (): Promise<void> => {
    for (const child of children) child.kill("SIGKILL");
    await gateway?.[Symbol.asyncDispose]();
    await Promise.all(open.map((sql) => sql.end({ timeout: 1 })));
    await server.unsafe(`drop database if exists ${name} with (force)`);
    await server.end();
    const { datasets }: { datasets: { datasetReference: { datasetId: string } }[] } = await bigquery.api("/datasets?all=true");
    for (const { datasetId } of datasets.map(({ datasetReference }) => datasetReference))
      if (datasetId.startsWith(name)) await bigquery.api(`/datasets/${datasetId}?deleteContents=true`, "DELETE");
    const objects = await Array.fromAsync(listObjects(bucket, bucket.prefix));
    await removeObjects(
      bucket,
      objects.map(({ key }) => key),
    );
    bucket.client.destroy();
    await clickhouse.close();
    const stack = connectClickHouse(base); // a client's own database has to be there, whatever it asks
    for (const database of [`${name}_rebuild`, name]) await stack.command({ query: `DROP DATABASE IF EXISTS ${database}` });
    await stack.close();
  };
  return {
    env,
    /** The pipeline that the test is about: what needs a pipeline below, and is given none, means this one. */
    pipeline,
    /** Its script, for example scripts/orders.ts, its table and a text column of it that a test may write to. */
    script: `scripts/${pipeline}.ts`,
    table: `public.${pipeline}`,
    text,
    dataset: name,
    /** The bucket, below the shop's prefix. */
    bucket,
    /** The shop's database in ClickHouse; the rows of a query there. */
    clickhouse,
    select: async <T>(query: string): Promise<T[]> => await (await clickhouse.query({ query, format: "JSONEachRow" })).json<T>(),
    ...source,
    ...scripts,
    ...bigquery,
    /** The metrics that the Pushgateway has of this shop's pipeline: name → value. */
    metrics: async (of: string = pipeline): Promise<Record<string, number>> => {
      const text = await (await fetch(`${env.PUSHGATEWAY_URL}/metrics`)).text();
      const found = Array.from(text.matchAll(/^(\w+)\{(.*)\} (\S+)$/gm), ([, metric, labels, value]) => ({ metric, labels, value }));
      const mine = found.filter(({ labels }) => labels?.includes(`pipeline="${of}"`));
      return Object.fromEntries(mine.map(({ metric, value }) => [metric, Number(value)]));
    },
    [Symbol.asyncDispose]: dispose,
  };
}

/** The scripts of a folder, as real processes. */
function scriptsOf(folder: string, env: Env) {
  const children = new Set<ChildProcess>();
  const start = (script: string, variables: Env = {}): Process => {
    const child = spawn(process.execPath, [join(folder, script)], {
      cwd: folder,
      env: { ...env, ...variables } as NodeJS.ProcessEnv,
      stdio: ["ignore", "pipe", "pipe"],
    });
    children.add(child);
    const lines: string[] = [];
    const waiting: { pattern: RegExp; resolve: (line: string) => void }[] = [];
    createInterface({ input: child.stderr }).on("line", (line) => {
      lines.push(line);
      for (const wait of waiting.filter(({ pattern }) => pattern.test(line))) wait.resolve(line);
    });
    let stdout = "";
    child.stdout.setEncoding("utf8").on("data", (text) => {
      stdout += text;
    });
    const ended = once(child, "close").then(([code, signal]) => {
      children.delete(child);
      return { code, signal, stdout, stderr: lines.join("\n") };
    });
    const line = (pattern: RegExp): Promise<string> =>
      new Promise((resolve, reject) => {
        const past = lines.find((text) => pattern.test(text));
        if (past !== undefined) return resolve(past);
        waiting.push({ pattern, resolve });
        ended.then(({ stderr }) => reject(new Error(`${script} ended without a line like ${pattern}:\n${stderr}`)));
      });
    return { child, line, ended };
  };
  const run = (script: string, variables?: Env): Promise<Result> => start(script, variables).ended;
  /** Runs it and requires exit code 0. */
  const succeed = async (script: string, variables?: Env): Promise<Result> => {
    const result = await run(script, variables);
    if (result.code !== 0) throw new Error(`${script} exited ${result.code ?? result.signal}:\n${result.stderr}`);
    return result;
  };
  /** Runs it and requires this exit code, and words like these on stderr. */
  const refused = async (script: string, code: number, says: RegExp, variables?: Env): Promise<Result> => {
    const result = await run(script, variables);
    assert.match(result.stderr, says);
    assert.equal(result.code, code, result.stderr);
    return result;
  };
  return { children, start, run, succeed, refused };
}

/** A row in one form for the source and the destination: numbers and times as text. */
type Row = Record<string, string | null>;

/** The source's database: what the shop's applications do, and its administrators. */
function sourceOf(env: Env, pipeline: Pipeline) {
  const open: Sql[] = [];
  /** A further connection as superuser, for transactions held open. */
  const connect = (application = "test"): Sql => {
    const sql = postgres(env.STACK_ADMIN_DATABASE_URL ?? "", {
      max: 1,
      onnotice: () => {},
      fetch_types: false,
      connection: { application_name: application },
    });
    open.push(sql);
    return sql;
  };
  const admin = connect("admin");
  return {
    open,
    connect,
    /** The source's superuser. */
    admin,
    /** Inserts rows with the ids first..last into the pipeline's table; the trigger sets updated_at. */
    insertRows: async (first: number, last: number, into = pipeline): Promise<void> => {
      const day = admin`timestamptz '2017-01-01' + i * interval '1 minute'`;
      const ids = admin`generate_series(${first}::int, ${last}::int) i`;
      if (into === "users")
        await admin`insert into public.users (id, age_band, income_band, created_at) select i, '45-54', i % 250 || 'K', ${day} from ${ids}`;
      else
        await admin`
          insert into public.orders (id, user_id, store_id, status, item_count, total, discount, created_at)
          select i, i % 100, i % 10, 'paid', 1 + i % 7, (i % 10000) / 100.0, 0, ${day} from ${ids}`;
    },
    /** Inserts events of a day (YYYY-MM-DD), spread over it, each at its own time. */
    insertEvents: async (day: string, count: number): Promise<void> =>
      void (await admin`
        insert into public.events (user_id, type, payload, created_at)
        select i, 'purchase', jsonb_build_object('n', i, 'text', 'e''é' || i),
          ${day}::text::timestamptz + (i - 1) * interval '1 day' / ${count}::int
        from generate_series(1, ${count}::int) i`),
    /** Sets the text column of the rows with the ids first..last. */
    updateRows: async (first: number, last: number, value: string): Promise<void> =>
      void (await admin`update ${admin(pipeline)} set ${admin(textColumns[pipeline])} = ${value} where id between ${first} and ${last}`),
    watermark: async (of: string = pipeline): Promise<string | undefined> => {
      const [row] = await admin`select replace(watermark::text, ' ', 'T') as at from etl.watermarks where pipeline = ${of}`;
      return row?.at;
    },
    /** Every row of a pipeline's table, by key. */
    sourceRows: async (of: string = pipeline): Promise<Row[]> => {
      const { fields, key } = readContract(of);
      const forms: Record<string, (column: string) => string> = {
        TIMESTAMP: (column) => `(extract(epoch from ${column}) * 1000000)::bigint::text`,
        NUMERIC: (column) => `trim_scale(${column})::text`,
      };
      const columns = fields.map(({ name: field, type }) => `${forms[type]?.(`"${field}"`) ?? `"${field}"::text`} as "${field}"`);
      const rows = await admin.unsafe(`select ${columns.join(", ")} from public.${of} t order by ${key.map((k) => `t."${k}"`).join()}`);
      return rows.map((row) => ({ ...row }));
    },
  };
}

/** The destination. */
function bigqueryOf({ BIGQUERY_ENDPOINT, BIGQUERY_PROJECT: projectId, BIGQUERY_DATASET: datasetId }: Env, pipeline: Pipeline) {
  /** BigQuery's REST API, at a path below the project; undefined where there is nothing. Throws what else it answers than an OK. */
  // biome-ignore lint/suspicious/noExplicitAny: the API's own JSON
  const api = async (path: string, method = "GET", body?: object): Promise<any> => {
    const url = `${BIGQUERY_ENDPOINT}/bigquery/v2/projects/${projectId}${path}`;
    const headers = { "content-type": "application/json" };
    const answer = await fetch(url, { method, ...(body && { headers, body: JSON.stringify(body) }) });
    if (answer.status === 404 && method === "GET") return undefined;
    const text = await answer.text();
    if (!answer.ok) throw new Error(`${method} ${path} failed: ${text.slice(0, 2000)}`);
    return text && JSON.parse(text);
  };
  /** Runs a query; the dataset is the default. Values as the API writes them, TIMESTAMP in microseconds, an array as JSON. */
  const query = async (sql: string): Promise<Row[]> => {
    const answer = await api("/queries", "POST", {
      query: sql,
      useLegacySql: false,
      maxResults: 1_000_000,
      timeoutMs: 60_000,
      defaultDataset: { projectId, datasetId },
      formatOptions: { useInt64Timestamp: true },
    });
    if (!answer.jobComplete) throw new Error(`query failed: ${JSON.stringify(answer).slice(0, 2000)}`);
    const names: string[] = (answer.schema?.fields ?? []).map((field: { name: string }) => field.name);
    const rows: { f: { v: unknown }[] }[] = answer.rows ?? [];
    if (String(rows.length) !== String(answer.totalRows ?? rows.length)) throw new Error("query: more than one page of rows");
    const value = (v: unknown): string | null =>
      Array.isArray(v) ? JSON.stringify(v.map((element) => element.v)) : ((v as string | null | undefined) ?? null);
    return rows.map(({ f }) => Object.fromEntries(names.map((field, column) => [field, value(f[column]?.v)])));
  };
  return {
    api,
    query,
    /** Every row of a pipeline's table, by key. */
    destinationRows: async (of: string = pipeline): Promise<Row[]> => {
      const { fields, key } = readContract(of);
      const rows = await query(`SELECT ${fields.map((field) => `\`${field.name}\``).join(", ")} FROM \`${of}\` ORDER BY ${key.join()}`);
      const shortest = (value: string | null | undefined) => (value?.includes(".") ? value.replace(/\.?0+$/, "") : (value ?? null));
      for (const { name } of fields.filter(({ type }) => type === "NUMERIC")) for (const row of rows) row[name] = shortest(row[name]);
      return rows;
    },
    /** Names of staging tables that are left in the dataset. */
    stagingTables: async (): Promise<string[]> => {
      const { tables = [] }: { tables?: { tableReference: { tableId: string } }[] } = await api(
        `/datasets/${datasetId}/tables?maxResults=1000`,
      );
      return tables.map(({ tableReference }) => tableReference.tableId).filter((table) => table.includes("_staging_"));
    },
  };
}

/**
 * The database that shops are cloned from: the source's tables and roles, and schema etl. Made once for these files; test/run.ts drops what
 * earlier runs left. It gets its name when it is whole.
 */
async function templateDatabase(server: Sql, base: Env): Promise<string> {
  const files = [...sourceFiles, ...globSync("sql/etl/*.sql", { cwd: root }).sort()];
  const name = `test_template_${digest(files.map((file) => readFileSync(join(root, file), "utf8")).join(""))}`;
  const at = (url = ""): string => Object.assign(new URL(url), { pathname: `/${name}_new` }).href;
  await server`select pg_advisory_lock(hashtext(${name}))`;
  const [there] = await server`select from pg_database where datname = ${name}`;
  if (!there) {
    await server.unsafe(`drop database if exists ${name}_new with (force)`);
    await server.unsafe(`create database ${name}_new`);
    await createSource(at(base.STACK_ADMIN_DATABASE_URL), []);
    await migrateMetadata(at(base.ETL_DATABASE_URL));
    await server.unsafe(`alter database ${name}_new rename to ${name}`);
  }
  await server`select pg_advisory_unlock(hashtext(${name}))`;
  return name;
}

/** Schema etl, as make migrate makes it. */
async function migrateMetadata(url = ""): Promise<void> {
  const etl = postgres(url, { max: 1, onnotice: () => {} });
  await migratePostgres(etl);
  await etl.end();
}

/** The datasets and tables of an environment in BigQuery, as make migrate makes them, without a process. */
async function createDestination(env: Env, api: (path: string, method: string, body: object) => Promise<unknown>): Promise<void> {
  const { BIGQUERY_PROJECT: projectId, BIGQUERY_DATASET: raw = "", BIGQUERY_VIEWS_DATASET: views, BIGQUERY_LOCATION: location } = env;
  for (const datasetId of [raw, views]) await api("/datasets", "POST", { datasetReference: { projectId, datasetId }, location });
  for (const tableId of pipelines) {
    const { resource } = readContract(tableId);
    await api(`/datasets/${raw}/tables`, "POST", { ...resource, tableReference: { projectId, datasetId: raw, tableId } });
  }
}

/** The database of an environment in ClickHouse, as make migrate makes it, without a process. */
export async function createReadings(env: Env): Promise<void> {
  const server = connectClickHouse({ ...env, CLICKHOUSE_DATABASE: "default" });
  await server.command({ query: `CREATE DATABASE ${env.CLICKHOUSE_DATABASE}` });
  await server.close();
  const client = connectClickHouse(env);
  await migrateClickHouse(client);
  await client.close();
}

/**
 * A port that nothing listens on, nor on the next (Kafka's controller has that). Not one of those that outgoing connections get: one of
 * them could take it before its server is there, or while it is down, or be one with itself.
 */
export async function freePort(): Promise<number> {
  for (;;) {
    const port = 12_000 + 2 * Math.floor(Math.random() * 9000);
    const checks = await Promise.allSettled([port, port + 1].map((one) => checkPort("", `127.0.0.1:${one}`)));
    if (checks.every(({ status }) => status === "fulfilled")) return port;
  }
}

/**
 * Waits until `condition` returns something true; fails after `seconds` with `what`. It looks every 20 ms; where a look takes long, less
 * often, down to twice a second: it may be work for the very server that is waited for.
 */
export async function until<T>(what: string, condition: () => Promise<T> | T, seconds = 60): Promise<NonNullable<T>> {
  const deadline = performance.now() + seconds * 1000;
  for (;;) {
    const from = performance.now();
    const value = await condition();
    if (value) return value;
    const now = performance.now();
    if (now > deadline) throw new Error(`not within ${seconds} s: ${what}`);
    await new Promise((resolve) => setTimeout(resolve, Math.min(500, Math.max(20, 10 * (now - from)))));
  }
}

/**
 * The peak RSS, in MB, of loads 0..count-1 by size: each the lowest of up to three, since a busy machine's late collections add to
 * a peak, and nothing takes from it. What grows with the rows does so in each.
 */
export async function lowestPeaks(count: number, measure: (index: number) => Promise<number>): Promise<number[]> {
  const lowest = Array<number>(count).fill(Number.POSITIVE_INFINITY);
  for (let tries = 0; tries < 3; tries++) {
    for (const index of lowest.keys()) lowest[index] = Math.min(lowest[index] ?? 0, await measure(index));
    if (Math.max(...lowest) - (lowest[0] ?? 0) <= 10) break;
  }
  return lowest;
}
