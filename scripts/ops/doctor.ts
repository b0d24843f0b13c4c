#!/usr/bin/env -S npx tsx
/**
 * doctor: checks a set-up before its first run, one line a check: `ok`, or `FAIL` with what to do. What a run checks first is
 * checked by the same code; it continues past what fails, and exits 1 if anything did.
 *
 *   Postgres          connections, roles, and of each pipeline columns, index, trigger and watermark (sql/doctor.sql)
 *   the destinations  BigQuery by dry runs, which need the permissions and do nothing; the bucket by an object put and deleted;
 *                     ClickHouse by an insert without rows
 *   sensors           publication, slot, connector, topic and group
 *   safe to re-run    yes: what it puts (an object, a metric group, both of them named doctor) it deletes
 *
 *   make doctor                    every pipeline that has its variables
 *   make doctor PIPELINE=orders    what this one needs
 */
import type { Sql } from "postgres";
import { type ApiError, type BigQueryEnv, bigqueryVariables, connectBigQuery, remedy } from "../../shared/bigquery/client.ts";
import { checkSource, readContract } from "../../shared/bigquery/contract.ts";
import { mergeStatement, openDestination } from "../../shared/bigquery/load.ts";
import { isSet, oneOf, optional, parsePostgresUrl, readEnv, redact } from "../../shared/env.ts";
import { checkArchivable, eventsSource } from "../../shared/events/archive.ts";
import { bucketVariables, checkBucket, connectS3, put, removeObjects } from "../../shared/events/s3.ts";
import type { Fields } from "../../shared/log.ts";
import { main } from "../../shared/main.ts";
import { deleteMetrics, pushMetrics } from "../../shared/metrics.ts";
import { pendingMigrations } from "../../shared/migrations.ts";
import { pipelines } from "../../shared/pipelines.ts";
import { newRunId, pipelineVariables } from "../../shared/run.ts";
import { kafkaVariables } from "../../shared/sensors/broker.ts";
import { readCanary } from "../../shared/sensors/canary.ts";
import * as clickhouse from "../../shared/sensors/clickhouse.ts";
import { checkDebezium, isRunning, namesOf } from "../../shared/sensors/connector.ts";
import { checkReadings } from "../../shared/sensors/consumer.ts";
import { readEpoch, takeEpoch, topicState } from "../../shared/sensors/epoch.ts";
import { connectKafka, withAdmin } from "../../shared/sensors/kafka.ts";
import { checkSession, openSession } from "../../shared/session.ts";
import { viewsVariables } from "../../shared/views/build.ts";
import { distrust, readBound, readWatermark } from "../../shared/watermark.ts";
import { answer } from "./lib/answer.ts";
import { askCatalogue, type CatalogueCheck } from "./lib/catalogue.ts";
import { askReplication, checkConfig, checkTopicSettings, connectorVariables } from "./lib/kafka-connect.ts";
import { appliedInPostgres, nameClickHouse } from "./lib/migrations.ts";

/** Prints the check's line. @returns whether it is ok. `work` returns what else is worth knowing, or throws what to do. */
type Check = (name: string, work: () => unknown) => Promise<boolean>;

const { ETL_DATABASE_URL, SOURCE_DATABASE_URL, PUSHGATEWAY_URL } = pipelineVariables;
const session = { application: "etl:doctor", timeoutSeconds: 30 };
/** A check that hangs must not keep the others from being printed. */
const DEADLINE_SECONDS = 40;

/** What only these pipelines need: a shop that has set none of it does not have them. */
const own: Record<string, string[]> = {
  ...Object.fromEntries(pipelines().map((pipeline) => [pipeline, ["BIGQUERY_PROJECT", "BIGQUERY_DATASET"]])),
  views: ["BIGQUERY_PROJECT", "BIGQUERY_VIEWS_DATASET"],
  events: ["S3_BUCKET"],
  sensors: ["KAFKA_BROKERS", "CLICKHOUSE_URL", "CONNECT_URL", "REPLICATION_DATABASE_URL"],
};

