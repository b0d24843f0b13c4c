#!/usr/bin/env -S npx tsx
/**
 * status: where each pipeline is. Reads schema etl, the source's open transactions, and, where they are configured, Kafka, Kafka Connect,
 * ClickHouse, BigQuery and the source's slot; a part that does not answer within 5 s is shown as such. It changes nothing. sql/status.sql
 * judges, and says what each key means.
 *
 *   make status          a table, with colours on a terminal (unless NO_COLOR is set)
 *   make status JSON=1   the same for programs, on stdout: an object for each pipeline, each with every key of sql/status.sql:
 *                        pipeline, state, reasons, watermark, watermark_age_seconds, interval_seconds, last_success,
 *                        last_success_age_seconds, last_run, last_run_age_seconds, last_run_state, last_run_id, last_run_by_hand,
 *                        last_error, rows, lock, lock_since, held_by, hold_seconds, days, sensors; times in UTC, ages in seconds,
 *                        null where a pipeline has no such thing
 *
 *   state      red     stale by the rule of the alerts (two intervals), last run failed or abandoned, the watermark held for longer than
 *                      its alert allows or not to be trusted (the source restored, a clock set back), a part that does not answer,
 *                      sensors' lag or WAL over its alert, no connector, no slot, no consumer while there are messages
 *              warn    a shorter hold, a run by hand that failed or was abandoned, failed days, dead letters, no consumer of a
 *                      topic that is read to its end
 *              new     never ran, or not configured
 *   exit code  1 where a pipeline is red, else 0
 */
import { styleText } from "node:util";
import type { Sql } from "postgres";
import { readIntervals, readThreshold } from "../../shared/alerts.ts";
import { type Env, flag, isSet, optional, readEnv } from "../../shared/env.ts";
import { main } from "../../shared/main.ts";
import { pipelines, watermarked } from "../../shared/pipelines.ts";
import { describeHolder, pipelineVariables } from "../../shared/run.ts";
import { kafkaVariables } from "../../shared/sensors/broker.ts";
import { readCanary } from "../../shared/sensors/canary.ts";
import { clickhouseVariables, connectClickHouse, select } from "../../shared/sensors/clickhouse.ts";
import { connectVariables, isRunning, namesOf } from "../../shared/sensors/connector.ts";
import { readEpoch, topicState } from "../../shared/sensors/epoch.ts";
import { connectKafka, withAdmin } from "../../shared/sensors/kafka.ts";
import { checkSession, openSession } from "../../shared/session.ts";
import { findUnreachable, readSelect } from "../../shared/source.ts";
import { table } from "../../shared/table.ts";
import { type Bound, distrust, readBound, readWatermark } from "../../shared/watermark.ts";
import { answer } from "./lib/answer.ts";

type State = "ok" | "new" | "warn" | "red";

/** A row of sql/status.sql: the row of the table, the lines below it, and what JSON=1 prints. */
type Row = { pipeline: string; state: State; line: Record<string, string>; said: string[] | null };

/** What other servers say of a pipeline; `found` is what is wrong already. */
type Facts = { found: { state: State; reason: string }[]; [fact: string]: unknown };

/** A part that has not answered by then is shown as such. */
const PART_SECONDS = 5;
const sensorsVariables = { ...clickhouseVariables, ...kafkaVariables, ...connectVariables };

await main(import.meta, async () => {
  const { SOURCE_DATABASE_URL, ETL_DATABASE_URL, WATERMARK_LAG_SECONDS } = pipelineVariables;
  const env = readEnv({ SOURCE_DATABASE_URL, ETL_DATABASE_URL, WATERMARK_LAG_SECONDS, JSON: optional(flag, false) });
  const open = (url: string, settings: Record<string, string> = {}) =>
    openSession(url, { application: "etl:status", timeoutSeconds: 4, settings });
  const etl = open(env.ETL_DATABASE_URL);
  const source = open(env.SOURCE_DATABASE_URL, { "etl.lag_seconds": String(env.WATERMARK_LAG_SECONDS) });
  await checkSession("ETL_DATABASE_URL", etl);

  // 1. Ask the other servers.
  const facts = await readFacts(etl, source);

  // 2. Judge.
  const limits = {
    hold: readThreshold("etl_watermark_hold_seconds"),
    lag: readThreshold("etl_sensors_lag"),
    canary: readThreshold("etl_sensors_canary_timestamp_seconds"),
    wal: readThreshold("etl_sensors_slot_retained_bytes"),
  };
  await etl`select set_config('etl.facts', ${JSON.stringify(facts)}, false), set_config('etl.limits', ${JSON.stringify(limits)}, false)`;
  const rows = await etl.unsafe<Row[]>(readSelect("status"));

  // 3. Print.
  const statuses = rows.map(({ line, said, ...status }) => status);
  if (env.JSON) process.stdout.write(`${JSON.stringify(statuses, null, 2)}\n`);
  else print(rows);
  process.exit(rows.some(({ state }) => state === "red") ? 1 : 0); // a part that has not answered may still be waited for
});

