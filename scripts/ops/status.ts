#!/usr/bin/env -S npx tsx
/**
 * status: where each pipeline is. Reads schema etl, the source, and, where they are configured, BigQuery, Kafka, Connect and ClickHouse; a
 * part that does not answer within 5 s is shown as such. It changes nothing. sql/status.sql judges, and says what each key means.
 *
 *   make status          a table, and below it what is wrong
 *   make status JSON=1   the same for programs, on stdout: an array with an object for each pipeline
 *
 *   state      red (what an alert tells, or would), warn (what can wait), new (never ran, or not configured) or ok
 *   exit code  1 where a pipeline is red, else 0
 */
import type { Sql } from "postgres";
import { readIntervals, readThreshold } from "../../shared/alerts.ts";
import { bigqueryVariables } from "../../shared/bigquery/client.ts";
import { readContract } from "../../shared/bigquery/contract.ts";
import { openDestination } from "../../shared/bigquery/load.ts";
import { flag, isSet, optional, readEnv } from "../../shared/env.ts";
import { main } from "../../shared/main.ts";
import { pipelines, watermarked } from "../../shared/pipelines.ts";
import { describeHolder, pipelineVariables } from "../../shared/run.ts";
import { kafkaVariables } from "../../shared/sensors/broker.ts";
import { clickhouseVariables, connectClickHouse, select } from "../../shared/sensors/clickhouse.ts";
import { connectVariables, isRunning, namesOf } from "../../shared/sensors/connector.ts";
import { readEpoch, topicState } from "../../shared/sensors/epoch.ts";
import { connectKafka, withAdmin } from "../../shared/sensors/kafka.ts";
import { checkSession, openSession, queryFile } from "../../shared/session.ts";
import { findUnreachable } from "../../shared/source.ts";
import { table } from "../../shared/table.ts";
import { distrust, readBound, readWatermark } from "../../shared/watermark.ts";
import { answer } from "./lib/answer.ts";

/** A row of sql/status.sql: the row of the table, the lines below it, and what JSON=1 prints. */
type Row = { state: string; line: Record<string, string>; said: string | null };

/** What other servers say of a pipeline; `found` is what is wrong already. */
type Fact = { pipeline: string; found: { state: string; reason: string }[]; [fact: string]: unknown };

const alerts = ["etl_watermark_hold_seconds", "etl_sensors_lag", "etl_sensors_canary_timestamp_seconds", "etl_sensors_slot_retained_bytes"];
const PART_SECONDS = 5;

await main(import.meta, async () => {
  const { SOURCE_DATABASE_URL, ETL_DATABASE_URL, WATERMARK_LAG_SECONDS } = pipelineVariables;
  const env = readEnv({ SOURCE_DATABASE_URL, ETL_DATABASE_URL, WATERMARK_LAG_SECONDS, JSON: optional(flag, false) });
  const session = { application: "etl:status", timeoutSeconds: 4 };
  const etl = openSession(env.ETL_DATABASE_URL, session);
  const settings = { "etl.lag_seconds": String(env.WATERMARK_LAG_SECONDS) };
  const source = openSession(env.SOURCE_DATABASE_URL, { ...session, settings });
  await checkSession("ETL_DATABASE_URL", etl);

  // 1. Ask the other servers, side by side.
  const facts = await readFacts(etl, source);

  // 2. Judge.
  const limits = Object.fromEntries(alerts.map((metric) => [metric, readThreshold(metric)]));
  const judged = { "etl.facts": JSON.stringify(facts), "etl.limits": JSON.stringify(limits) };
  const rows = await queryFile<Row>(etl, "status", judged);

  // 3. Print.
  const statuses = rows.map(({ line, said, ...status }) => status);
  const below = rows.map(({ said }) => said ?? "").join("");
  const shown = env.JSON ? JSON.stringify(statuses, null, 2) : `${table(rows.map(({ line }) => line))}${below && `\n\n${below.trimEnd()}`}`;
  process.stdout.write(`${shown}\n`);
  process.exit(rows.some(({ state }) => state === "red") ? 1 : 0); // a part that has not answered may still be waited for
});

