#!/usr/bin/env -S npx tsx
/**
 * status: where each pipeline is. Reads schema etl (sql/status.sql), the source's open transactions, and, where they are configured, Kafka,
 * Kafka Connect, ClickHouse and the source's slot; a part that does not answer within 5 s is shown as such. It changes nothing.
 *
 *   make status          a table, with colours on a terminal (unless NO_COLOR is set)
 *   make status JSON=1   the same for programs, on stdout: one array with an object for each pipeline, each with every key of Status below:
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
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { setTimeout as delay } from "node:timers/promises";
import { styleText } from "node:util";
import type { Sql } from "postgres";
import { readIntervals, readThreshold } from "../../shared/alerts.ts";
import { type Env, flag, isSet, optional, readEnv, root } from "../../shared/env.ts";
import { thousands } from "../../shared/log.ts";
import { main } from "../../shared/main.ts";
import { watermarked } from "../../shared/pipelines.ts";
import { describeHolder, pipelineVariables } from "../../shared/run.ts";
import { kafkaVariables } from "../../shared/sensors/broker.ts";
import { readCanary } from "../../shared/sensors/canary.ts";
import { clickhouseVariables, connectClickHouse, select } from "../../shared/sensors/clickhouse.ts";
import { connectVariables, isRunning, namesOf } from "../../shared/sensors/connector.ts";
import { readEpoch, topicState } from "../../shared/sensors/epoch.ts";
import { connectKafka, withAdmin } from "../../shared/sensors/kafka.ts";
import { checkSession, connect } from "../../shared/session.ts";
import { duration, table } from "../../shared/table.ts";
import { distrust, readBound, readWatermark } from "../../shared/watermark.ts";

const states = ["ok", "new", "warn", "red"] as const;
type State = (typeof states)[number];

/** What schema etl knows of a pipeline: a row of sql/status.sql, which says what the keys mean. */
type Known = Record<
  "watermark" | "last_success" | "last_run" | "last_run_state" | "last_run_id" | "last_error",
  string | null
> &
  Record<"watermark_age_seconds" | "last_success_age_seconds" | "last_run_age_seconds" | "rows", number | null> & {
    pipeline: string;
    last_run_by_hand: boolean | null;
    days: (Record<"archived" | "failed" | "running", number> & Record<"first" | "last" | "at", string>) | null;
  };

export type Status = Known & {
  state: State;
  /** Why it is not ok, the worst first. */
  reasons: string[];
  /** How often it is meant to succeed (ops/alerts.yml). */
  interval_seconds: number | null;
  /** Who holds the pipeline's lock now, a run's id or an application, and since when. */
  lock: string | null;
  lock_since: string | null;
  /** Who holds the watermark: an open transaction of the source, in words. */
  held_by: string | null;
  hold_seconds: number;
  sensors: Sensors | null;
};

/** Of a part that does not answer null, and a reason says why. */
type Sensors = Record<
  "lag" | "consumers" | "dead_letters" | "slot_retained_bytes" | "canary_age_seconds",
  number | null
> &
  Record<"connector_running" | "slot_active", boolean | null> & {
    topic: string;
    epoch: number;
    canary_gap: string | null;
  };

/** A part that has not answered by then is shown as such. */
const PART_SECONDS = 5;
const sensorsVariables = { ...clickhouseVariables, ...kafkaVariables, ...connectVariables };

await main(import.meta, async () => {
  const { SOURCE_DATABASE_URL, ETL_DATABASE_URL, WATERMARK_LAG_SECONDS } = pipelineVariables;
  const env = readEnv({ SOURCE_DATABASE_URL, ETL_DATABASE_URL, WATERMARK_LAG_SECONDS, JSON: optional(flag, false) });
  const pipelines = [...new Set([...watermarked(), "sensors", "views", ...readIntervals().keys()])];
  const open = (url: string, settings: Record<string, string>) =>
    connect(url, { application: "etl:status", timeoutSeconds: 4, settings });
  const topic = process.env.SENSORS_TOPIC ?? "";
  const etl = open(env.ETL_DATABASE_URL, { "etl.pipelines": pipelines.join(" "), "etl.topic": topic });
  const source = open(env.SOURCE_DATABASE_URL, { "etl.lag_seconds": String(env.WATERMARK_LAG_SECONDS) });
  await checkSession("ETL_DATABASE_URL", etl);
  const all = await readStatus(etl, source);
  if (env.JSON) process.stdout.write(`${JSON.stringify(all, null, 2)}\n`);
  else print(all);
  process.exit(all.some(({ state }) => state === "red") ? 1 : 0); // a part that has not answered may still be waited for
});

