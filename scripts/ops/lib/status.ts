/**
 * The state of each pipeline, as schema etl, the source, Kafka, Kafka Connect and ClickHouse tell it within some seconds, and what of it
 * is a reason to get up. Nothing is changed.
 */
import { setTimeout as delay } from "node:timers/promises";
import type { Sql } from "postgres";
import { readIntervals, readThreshold } from "../../../shared/alerts.ts";
import { type Env, isSet, readEnv } from "../../../shared/env.ts";
import { thousands } from "../../../shared/log.ts";
import { watermarked } from "../../../shared/pipelines.ts";
import { describeHolder } from "../../../shared/run.ts";
import { kafkaVariables } from "../../../shared/sensors/broker.ts";
import { clickhouseVariables, connectClickHouse, select } from "../../../shared/sensors/clickhouse.ts";
import { connectVariables, isRunning, namesOf } from "../../../shared/sensors/connector.ts";
import { readEpoch, topicState } from "../../../shared/sensors/epoch.ts";
import { connectKafka, withAdmin } from "../../../shared/sensors/kafka.ts";
import { checkSession } from "../../../shared/session.ts";
import { duration } from "../../../shared/table.ts";
import { type Bound, distrust, readBound, readWatermark, type Watermark } from "../../../shared/watermark.ts";

/** A part that has not answered by then is shown as such. */
const PART_SECONDS = 5;

/** Every pipeline has every key; what it has not is null. Times are in UTC, ages in seconds. */
export interface Status {
  pipeline: string;
  /** ok; new: it never ran; warn: worth a look; red: it does not do its work. */
  state: "ok" | "new" | "warn" | "red";
  /** Why it is not ok, the worst first. */
  reasons: string[];
  watermark: string | null;
  watermark_age_seconds: number | null;
  /** How often it is meant to succeed (ops/alerts.yml). */
  interval_seconds: number | null;
  /** By schedule, not by hand. Of sensors: the last commit of a batch. */
  last_success: string | null;
  last_success_age_seconds: number | null;
  last_run: string | null;
  last_run_age_seconds: number | null;
  /** succeeded, failed, running, or abandoned: it says running, and nobody holds its lock. */
  last_run_state: string | null;
  last_run_id: string | null;
  last_run_by_hand: boolean | null;
  last_error: string | null;
  /** Of the last success. */
  rows: number | null;
  /** Who holds the pipeline's lock now: a run's id, or an application; and since when. */
  lock: string | null;
  lock_since: string | null;
  /** Who holds the watermark: an open transaction of the source, in words. */
  held_by: string | null;
  hold_seconds: number;
  /** Of events: the days that etl.chunks knows. */
  days: { archived: number; failed: number; running: number; first: string; last: string; at: string | null } | null;
  sensors: Sensors | null;
}

/** A part that does not answer is null, and a reason says why. */
interface Sensors {
  topic: string;
  epoch: number | null;
  lag: number | null;
  consumers: number | null;
  dead_letters: number | null;
  connector_running: boolean | null;
  slot_active: boolean | null;
  slot_retained_bytes: number | null;
}

/** What schema etl says of a pipeline. */
type Row = Omit<Status, "state" | "reasons" | "days" | "sensors">;

type Answer<T> = { value: T; error?: undefined } | { value?: undefined; error: string };

/** The answer, or the error, in words, of what did not come within PART_SECONDS. */
async function ask<T>(what: string, work: Promise<T>): Promise<Answer<T>> {
  const late = delay(PART_SECONDS * 1000, undefined, { ref: false }).then(() => {
    throw new Error(`${what} has not answered within ${PART_SECONDS} s`);
  });
  return await Promise.race([work, late]).then(
    (value) => ({ value }),
    (error: Error) => ({ error: error.message || String((error as { code?: string }).code ?? error.name) }),
  );
}

