/**
 * What the consumer of sensors does beside moving batches: it checks the source's columns, counts the dead letters, stops where
 * too much is poison, and reports.
 */
import { setTimeout as delay } from "node:timers/promises";
import type { ClickHouseClient } from "@clickhouse/client";
import { Counter, collectDefaultMetrics, Gauge, Histogram, Registry } from "prom-client";
import { type Env, like, number, optional, postgresUrl, required, UsageError } from "../env.ts";
import { log, thousands } from "../log.ts";
import { onSignal } from "../main.ts";
import { checkSession, connect } from "../session.ts";
import { readDefinitions, select } from "./clickhouse.ts";
import { type Batch, type Kafka, type kafkaVariables, topicState, withAdmin } from "./kafka.ts";
import { isRunning, namesOf, sourceTable as table } from "./kafka-connect.ts";
import { serveMetrics } from "./metrics-server.ts";

export const consumerVariables = {
  SOURCE_DATABASE_URL: required(postgresUrl),
  ETL_DATABASE_URL: required(postgresUrl),
  SENSORS_POISON_SHARE: optional(number(0, 1, false), 0.1),
  METRICS_PORT: optional(number(0, 65_535), 9464),
  UNTIL: optional(like(/^caught-up$/, "can only be caught-up")),
};

/** Postgres's types that a column of ClickHouse holds every value of, as Debezium writes them. */
const fitting: Record<string, string[]> = {
  Int64: ["bigint", "integer", "smallint"],
  String: ["text", "character varying"],
  Float64: ["double precision", "real"],
  "DateTime64(6, 'UTC')": ["timestamp with time zone"],
};
/** LowCardinality(Nullable(String)) → String */
const plain = (type: string): string =>
  type.replace(/^LowCardinality\((.*)\)$/, "$1").replace(/^Nullable\((.*)\)$/, "$1");

/**
 * Compares the source table with the columns of sensor_readings (schemas/clickhouse), before anything is ingested.
 * @returns the names of its columns that are not there, whose values go to _unknown.
 * @throws UsageError that lists each column that is gone or has another type.
 */
export async function checkReadings(env: { SOURCE_DATABASE_URL: string }): Promise<string[]> {
  await using source = connect(env.SOURCE_DATABASE_URL, { application: "etl:sensors", timeoutSeconds: 30 });
  await checkSession("SOURCE_DATABASE_URL", source);
  const found = await source<{ name: string; type: string; full: boolean }[]>`
    select attname as name, format_type(atttypid, null) as type, relreplident = 'f' as full
    from pg_attribute join pg_class c on c.oid = attrelid
    where attrelid = to_regclass(${table}) and attnum > 0 and not attisdropped order by attnum`;
  const contract = readDefinitions().find(({ name }) => name === "sensor_readings");
  const wanted = contract?.columns.filter(({ name }) => !name.startsWith("_")) ?? [];
  const faults = wanted.flatMap(({ name, type }) => {
    const is = found.find((column) => column.name === name)?.type ?? "no such column";
    return fitting[plain(type)]?.includes(is)
      ? []
      : [`column ${table}.${name}: expected one for ${type} (${contract?.file}), found ${is}`];
  });
  if (found.length && !found[0]?.full)
    faults.push(
      `table ${table}: its changes lack the old row. Run as its owner: alter table ${table} replica identity full;`,
    );
  if (faults.length)
    throw new UsageError(
      `the source differs from the contract, nothing was ingested:\n${faults.map((fault) => `  ${fault}`).join("\n")}\nBring the source, ${contract?.file} and the view that reads it together; README, "When the schema changes".`,
    );
  const unknown = found.map(({ name }) => name).filter((name) => !wanted.some((column) => column.name === name));
  if (unknown.length)
    log({
      step: "warning",
      warning: `${table} has columns that are not in ${contract?.file}; their values are kept in _unknown`,
      columns: unknown.join(),
    });
  return unknown;
}