/** The state of all pipelines, by their names. @throws Error where schema etl cannot be read. */
async function readStatus(etl: Sql, source: Sql): Promise<Status[]> {
  const known = await etl.unsafe<Known[]>(readFileSync(join(root, "sql/status.sql"), "utf8"));
  // The metadata is worth showing also when the source is down; that is when people look.
  const bound = await answer(
    "the source",
    checkSession("SOURCE_DATABASE_URL", source).then(() => readBound(source)),
  );
  const statuses: Status[] = [];
  for (const row of known) {
    const { holder, since } = await describeHolder(etl, row.pipeline);
    const status: Status = {
      ...row,
      state: "ok",
      reasons: [],
      interval_seconds: readIntervals().get(row.pipeline) ?? null,
      lock: (holder as string | undefined) ?? null,
      lock_since: (since as string | undefined) ?? null,
      held_by: null,
      hold_seconds: 0,
      sensors: null,
    };
    statuses.push(status);
    if (row.pipeline === "sensors") await judgeSensors(status, etl, source);
    else judgeRuns(status);
    if (!watermarked().includes(row.pipeline)) continue;
    if (bound.error !== undefined) {
      status.held_by = `unknown: ${bound.error}`;
      blame(status, "red", `cannot tell which transaction holds its watermark: ${bound.error}`);
      continue;
    }
    // What a run would stop at.
    const { holder: held_by, hold_seconds } = bound.value;
    Object.assign(status, { held_by, hold_seconds });
    const long = hold_seconds > readThreshold("etl_watermark_hold_seconds");
    if (held_by)
      blame(status, long ? "red" : "warn", `its watermark is held for ${duration(hold_seconds)} by ${held_by}`);
    const stored = await readWatermark(etl, row.pipeline);
    const reason = stored && distrust(row.pipeline, stored, bound.value);
    if (reason) blame(status, "red", reason);
  }
  return statuses;
}

/** What came within PART_SECONDS, or the error in words. */
async function answer<T>(part: string, work: Promise<T>): Promise<{ value: T; error?: undefined } | { error: string }> {
  const late = delay(PART_SECONDS * 1000, undefined, { ref: false }).then(() => {
    throw new Error(`${part} has not answered within ${PART_SECONDS} s`);
  });
  return await Promise.race([work, late]).then(
    (value) => ({ value }),
    (error: Error) => ({ error: error.message || String((error as { code?: string }).code ?? error.name) }),
  );
}

function blame(status: Status, state: State, reason: string): void {
  if (state === "red" && status.state !== "red") status.reasons.unshift(reason);
  else status.reasons.push(reason);
  if (states.indexOf(state) > states.indexOf(status.state)) status.state = state;
}

/** The same rules as the alerts': two intervals without a success; a last run that failed; nothing yet is new, not red. */
function judgeRuns(status: Status): void {
  // It says running, and another session has the lock, or none: it was killed, and could not say so.
  if (status.last_run_state === "running" && status.lock !== status.last_run_id) status.last_run_state = "abandoned";
  const { interval_seconds: interval, last_success_age_seconds: age, last_run_state: last, days } = status;
  const [state, absent]: [State, State] = status.last_run_by_hand ? ["warn", "new"] : ["red", "red"];
  if (interval === null)
    blame(status, "red", "ops/alerts.yml has no etl_expected_interval_seconds for it: nobody is told if it goes quiet");
  else if (last !== null && age === null && last !== "running")
    blame(status, absent, "it never succeeded by its schedule");
  else if (age !== null && age > 2 * interval)
    blame(status, "red", `its last success is ${duration(age)} ago, and its interval ${duration(interval)}`);
  if (last === null) blame(status, "new", "it never ran");
  if (last === "failed") blame(status, state, `its last run failed: ${status.last_error}`);
  if (last === "abandoned")
    blame(status, state, `its last run, ${status.last_run_id}, was abandoned: it was killed, and the next run resumes`);
  if (days?.failed) blame(status, "warn", `${days.failed} days failed in a backfill or are to be archived again`);
}