/** The state of all pipelines, by their names. @throws Error where schema etl cannot be read. */
export async function readStatus(etl: Sql, source: Sql): Promise<Status[]> {
  const intervals = readIntervals();
  const pipelines = [...new Set([...watermarked(), "sensors", "views", ...intervals.keys()])];
  const rows = await etl<Row[]>`
    select p.pipeline,
      replace(w.watermark::text, ' ', 'T') as watermark,
      extract(epoch from now() - w.watermark)::float8 as watermark_age_seconds,
      replace(date_trunc('second', ok.finished_at)::text, ' ', 'T') as last_success,
      extract(epoch from now() - ok.finished_at)::float8 as last_success_age_seconds,
      replace(date_trunc('second', last.started_at)::text, ' ', 'T') as last_run,
      extract(epoch from now() - last.started_at)::float8 as last_run_age_seconds,
      last.state as last_run_state, last.run_id as last_run_id, last.by_hand as last_run_by_hand, last.error as last_error, ok.rows::float8 as rows
    from unnest(${`{${pipelines.join()}}`}::text::text[]) p (pipeline)
    left join etl.watermarks w using (pipeline)
    left join lateral (select * from etl.runs r where r.pipeline = p.pipeline and r.state = 'succeeded' and not r.by_hand
                       order by started_at desc limit 1) ok on true
    left join lateral (select * from etl.runs r where r.pipeline = p.pipeline and r.state <> 'rewound'
                       order by started_at desc limit 1) last on true
    order by p.pipeline collate "C"`;
  // The metadata is worth showing also when the source is down; that is when people look.
  const bound = await ask(
    "the source",
    checkSession("SOURCE_DATABASE_URL", source).then(() => readBound(source)),
  );
  const statuses: Status[] = [];
  for (const row of rows) {
    const lock = await describeHolder(etl, row.pipeline);
    const status: Status = {
      ...row,
      state: "ok",
      reasons: [],
      interval_seconds: intervals.get(row.pipeline) ?? null,
      lock: (lock.holder as string | undefined) ?? null,
      lock_since: (lock.since as string | undefined) ?? null,
      held_by: null,
      hold_seconds: 0,
      days: row.pipeline === "events" ? await countDays(etl) : null,
      sensors: null,
    };
    statuses.push(status);
    if (row.pipeline === "sensors") {
      await judgeSensors(status, etl, source);
      continue;
    }
    // Said to be running, and another session has the lock, or none: it was killed, and could not say so.
    if (status.last_run_state === "running" && status.lock !== status.last_run_id) status.last_run_state = "abandoned";
    if (status.interval_seconds === null)
      blame(
        status,
        "red",
        "ops/alerts.yml has no etl_expected_interval_seconds for it: nobody is told if it goes quiet",
      );
    if (watermarked().includes(row.pipeline)) judgeSource(status, bound, await readWatermark(etl, row.pipeline));
    judgeRuns(status);
  }
  return statuses;
}

const severity = ["ok", "new", "warn", "red"] as const;

function blame(status: Status, state: "new" | "warn" | "red", reason: string): void {
  if (state === "red" && status.state !== "red") status.reasons.unshift(reason);
  else status.reasons.push(reason);
  if (severity.indexOf(state) > severity.indexOf(status.state)) status.state = state;
}

/** The same rules as the alerts': two intervals without a success; a last run that failed; nothing yet is new, not red. */
function judgeRuns(status: Status): void {
  const { interval_seconds: interval, last_success_age_seconds: age, last_run_state: last } = status;
  if (last === null) blame(status, "new", "it never ran");
  else if (interval !== null && age === null && last !== "running")
    blame(status, status.last_run_by_hand ? "new" : "red", "it never succeeded by its schedule");
  else if (interval !== null && age !== null && age > 2 * interval)
    blame(status, "red", `its last success is ${duration(age)} ago, and its interval ${duration(interval)}`);
  const state = status.last_run_by_hand ? "warn" : "red";
  if (last === "failed") blame(status, state, `its last run failed: ${status.last_error}`);
  if (last === "abandoned")
    blame(status, state, `its last run, ${status.last_run_id}, was abandoned: it was killed, and the next run goes on`);
  const { days } = status;
  if (days?.failed) blame(status, "warn", `${days.failed} days failed in a backfill or are to be archived again`);
}

/** Who holds the watermark, and whether it can still be trusted: what a run would stop at. */
function judgeSource(status: Status, { value, error }: Answer<Bound>, stored: Watermark | undefined): void {
  if (!value) {
    status.held_by = `unknown: ${error}`;
    blame(status, "red", `cannot tell which transaction holds its watermark: ${error}`);
    return;
  }
  status.held_by = value.holder;
  status.hold_seconds = value.hold_seconds;
  const state = value.hold_seconds > readThreshold("etl_watermark_hold_seconds") ? "red" : "warn";
  if (value.holder)
    blame(status, state, `its watermark is held for ${duration(value.hold_seconds)} by ${value.holder}`);
  const reason = stored && distrust(status.pipeline, stored, value);
  if (reason) blame(status, "red", reason);
}

async function countDays(etl: Sql): Promise<Status["days"]> {
  const [days] = await etl<NonNullable<Status["days"]>[]>`
    select count(*) filter (where state = 'succeeded')::int as archived, count(*) filter (where state = 'failed')::int as failed,
      count(*) filter (where state = 'running')::int as running, min(chunk_from)::date::text as first, max(chunk_from)::date::text as last,
      (max(chunk_from) filter (where state = 'running'))::date::text as at
    from etl.chunks where pipeline = 'events' having count(*) > 0`;
  return days ?? null;
}