/** Which of a batch's messages are among the dead letters: their indices. */
export async function findDeadLetters(
  client: ClickHouseClient,
  place: { topic: string; epoch: number; partition: number },
  { messages }: Batch,
): Promise<number[]> {
  const letters = await select<{ offset: string }>(
    client,
    `SELECT DISTINCT toString(offset) AS offset FROM sensor_dead_letters WHERE topic = {topic: String} AND epoch = {epoch: UInt16}
     AND partition = {partition: UInt32} AND sensor_dead_letters.offset BETWEEN {first: UInt64} AND {last: UInt64}`,
    { ...place, first: messages[0]?.offset ?? "0", last: messages.at(-1)?.offset ?? "0" },
  );
  const parked = new Set(letters.map(({ offset }) => offset));
  return messages.flatMap(({ offset }, index) => (parked.has(offset) ? [index] : []));
}

const POISON_MESSAGES = { least: 100, last: 1000 };

/**
 * Called with the number of a batch's messages and the indices of those that are dead letters, ascending.
 * @throws Error where these are more than the share of the last 1,000 messages (of at least 100), at any of them: a contract is
 * broken then, and it is not a message that is bad.
 */
export function createPoisonLimit(share: number): (messages: number, parked: number[]) => void {
  let seen = 0;
  let bad: number[] = []; // which of the messages, of the last 1,000
  const judge = (message: number): void => {
    bad = bad.filter((one) => one > message - POISON_MESSAGES.last);
    const last = Math.min(message, POISON_MESSAGES.last);
    if (last < POISON_MESSAGES.least || bad.length <= share * last) return;
    throw new Error(
      `${thousands(bad.length)} of the last ${thousands(last)} messages are no valid change, more than SENSORS_POISON_SHARE=${share} allows: what Debezium writes is not what the views read. The last batch was not committed, so that it is read again. Next: make dead-letters (says why)`,
    );
  };
  return (messages, parked) => {
    for (const index of parked) {
      bad.push(seen + index + 1);
      judge(seen + index + 1);
    }
    seen += messages;
    judge(seen);
  };
}

/**
 * `stop` aborts at the first SIGTERM or Ctrl-C, `abandon` 8 s later, so that whoever waits for a server that is away ends too.
 * A second one ends the process.
 */
export function stopSignals(): { stop: AbortController; abandon: AbortSignal } {
  const [stop, abandon] = [new AbortController(), new AbortController()];
  onSignal((signal) => {
    log({ step: "stopping", signal, next: "the batch under way is finished and committed" });
    stop.abort(new Error(`stopped by ${signal}`));
    setTimeout(() => abandon.abort(new Error(`stopped by ${signal}`)), 8000).unref();
  });
  return { stop, abandon: abandon.signal };
}