await main(import.meta, async () => {
  const { PIPELINE: only } = readEnv({ PIPELINE: optional(oneOf(Object.keys(own))) });
  const has = (name: string): boolean => (only ? name === only : (own[name] ?? []).some(isSet));
  const synced = pipelines().filter(has);
  const tables = [...synced, "events"].filter(has);
  const sections: [title: string, needed: boolean, work: (check: Check) => Promise<unknown>][] = [
    ["etl", true, checkMetadata],
    ["source", tables.length > 0 || has("sensors"), (check) => checkSourceDatabase(check, tables)],
    ["bigquery", synced.length > 0, (check) => checkBigQuery(check, synced)],
    ["views", has("views"), checkViews],
    ["s3", has("events"), checkS3],
    ["sensors", has("sensors"), checkCapture],
    ["kafka", has("sensors"), checkKafka],
    ["clickhouse", has("sensors"), checkClickHouse],
    ["pushgateway", true, checkPushgateway],
  ];
  let failures = 0;
  // Side by side, since a server that does not answer takes its time; each section prints its lines together.
  const printed = sections.map(async ([title, needed, work]) => {
    const lines: string[] = [];
    const check: Check = async (name, inner) => {
      const { value, error } = await answer(DEADLINE_SECONDS, inner);
      const said = error?.replaceAll(/\s*\n\s*/g, "; ").replaceAll(":;", ":") ?? (typeof value === "string" ? value : "");
      if (error) failures += 1;
      lines.push(redact(`${error ? "FAIL" : "ok  "}  ${title}: ${name}${said && `: ${said}`}\n`));
      return !error;
    };
    if (needed) await work(check).catch((error) => check("variables", () => Promise.reject(error)));
    return lines.join("");
  });
  for (const lines of printed) process.stdout.write(await lines);
  for (const name of Object.keys(own).filter((name) => !only && !has(name)))
    process.stdout.write(`-     ${name}: not checked, since none of ${own[name]?.join(", ")} is set\n`);
  process.stdout.write(failures ? `${failures} checks failed. Fix the lines marked FAIL, then run: make doctor\n` : "all is well\n");
  process.exit(failures ? 1 : 0); // a client may still be asking a server that is away
});

/** Opens a session of the variable, and says how it is encrypted: in clear text, passwords and rows can be read on the way. */
async function openChecked(check: Check, variable: string, url: string, settings = {}): Promise<Sql | undefined> {
  const sql = openSession(url, { ...session, settings });
  const { user, sslmode } = parsePostgresUrl(url);
  const isOpen = await check("connection", async () => {
    await checkSession(variable, sql);
    if (sslmode.startsWith("verify-")) return `as ${user}; TLS, certificate checked`;
    const how = sslmode === "require" ? "TLS, certificate not checked: sslmode=verify-full would" : "sslmode=verify-full would encrypt it";
    return `as ${user}; ${how}`;
  });
  return isOpen ? sql : undefined;
}

async function printCatalogue(check: Check, answers: Promise<CatalogueCheck[]>): Promise<void> {
  for (const { check: name, ok, remedy } of await answers) await check(name, () => (ok ? remedy : Promise.reject(new Error(`${remedy}`))));
}

async function checkMetadata(check: Check): Promise<void> {
  const { ETL_DATABASE_URL: url } = readEnv({ ETL_DATABASE_URL });
  const etl = await openChecked(check, "ETL_DATABASE_URL", url);
  if (!etl) return;
  const isDirect = await check("one session is one connection to Postgres", async () => {
    const [other, pids] = [openSession(url, session), [] as number[]];
    // A transaction pooler gives each statement whatever connection is free. Unnamed statements: a prepared one stays on its connection.
    for (const sql of [etl, other, other, etl]) pids.push((await sql.unsafe("select pg_backend_pid() as pid"))[0]?.pid);
    if (pids[0] !== pids[1] && pids[0] === pids[3] && pids[1] === pids[2]) return;
    const next = "Point it at Postgres itself, or at a pool in session mode";
    throw new Error(`ETL_DATABASE_URL goes through a transaction pooler, where a run's lock would not be its own. ${next}`);
  });
  if (!isDirect) return;
  await check("tables are those of sql/etl", async () => {
    const missing = pendingMigrations("sql/etl", await appliedInPostgres(etl)).map(({ file }) => file);
    if (missing.length) throw new Error(`not applied: ${missing.join(", ")}. Run: make migrate`);
  });
  await printCatalogue(check, askCatalogue(etl, "metadata"));
}