/** Always on, so that lag, connector and slot tell what an interval would. */
async function judgeSensors(status: Status, etl: Sql, source: Sql): Promise<void> {
  if (!isSet("SENSORS_TOPIC")) return blame(status, "new", "it is not configured (SENSORS_TOPIC)");
  const env = readEnv(sensorsVariables);
  const { SENSORS_TOPIC: topic, SENSORS_GROUP: group } = env;
  const epoch = await readEpoch(etl, topic);
  const [[last], kafkaSays, letters, connector, slot] = await Promise.all([
    etl<{ at: string | null; age: number | null }[]>`
      select replace(date_trunc('second', max(updated_at))::text, ' ', 'T') as at, extract(epoch from now() - max(updated_at))::float8 as age
      from etl.topic_offsets where topic = ${topic}`,
    ask("Kafka", readTopic(env)),
    ask("ClickHouse", countDeadLetters(env)),
    ask("Kafka Connect", isRunning(env)),
    ask(
      "the source",
      source<{ active: boolean; bytes: string }[]>`
        select active, pg_wal_lsn_diff(pg_current_wal_lsn(), restart_lsn) as bytes from pg_replication_slots where slot_name = ${namesOf(env).slot}`,
    ),
  ]);
  status.last_success = last?.at ?? null;
  status.last_success_age_seconds = last?.age ?? null;
  const [kept] = slot.value ?? [];
  const sensors: Sensors = {
    topic,
    epoch: epoch?.number ?? null,
    lag: kafkaSays.value?.lag ?? null,
    consumers: kafkaSays.value?.consumers ?? null,
    dead_letters: letters.value ?? null,
    connector_running: connector.value ?? null,
    slot_active: kept?.active ?? null,
    slot_retained_bytes: kept ? Number(kept.bytes) : null,
  };
  status.sensors = sensors;
  if (!epoch) return blame(status, "new", `no consumer of topic ${topic} ever ran (group ${group})`);
  for (const [part, answer] of Object.entries({
    Kafka: kafkaSays,
    ClickHouse: letters,
    "Kafka Connect": connector,
    "the slot": slot,
  }))
    if (answer.error !== undefined) blame(status, "red", `${part} is not known: ${answer.error}`);
  const { lag, consumers, slot_retained_bytes: bytes } = sensors;
  if (lag !== null && lag > readThreshold("etl_sensors_lag"))
    blame(status, "red", `ClickHouse is ${thousands(lag)} messages behind Kafka`);
  if (consumers === 0) blame(status, lag ? "red" : "warn", "no consumer runs. Next: systemctl status etl-sensors");
  if (sensors.connector_running === false)
    blame(status, "red", "Debezium's connector does not run. Next: make connector");
  if (slot.value && !kept) blame(status, "red", `the source has no slot ${namesOf(env).slot}. Next: make connector`);
  if (bytes !== null && bytes > readThreshold("etl_sensors_slot_retained_bytes"))
    blame(status, "red", `the source keeps ${thousands(bytes / 1e6)} MB of WAL for the slot`);
  if (sensors.dead_letters)
    blame(status, "warn", `${thousands(sensors.dead_letters)} dead letters. Next: make dead-letters`);
}

const sensorsVariables = {
  ...clickhouseVariables,
  ...kafkaVariables,
  ...connectVariables,
};
type SensorsEnv = Env<typeof sensorsVariables>;

async function readTopic(env: SensorsEnv): Promise<{ lag: number; consumers: number }> {
  const broker = connectKafka(env, "etl-status");
  broker.logger().setLogLevel(0); // nothing: what it waits for is told in one line
  return await withAdmin(broker, env, async (admin) => {
    const partitions = await topicState(admin, env.SENSORS_TOPIC, env.SENSORS_GROUP);
    const { groups } = await admin.describeGroups([env.SENSORS_GROUP]);
    return { lag: partitions.reduce((sum, { lag }) => sum + lag, 0), consumers: groups[0]?.members.length ?? 0 };
  });
}

async function countDeadLetters(env: SensorsEnv): Promise<number> {
  const client = connectClickHouse(env);
  const [row] = await select<{ letters: string }>(
    client,
    "SELECT count() AS letters FROM sensor_dead_letters FINAL WHERE topic = {topic: String}",
    { topic: env.SENSORS_TOPIC },
  ).finally(() => client.close());
  return Number(row?.letters);
}