/** Metrics at METRICS_PORT, and a line every ten seconds. */
export async function createReport(
  env: Env<typeof kafkaVariables> & { SOURCE_DATABASE_URL: string; CONNECT_URL: string; METRICS_PORT: number },
  kafka: Kafka,
  unknown: string[],
) {
  const registers = [new Registry()];
  const [registry] = registers as [Registry];
  collectDefaultMetrics({ register: registry });
  const gauge = (name: string, help: string): Gauge => new Gauge({ name, help, registers });
  const counter = (name: string, help: string): Counter => new Counter({ name, help, registers });
  const rows = counter("etl_sensors_rows_total", "Changes inserted.");
  const batches = counter("etl_sensors_batches_total", "Batches inserted, each by one insert.");
  const dead = counter("etl_sensors_dead_letters_total", "Messages that were no valid change, and were parked.");
  const insert = new Histogram({
    name: "etl_sensors_insert_seconds",
    help: "Duration of a batch's insert, waiting for ClickHouse included.",
    buckets: [0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100],
    registers,
  });
  const age = gauge("etl_sensors_event_age_seconds", "From the commit of the last change at the source to its insert.");
  const away = gauge("etl_sensors_clickhouse_away", "1 while an insert waits for ClickHouse.");
  gauge("etl_sensors_unknown_source_columns", "Columns of the source table that are kept in _unknown.").set(
    unknown.length,
  );
  // What is asked of others at each scrape. Where they do not answer within 3 s, what was known stays.
  const asked = (name: string, help: string, ask: (gauge: Gauge) => Promise<void>, labels: string[] = []): void => {
    let asking: Promise<void> | undefined;
    new Gauge({
      name,
      help,
      registers,
      labelNames: labels,
      async collect() {
        asking ??= ask(this)
          .catch(() => {})
          .finally(() => {
            asking = undefined;
          });
        await Promise.race([asking, delay(3000, undefined, { ref: false })]);
      },
    });
  };
  const perPartition = async (lag: Gauge): Promise<void> => {
    const partitions = await withAdmin(kafka, env, (admin) => topicState(admin, env.SENSORS_TOPIC, env.SENSORS_GROUP));
    for (const { partition, lag: messages } of partitions) lag.set({ partition: String(partition) }, messages);
  };
  asked("etl_sensors_lag", "Messages that the group has not committed yet.", perPartition, ["partition"]);
  asked("etl_sensors_connector_running", "1 while Debezium's connector and its task run.", async (running) =>
    running.set((await isRunning(env).catch(() => false)) ? 1 : 0),
  );
  asked("etl_sensors_slot_retained_bytes", "WAL that the source keeps for the connector's slot.", async (retained) => {
    await using source = connect(env.SOURCE_DATABASE_URL, { application: "etl:sensors", timeoutSeconds: 3 });
    const [slot] = await source<{ bytes: string }[]>`
      select pg_wal_lsn_diff(pg_current_wal_lsn(), restart_lsn) as bytes from pg_replication_slots where slot_name = ${namesOf(env).slot}`;
    if (slot) retained.set(Number(slot.bytes));
  });
  const started = performance.now();
  const total = { rows: 0, batches: 0, dead_letters: 0 };
  let [lines, fetched, waitingSince] = [{ at: started, rows: 0 }, started, 0];
  const secondsSince = (at: number): number => Math.round((performance.now() - at) / 1000);
  const server = await serveMetrics(env.METRICS_PORT, registry, () => {
    if (waitingSince && secondsSince(waitingSince) > 60)
      return `ClickHouse has been away for ${secondsSince(waitingSince)} s`;
    return !waitingSince && secondsSince(fetched) > 60
      ? `Kafka has not answered for ${secondsSince(fetched)} s, or an insert has not ended`
      : undefined;
  });
  log({ step: "serving", metrics: `http://127.0.0.1:${server.port}/metrics` });
  return {
    /** A batch was inserted and counted. */
    inserted: ({ messages }: Batch, parked: number, seconds: number): void => {
      const changes = messages.filter(({ value }) => value).length - parked;
      total.rows += changes;
      total.batches += 1;
      total.dead_letters += parked;
      rows.inc(changes);
      batches.inc();
      dead.inc(parked);
      insert.observe(seconds);
      const event = ageOf(messages.at(-1)?.value);
      if (event !== undefined) age.set(event);
      if (performance.now() - lines.at < 10_000) return;
      const per = (total.rows - lines.rows) / ((performance.now() - lines.at) / 1000);
      log({
        step: "inserted",
        ...total,
        rows_per_second: Math.round(per),
        event_age_seconds: event?.toFixed(1),
      });
      lines = { at: performance.now(), rows: total.rows };
    },
    /** ClickHouse is away, or is there again. */
    waiting: (error?: Error): void => {
      if (error && !waitingSince) {
        waitingSince = performance.now();
        log({ step: "waiting", for: "ClickHouse", error: error.message.slice(0, 300) });
      } else if (!error) {
        log({ step: "back", waited_seconds: secondsSince(waitingSince) });
        waitingSince = 0;
      }
      away.set(error ? 1 : 0);
    },
    /** The broker answered. */
    fetched: (): void => {
      fetched = performance.now();
    },
    done: (): void => {
      const seconds = (performance.now() - started) / 1000;
      log({
        step: "done",
        ...total,
        seconds: seconds.toFixed(3),
        rows_per_second: Math.round(total.rows / seconds),
        peak_rss_mb: Math.round(process.resourceUsage().maxRSS / 1024),
      });
    },
    [Symbol.asyncDispose]: () => server[Symbol.asyncDispose](),
  };
}

/** Seconds since the source committed the message's change, by the message's own source.ts_ms. */
function ageOf(value: Buffer | null | undefined): number | undefined {
  try {
    const at = JSON.parse(value?.toString() ?? "").source.ts_ms;
    return typeof at === "number" ? (Date.now() - at) / 1000 : undefined;
  } catch {
    return undefined; // a dead letter
  }
}