/** Always on, so that lag, connector and slot tell what an interval would. */
async function judgeSensors(status: Status, etl: Sql, source: Sql): Promise<void> {
  if (!isSet("SENSORS_TOPIC")) return blame(status, "new", "it is not configured (SENSORS_TOPIC)");
  const env = readEnv(sensorsVariables);
  const { SENSORS_TOPIC: topic, SENSORS_GROUP: group } = env;
  const { slot } = namesOf(env);
  const epoch = await readEpoch(etl, topic);
  if (!epoch) return blame(status, "new", `no consumer of topic ${topic} ever ran (group ${group})`);
  const part = async <T>(name: string, work: Promise<T>): Promise<T | undefined> => {
    const { error, ...answered } = (await answer(name, work)) as { value?: T; error?: string };
    if (error !== undefined) blame(status, "red", `${name} is not known: ${error}`);
    return answered.value;
  };
  const canary = await readCanary(etl, topic);
  const [kafka, dead_letters, connector_running, slots] = await Promise.all([
    part("Kafka", readTopic(env)),
    part("ClickHouse", countDeadLetters(env)),
    part("Kafka Connect", isRunning(env)),
    part(
      "the slot",
      source<{ active: boolean; wal: string; bytes: string }[]>`
      select active, wal_status as wal, pg_wal_lsn_diff(pg_current_wal_lsn(), restart_lsn) as bytes from pg_replication_slots where slot_name = ${slot}`,
    ),
  ]);
  const kept = slots?.[0];
  const lag = kafka?.lag ?? null;
  const bytes = kept ? Number(kept.bytes) : null;
  status.sensors = {
    topic,
    epoch: epoch.number,
    lag,
    consumers: kafka?.consumers ?? null,
    dead_letters: dead_letters ?? null,
    connector_running: connector_running ?? null,
    slot_active: kept?.active ?? null,
    slot_retained_bytes: bytes,
    canary_age_seconds: canary?.age_seconds ?? null,
    canary_gap: canary?.gap ?? null,
  };
  const { consumers } = status.sensors;
  if (lag !== null && lag > readThreshold("etl_sensors_lag"))
    blame(status, "red", `ClickHouse is ${thousands(lag)} messages behind Kafka`);
  if (consumers === 0) blame(status, lag ? "red" : "warn", "no consumer runs. Next: systemctl status etl-sensors");
  if (connector_running === false) blame(status, "red", "Debezium's connector does not run. Next: make connector");
  const lost = `the changes since are lost to Debezium. Next: systemctl stop etl-sensors, then: make resnapshot`;
  if (slots && !kept) blame(status, "red", `the source has no slot ${slot} (any more): ${lost}`);
  if (kept?.wal === "lost") blame(status, "red", `the source has removed WAL that slot ${slot} needs: ${lost}`);
  if (kept?.active === false) blame(status, "warn", `nobody reads the slot ${slot}. Next: make connector`);
  if (canary?.gap)
    blame(status, "red", `${canary.gap}. Next: make verify PIPELINE=sensors, and where rows differ: make resnapshot`);
  const age = canary?.age_seconds ?? 0;
  if (age > readThreshold("etl_sensors_canary_timestamp_seconds"))
    blame(
      status,
      age > 300 ? "red" : "warn",
      `no canary has come from the source for ${duration(age)}. Next: ops/runbook.md#etlsensorscanarystale`,
    );
  if (bytes !== null && bytes > readThreshold("etl_sensors_slot_retained_bytes"))
    blame(status, "red", `the source keeps ${thousands(bytes / 1e6)} MB of WAL for the slot`);
  if (dead_letters) blame(status, "warn", `${thousands(dead_letters)} dead letters. Next: make dead-letters`);
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

function print(all: Status[]): void {
  const colours = { ok: "green", new: "gray", warn: "yellow", red: "red" } as const;
  const ago = (seconds: number | null): string => (seconds === null ? "never" : `${duration(seconds)} ago`);
  const rows = all.map((of) => ({
    pipeline: of.pipeline,
    watermark: of.watermark ?? "none",
    age: of.watermark_age_seconds === null ? "-" : duration(of.watermark_age_seconds),
    "last success": ago(of.last_success_age_seconds),
    every: of.interval_seconds === null ? "-" : duration(of.interval_seconds).replace(/ 0[hms]$/, ""),
    "last run": of.last_run_state ? `${of.last_run_state} ${ago(of.last_run_age_seconds)}` : "never",
    rows: of.rows === null ? "-" : thousands(of.rows),
    "lock held by": of.lock ?? "nobody",
    state: of.state,
  }));
  const [names = "", ...lines] = table(rows).split("\n");
  // styleText: on a terminal only, and not where NO_COLOR is set.
  const shown = lines.map((line, at) => styleText(colours[all[at]?.state ?? "ok"], line, { stream: process.stdout }));
  process.stdout.write(`${[names, ...shown].join("\n")}\n`);
  const below = all.flatMap((of) => details(of).map((line) => `${of.pipeline}: ${line}\n`));
  if (below.length) process.stdout.write(`\n${below.join("")}`);
}

/** Below the table: why a pipeline is not ok, its error, and what has no column. */
function details({ reasons, lock, lock_since, days, sensors }: Status): string[] {
  const lines = [...reasons];
  if (lock) lines.push(`its lock is held by ${lock} since ${lock_since}`);
  if (days) {
    const archived = `${thousands(days.archived)} days archived of ${days.first} to ${days.last}, ${days.failed} failed`;
    lines.push(days.at ? `${archived}, at ${days.at}` : archived);
  }
  if (!sensors) return lines;
  const of = (value: number | null, unit = ""): string => (value === null ? "unknown" : `${thousands(value)}${unit}`);
  const wal = of(sensors.slot_retained_bytes && sensors.slot_retained_bytes / 1e6, " MB");
  const { lag, consumers, dead_letters: letters } = sensors;
  lines.push(
    `lag ${of(lag)} · consumers ${of(consumers)} · dead letters ${of(letters)} · WAL kept for the slot ${wal}`,
  );
  return lines;
}