/** What a run checks in its steps 2 and 3, and sql/doctor.sql. */
async function checkSourceDatabase(check: Check, tables: string[]): Promise<void> {
  const env = readEnv({ ETL_DATABASE_URL, SOURCE_DATABASE_URL });
  const source = await openChecked(check, "SOURCE_DATABASE_URL", env.SOURCE_DATABASE_URL, { "etl.lag_seconds": "0" });
  if (!source) return;
  const etl = openSession(env.ETL_DATABASE_URL, session);
  await check("open transactions can be seen", async () => (await readBound(source)).holder ?? "none holds a watermark");
  const named: string[] = [];
  for (const pipeline of tables) {
    const contract = pipeline === "events" ? undefined : readContract(pipeline);
    const { table, cursor } = contract?.source ?? eventsSource;
    named.push([pipeline, table, cursor].join(":"));
    await check(`${pipeline}: table and sql/${pipeline}.sql`, async () => {
      const warnings: Fields[] = [];
      const run = { pipeline, source, etl, log: (_: string, fields: Fields = {}) => void warnings.push(fields), metrics: {} };
      await (contract ? checkSource(run, contract) : checkArchivable(run));
      const future = warnings.find(({ rows }) => rows);
      if (future) throw new Error(`${future.warning}`);
      return warnings.map(({ columns }) => `not synced: ${columns}`).join();
    });
    await check(`${pipeline}: watermark`, async () => {
      const stored = await readWatermark(etl, pipeline);
      // Why there is no target, its own section says.
      const target = await answer(DEADLINE_SECONDS, () => contract && openDestination(readEnv(bigqueryVariables), contract));
      const reason = stored && (await distrust({ pipeline, source }, stored, await readBound(source), target.value));
      if (reason) throw new Error(reason);
      return stored?.watermark ?? "none yet";
    });
  }
  await printCatalogue(check, askCatalogue(source, "source", { "etl.tables": named.join(" ") }));
}

/** BigQuery checks the permissions of a dry run as those of the query itself. */
async function dryRun(env: BigQueryEnv, query: string): Promise<void> {
  const job = { query, dryRun: true, useLegacySql: false, location: env.BIGQUERY_LOCATION };
  const created = connectBigQuery(env).createQueryJob(job);
  await created.catch((error: ApiError) => {
    throw new Error(`${error.message}. ${remedy(error)}`);
  });
}

async function checkBigQuery(check: Check, synced: string[]): Promise<void> {
  const env = readEnv(bigqueryVariables);
  for (const pipeline of synced) {
    const contract = readContract(pipeline);
    if (!(await check(`${pipeline}: table is as ${contract.file} says`, () => openDestination(env, contract)))) continue;
    const target = `\`${env.BIGQUERY_PROJECT}.${env.BIGQUERY_DATASET}.${pipeline}\``;
    await check(`${pipeline}: staging tables may be created and merged (dry run)`, async () => {
      await dryRun(env, `CREATE TABLE ${target.replace(/`$/, "_staging_doctor`")} AS SELECT * FROM ${target}`);
      await dryRun(env, mergeStatement(contract, target, target));
    });
  }
}

async function checkViews(check: Check): Promise<void> {
  const env = readEnv(viewsVariables);
  const { BIGQUERY_PROJECT: project, BIGQUERY_VIEWS_DATASET: dataset } = env;
  await check("models may be published (dry run)", async () => {
    const [exists] = await connectBigQuery(env).dataset(dataset).exists();
    if (!exists) throw new Error(`dataset ${dataset} (BIGQUERY_VIEWS_DATASET) does not exist. Run: make migrate`);
    await dryRun(env, `CREATE TABLE \`${project}.${dataset}.doctor\` AS SELECT 1 AS one`);
  });
}

