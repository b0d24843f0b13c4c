#!/usr/bin/env -S npx tsx
/**
 * doctor: checks a set-up before its first run, one line a check: `ok`, or `FAIL` with what to do. What a run checks first is checked by
 * the same code, roles, indexes and triggers by sql/doctor.sql; BigQuery's permissions by dry runs, the bucket's by an object put and
 * deleted. It continues past what fails, and exits 1 if anything did.
 *
 *   safe to re-run   yes: what it puts (an object, a metric group, both of them named doctor) it deletes
 *
 *   make doctor                    every pipeline that has its variables
 *   make doctor PIPELINE=orders    what this one needs
 */
import { type BigQueryEnv, bigqueryVariables, connectBigQuery, remedy } from "../../shared/bigquery/client.ts";
import { checkSource, readContract } from "../../shared/bigquery/contract.ts";
import { mergeStatement, openDestination } from "../../shared/bigquery/load.ts";
import { isSet, oneOf, optional, readEnv, redact } from "../../shared/env.ts";
import { checkArchivable, eventsSource } from "../../shared/events/archive.ts";
import { bucketVariables, checkBucket, connectS3, put, removeObjects } from "../../shared/events/s3.ts";
import { ask, below } from "../../shared/http.ts";
import type { Fields } from "../../shared/log.ts";
import { main } from "../../shared/main.ts";
import { pushMetrics } from "../../shared/metrics.ts";
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
import { appliedInPostgres } from "./lib/migrations.ts";

/** Prints a line, of rows of sql/doctor.sql each. `work` returns what is worth knowing, or throws what to do. @returns whether it is ok. */
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
  const sections: [title: string, needed: boolean, work: (check: Check) => Promise<unknown>][] = [
    ["etl", true, checkMetadata],
    ["source", only !== "views", (check) => checkSourceDatabase(check, [...synced, "events"].filter(has))],
    ["bigquery", synced.length > 0, (check) => checkBigQuery(check, synced)],
    ["views", has("views"), checkViews],
    ["s3", has("events"), checkS3],
    ["sensors", has("sensors"), checkSensors],
    ["pushgateway", true, checkPushgateway],
  ];
  let failures = 0;
  // Side by side, since a server that does not answer takes its time; each section prints its lines together.
  const printed = sections.map(async ([title, needed, work]) => {
    let lines = "";
    const print = (check: string, ok: boolean, remedy: string | null): void => {
      const said = (remedy ?? "").replaceAll(/\s*\n\s*/g, "; ").replaceAll(":;", ":");
      lines += redact(`${ok ? "ok  " : "FAIL"}  ${title}: ${check}${said && `: ${said}`}\n`);
      if (!ok) failures += 1;
    };
    const check: Check = async (name, inner) => {
      const { value, error } = await answer(DEADLINE_SECONDS, inner);
      if (Array.isArray(value)) for (const { check, ok, remedy } of value as CatalogueCheck[]) print(check, ok, remedy);
      else print(name, !error, error ?? (typeof value === "string" ? value : ""));
      return !error;
    };
    if (needed) await work(check).catch((error) => check("variables", () => Promise.reject(error)));
    return lines;
  });
  for (const lines of printed) process.stdout.write(await lines);
  for (const name of Object.keys(own).filter((name) => !only && !has(name)))
    process.stdout.write(`-     ${name}: not checked, since none of ${own[name]?.join(", ")} is set\n`);
  process.stdout.write(failures ? `${failures} checks failed. Fix the lines marked FAIL, then run: make doctor\n` : "all is well\n");
  process.exit(failures ? 1 : 0); // a client may still be asking a server that is away
});

async function checkMetadata(check: Check): Promise<void> {
  const { ETL_DATABASE_URL: url } = readEnv({ ETL_DATABASE_URL });
  const etl = openSession(url, session);
  if (!(await check("connection", () => checkSession("ETL_DATABASE_URL", etl)))) return;
  await check("one session is one connection to Postgres", async () => {
    // A transaction pooler gives another session the same connection, and with it the lock that is held there.
    const lock = `hashtextextended('etl:doctor ${newRunId()}', 0)`;
    await etl.unsafe(`select pg_advisory_lock(${lock})`);
    const [other] = await openSession(url, session).unsafe(`select pg_try_advisory_lock(${lock}) as taken`);
    const pooled = "ETL_DATABASE_URL goes through a transaction pooler, where a run's lock would not be its own";
    if (other?.taken) throw new Error(`${pooled}. Point it at Postgres itself, or at a pool in session mode`);
  });
  await check("tables are those of sql/etl", async () => {
    const missing = pendingMigrations("sql/etl", await appliedInPostgres(etl)).map(({ file }) => file);
    if (missing.length) throw new Error(`not applied: ${missing.join(", ")}. Run: make migrate`);
  });
  await check("roles", () => askCatalogue(etl, "metadata"));
}