async function readFacts(etl: Sql, source: Sql): Promise<Facts[]> {
  const intervals = readIntervals();
  const facts: Facts[] = [];
  const bound = await askPart("the source", () => checkSession("SOURCE_DATABASE_URL", source).then(() => readBound(source)));
  for (const pipeline of new Set([...watermarked(), "sensors", "views", ...intervals.keys()])) {
    const { holder: lock, since: lock_since } = await describeHolder(etl, pipeline);
    const fact: Facts = { pipeline, interval_seconds: intervals.get(pipeline), lock, lock_since, found: [] };
    if (pipeline === "sensors") await askSensors(fact, etl, source);
    // The metadata is worth showing also when the source is down; that is when people look.
    if (watermarked().includes(pipeline)) {
      if (bound.value) await askSource(fact, pipeline, etl, source, bound.value);
      else {
        fact.held_by = `unknown: ${bound.error}`;
        blame(fact, `cannot tell which transaction holds its watermark: ${bound.error}`);
      }
    }
    facts.push(fact);
  }
  return facts;
}

function blame({ found }: Facts, reason: string, state: State = "red"): void {
  found.push({ state, reason });
}

/** What the part gives, or the error in words. */
async function askPart<T>(part: string, work: () => Promise<T>): Promise<{ value?: T; error?: string }> {
  return await answer(PART_SECONDS, `${part} has not answered within ${PART_SECONDS} s`, work);
}

/** What a run would stop at, or warn of: a hold, another history or table than the watermark's, and rows of the future. */
async function askSource(fact: Facts, pipeline: string, etl: Sql, source: Sql, bound: Bound): Promise<void> {
  Object.assign(fact, { held_by: bound.holder, hold_seconds: bound.hold_seconds });
  const stored = await readWatermark(etl, pipeline);
  if (!stored) return;
  let target: Parameters<typeof distrust>[3];
  if (pipelines().includes(pipeline) && isSet("BIGQUERY_PROJECT")) {
    const { bigqueryVariables } = await import("../../shared/bigquery/client.ts");
    const contract = (await import("../../shared/bigquery/contract.ts")).readContract(pipeline);
    const { openDestination } = await import("../../shared/bigquery/load.ts");
    const opened = await askPart("BigQuery", () => openDestination(readEnv(bigqueryVariables), contract));
    if (opened.error) blame(fact, opened.error);
    target = opened.value;
    fact.future_rows = (await askPart("the source", () => findUnreachable(source, contract.source, []))).value?.future;
  }
  const reason = await distrust({ pipeline, source }, stored, bound, target);
  if (reason) blame(fact, reason);
}

async function askSensors(fact: Facts, etl: Sql, source: Sql): Promise<void> {
  if (!isSet("SENSORS_TOPIC")) return blame(fact, "it is not configured (SENSORS_TOPIC)", "new");
  const env = readEnv(sensorsVariables);
  const { SENSORS_TOPIC: topic, SENSORS_GROUP: group } = env;
  const { slot } = namesOf(env);
  const epoch = await readEpoch(etl, topic);
  if (!epoch) return blame(fact, `no consumer of topic ${topic} ever ran (group ${group})`, "new");
  const ask = async <T>(part: string, work: () => Promise<T>): Promise<T | undefined> => {
    const { value, error } = await askPart(part, work);
    if (error) blame(fact, `${part} is not known: ${error}`);
    return value;
  };
  const canary = await readCanary(etl, topic);
  const [kafka, dead_letters, connector_running, slots] = await Promise.all([
    ask("Kafka", () => readTopic(env)),
    ask("ClickHouse", () => countDeadLetters(env)),
    ask("Kafka Connect", () => isRunning(env)),
    ask(
      "the slot",
      async () =>
        await source<{ wal: string }[]>`
        select wal_status as wal, active as slot_active, pg_wal_lsn_diff(pg_current_wal_lsn(), restart_lsn)::float8 as slot_retained_bytes
        from pg_replication_slots where slot_name = ${slot}`,
    ),
  ]);
  const [kept] = slots ?? [];
  Object.assign(fact, { slot, slot_wal: kept?.wal ?? (slots && "none") });
  fact.sensors = { topic, epoch: epoch.number, ...kafka, dead_letters, connector_running, ...kept, ...canary };
}

async function readTopic(env: Env<typeof sensorsVariables>): Promise<{ lag: number; consumers: number }> {
  const broker = connectKafka(env, "etl-status");
  broker.logger().setLogLevel(0); // nothing: what it waits for is told in one line
  return await withAdmin(broker, env, async (admin) => {
    const partitions = await topicState(admin, env.SENSORS_TOPIC, env.SENSORS_GROUP);
    const { groups } = await admin.describeGroups([env.SENSORS_GROUP]);
    return { lag: partitions.reduce((sum, { lag }) => sum + lag, 0), consumers: groups[0]?.members.length ?? 0 };
  });
}

async function countDeadLetters(env: Env<typeof sensorsVariables>): Promise<number> {
  await using client = connectClickHouse(env);
  const query = "SELECT count() AS letters FROM sensor_dead_letters FINAL WHERE topic = {topic: String}";
  const [row] = await select<{ letters: string }>(client, query, { topic: env.SENSORS_TOPIC });
  return Number(row?.letters);
}

function print(rows: Row[]): void {
  const colours = { ok: "green", new: "gray", warn: "yellow", red: "red" } as const;
  const [names = "", ...lines] = table(rows.map(({ line }) => line)).split("\n");
  // styleText: on a terminal only, and not where NO_COLOR is set.
  const shown = lines.map((line, at) => styleText(colours[rows[at]?.state ?? "ok"], line, { stream: process.stdout }));
  process.stdout.write(`${[names, ...shown].join("\n")}\n`);
  const below = rows.flatMap(({ pipeline, said }) => said?.map((words) => `${pipeline}: ${words}\n`) ?? []);
  if (below.length) process.stdout.write(`\n${below.join("")}`);
}