async function checkS3(check: Check): Promise<void> {
  const bucket = connectS3(readEnv(bucketVariables));
  if (!(await check("bucket", () => checkBucket(bucket)))) return;
  const key = `${bucket.prefix}events/doctor/${newRunId()}.json`;
  await check("an object may be put and deleted", async () => {
    const putNew = (): Promise<boolean> => put(bucket, key, "{}\n", undefined, { by: "make doctor" });
    const twice = (await putNew()) && (await putNew());
    await removeObjects(bucket, [key]);
    if (twice) throw new Error("the server ignores If-None-Match, so two runs could each put a day's manifest. Use one that heeds it");
  });
}

async function checkCapture(check: Check): Promise<void> {
  const env = readEnv({ ...connectorVariables, SENSORS_TOPIC: kafkaVariables.SENSORS_TOPIC });
  if (await openChecked(check, "REPLICATION_DATABASE_URL", env.REPLICATION_DATABASE_URL)) await printCatalogue(check, askReplication(env));
  await check("Debezium's version", () => checkDebezium(env));
  await check(`connector ${namesOf(env).connector}`, async () => {
    if (!(await isRunning(env))) throw new Error("it does not exist, or does not run. Run: make connector (says why)");
    return (await checkConfig(env)) ? "CONNECT_URL shows its database password in clear text: see REPLICATION_PASSWORD_REFERENCE" : "";
  });
}

async function checkKafka(check: Check): Promise<void> {
  const env = readEnv({ ETL_DATABASE_URL, ...clickhouse.clickhouseVariables, ...kafkaVariables });
  const { SENSORS_TOPIC: topic, SENSORS_GROUP: group } = env;
  const broker = connectKafka(env, "etl-doctor");
  const etl = openSession(env.ETL_DATABASE_URL, session);
  await check(`topic ${topic} and group ${group}`, async () => {
    const where = () => withAdmin(broker, env, (admin) => topicState(admin, topic, group));
    const partitions = await where().catch((error: Error) => {
      if (/authorized|group coordinator/.test(error.message)) error.message += ". KAFKA_USERNAME needs READ on topic and group";
      throw error;
    });
    await withAdmin(broker, env, (admin) => checkTopicSettings(admin, env));
    if (await readEpoch(etl, topic)) await takeEpoch(etl, topic, env.CLICKHOUSE_DATABASE, where);
    const gap = (await readCanary(etl, topic))?.gap;
    if (gap) throw new Error(`${gap}. Run: make verify PIPELINE=sensors`);
    return `${partitions.length} partitions, lag ${partitions.reduce((sum, { lag }) => sum + lag, 0)}`;
  });
}

/** What a consumer checks when it starts, and an insert without rows. */
async function checkClickHouse(check: Check): Promise<void> {
  const env = readEnv({ SOURCE_DATABASE_URL, ...clickhouse.clickhouseVariables });
  const client = clickhouse.connectClickHouse(env);
  const migrations = () => clickhouse.checkMigrations(client, env.CLICKHOUSE_DATABASE).catch((error: Error) => nameClickHouse(env, error));
  if (!(await check("the files of schemas/clickhouse are applied", migrations))) return;
  await check("rows may be inserted", () =>
    clickhouse.insertRowBinary(client, "sensor_landing", Buffer.alloc(0), AbortSignal.timeout(30_000)),
  );
  await check("the source has its columns", async () => {
    const unknown = await checkReadings(env, await clickhouse.readingColumns(client));
    return unknown.length ? `kept in _unknown: ${unknown}` : "";
  });
}

async function checkPushgateway(check: Check): Promise<void> {
  const { PUSHGATEWAY_URL: url } = readEnv({ PUSHGATEWAY_URL });
  await check("takes a push", () => pushMetrics(url, "doctor", {}).then(() => deleteMetrics(url, "doctor")));
}