async function readFacts(etl: Sql, source: Sql): Promise<Fact[]> {
  const intervals = readIntervals();
  const asked = [...new Set([...watermarked(), "sensors", "views", ...intervals.keys()])].map(async (pipeline) => {
    const { holder: lock, since: lock_since } = await describeHolder(etl, pipeline);
    const fact: Fact = { pipeline, interval_seconds: intervals.get(pipeline), lock, lock_since, found: [] };
    if (pipeline === "sensors") await askSensors(fact, etl, source);
    const stored = await readWatermark(etl, pipeline);
    const contract = stored && pipelines().includes(pipeline) ? readContract(pipeline) : undefined;
    // Without retries: the first error is said, and in time.
    const open = () => contract && openDestination(readEnv(bigqueryVariables), contract, { autoRetry: false });
    return { fact, stored, contract, target: isSet("BIGQUERY_PROJECT") ? await ask(fact, "BigQuery", open) : undefined };
  });
  const all = await Promise.all(asked);
  // After the watermarks, which a run beside this may move up to a later bound; and when no statement of ours is at work.
  const open = () => checkSession("SOURCE_DATABASE_URL", source).then(() => readBound(source));
  const { value: bound, error } = await answer(PART_SECONDS, open);
  // What a run would stop at, or warn of: a hold, another history or table than the watermark's, and rows of the future.
  for (const { fact, stored, contract, target } of all) {
    if (!stored) continue;
    Object.assign(fact, { held_by: bound ? bound.holder : `unknown: ${error}`, hold_seconds: bound?.hold_seconds });
    let reason: string | undefined = `cannot tell which transaction holds its watermark: ${error}`;
    if (bound) reason = await distrust({ pipeline: fact.pipeline, source }, stored, bound, target);
    if (reason) fact.found.push({ state: "red", reason });
    // A lock on the table may keep this one from being answered; nothing is wrong then.
    const ahead = await answer(PART_SECONDS, () => bound && contract && findUnreachable(source, contract.source, []));
    fact.future_rows = ahead.value?.future;
  }
  return all.map(({ fact }) => fact);
}

/** What the part gives; where it gives none, that is a reason. */
async function ask<T>({ found }: Fact, part: string, work: () => T | Promise<T>): Promise<T | undefined> {
  const { value, error } = await answer(PART_SECONDS, work);
  if (error) found.push({ state: "red", reason: `${part} is not known: ${error}` });
  return value;
}

async function askSensors(fact: Fact, etl: Sql, source: Sql): Promise<void> {
  const isNew = (reason: string): void => void fact.found.push({ state: "new", reason });
  if (!isSet("SENSORS_TOPIC")) return isNew("it is not configured (SENSORS_TOPIC)");
  const env = readEnv({ ...clickhouseVariables, ...kafkaVariables, ...connectVariables });
  const { SENSORS_TOPIC: topic, SENSORS_GROUP: group } = env;
  if (!(await readEpoch(etl, topic))) return isNew(`no consumer of topic ${topic} ever ran (group ${group})`);
  const { slot } = namesOf(env);
  const broker = connectKafka(env, "etl-status");
  broker.logger().setLogLevel(0); // nothing: what it waits for is told in one line
  const parts = {
    Kafka: () =>
      withAdmin(broker, env, async (admin) => {
        const lag = (await topicState(admin, topic, group)).reduce((sum, { lag }) => sum + lag, 0);
        return { lag, consumers: (await admin.describeGroups([group])).groups[0]?.members.length ?? 0 };
      }),
    ClickHouse: async () => {
      const query = "SELECT toUInt32(count()) AS dead_letters FROM sensor_dead_letters FINAL WHERE topic = {topic: String}";
      return (await select<object>(connectClickHouse(env), query, { topic }))[0];
    },
    "Kafka Connect": async () => ({ connector_running: await isRunning(env) }),
    "the slot": async () => {
      const [found] = await source`
        select wal_status as slot_wal, active as slot_active,
          pg_wal_lsn_diff(pg_current_wal_lsn(), restart_lsn)::float8 as slot_retained_bytes
        from pg_replication_slots where slot_name = ${slot}`;
      return found ?? { slot_wal: "none" };
    },
  };
  const answers = await Promise.all(Object.entries(parts).map(([part, work]) => ask<object | undefined>(fact, part, work)));
  fact.sensors = Object.assign({ topic, slot }, ...answers);
}