/** What a run checks in its steps 2 and 3, and sql/doctor.sql. */
async function checkSourceDatabase(check: Check, tables: string[]): Promise<void> {
  const env = readEnv({ ETL_DATABASE_URL, SOURCE_DATABASE_URL });
  const source = openSession(env.SOURCE_DATABASE_URL, { ...session, settings: { "etl.lag_seconds": "0" } });
  if (!(await check("connection", () => checkSession("SOURCE_DATABASE_URL", source)))) return;
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
  await check("roles, indexes and triggers", () => askCatalogue(source, "source", { "etl.tables": named.join(" ") }));
}

/** BigQuery checks the permissions of a dry run as those of the query itself. */
async function dryRun(env: BigQueryEnv, query: string): Promise<void> {
  const created = connectBigQuery(env).createQueryJob({ query, dryRun: true });
  await created.catch((error: Error) => Promise.reject(new Error(`${error.message}. ${remedy}`)));
}

async function checkBigQuery(check: Check, synced: string[]): Promise<void> {
  const env = readEnv(bigqueryVariables);
  for (const pipeline of synced) {
    const contract = readContract(pipeline);
    const target = `\`${env.BIGQUERY_PROJECT}.${env.BIGQUERY_DATASET}.${pipeline}\``;
    await check(`${pipeline}: table is as ${contract.file} says, and rows may be merged into it (dry run)`, async () => {
      await openDestination(env, contract);
      await dryRun(env, `CREATE TABLE ${target.replace(/`$/, "_staging_doctor`")} AS SELECT * FROM ${target}`);
      await dryRun(env, mergeStatement(contract, target, target));
    });
  }
}

async function checkViews(check: Check): Promise<void> {
  const env = readEnv(viewsVariables);
  const dataset = env.BIGQUERY_VIEWS_DATASET;
  await check("models may be published (dry run)", async () => {
    const [exists] = await connectBigQuery(env).dataset(dataset).exists();
    if (!exists) throw new Error(`dataset ${dataset} (BIGQUERY_VIEWS_DATASET) does not exist. Run: make migrate`);
    await dryRun(env, `CREATE TABLE \`${env.BIGQUERY_PROJECT}.${dataset}.doctor\` AS SELECT 1 AS one`);
  });
}

async function checkS3(check: Check): Promise<void> {
  const bucket = connectS3(readEnv(bucketVariables));
  const key = `${bucket.prefix}events/doctor/${newRunId()}.json`;
  const putNew = (): Promise<boolean> => put(bucket, key, "{}\n", "make doctor");
  await check("an object may be put and deleted", async () => {
    await checkBucket(bucket);
    const twice = (await putNew()) && (await putNew());
    await removeObjects(bucket, [key]);
    if (twice) throw new Error("the server ignores If-None-Match, so two runs could each put a day's manifest. Use one that heeds it");
  });
}

/** What make connector and a consumer check when they start, and an insert without rows. */
async function checkSensors(check: Check): Promise<void> {
  const servers = { ...connectorVariables, ...kafkaVariables, ...clickhouse.clickhouseVariables };
  const env = readEnv({ ETL_DATABASE_URL, SOURCE_DATABASE_URL, ...servers });
  const { SENSORS_TOPIC: topic, SENSORS_GROUP: group, CLICKHOUSE_DATABASE: database } = env;
  await check("connection", () => askReplication(env));
  await check("Debezium's version", () => checkDebezium(env));
  await check(`connector ${namesOf(env).connector}`, async () => {
    if (!(await isRunning(env))) throw new Error("it does not exist, or does not run. Run: make connector (says why)");
    return (await checkConfig(env)) ? "CONNECT_URL shows its database password in clear text: see REPLICATION_PASSWORD_REFERENCE" : "";
  });
  const broker = connectKafka(env, "etl-doctor");
  const etl = openSession(env.ETL_DATABASE_URL, session);
  const where = () => withAdmin(broker, env, (admin) => topicState(admin, topic, group));
  await check(`topic ${topic} and group ${group}`, async () => {
    const partitions = await where();
    await withAdmin(broker, env, (admin) => checkTopicSettings(admin, env));
    if (await readEpoch(etl, topic)) await takeEpoch(etl, topic, database, where);
    const gap = (await readCanary(etl, topic))?.gap;
    if (gap) throw new Error(`${gap}. Run: make verify PIPELINE=sensors`);
    return `${partitions.length} partitions, lag ${partitions.reduce((sum, { lag }) => sum + lag, 0)}`;
  });
  const client = clickhouse.connectClickHouse(env);
  await check("ClickHouse's tables, an insert, and the source's columns", async () => {
    await clickhouse.checkMigrations(client, env);
    await clickhouse.insertRows(client, "sensor_landing FORMAT RowBinary", []);
    const unknown = await checkReadings(env, await clickhouse.readingColumns(client));
    return unknown.length ? `kept in _unknown: ${unknown}` : "";
  });
}

async function checkPushgateway(check: Check): Promise<void> {
  const { PUSHGATEWAY_URL: url } = readEnv({ PUSHGATEWAY_URL });
  await check("takes a push", async () => {
    await pushMetrics(url, "doctor", {});
    await ask("PUSHGATEWAY_URL", below(url, "metrics/job/etl/pipeline/doctor"), { method: "DELETE" }, 5);
  });
}
