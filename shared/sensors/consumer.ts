/**
 * What the consumer of sensors does beside moving batches: it checks the source's columns, counts the dead letters, stops where
 * too much is poison, and reports.
 */
import type { ClickHouseClient } from "@clickhouse/client";
import { type Env, like, number, optional, postgresUrl, required, UsageError } from "../env.ts";
import { log, thousands } from "../log.ts";
import { onSignal } from "../main.ts";
import { checkSession, connect } from "../session.ts";
import { type Column, select } from "./clickhouse.ts";
import { type ConnectEnv, isRunning, namesOf, sourceTable } from "./connector.ts";
import type { PartitionState } from "./epoch.ts";
import type { Batch } from "./kafka.ts";
import { serveMetrics } from "./metrics.ts";

export const consumerVariables = {
  SOURCE_DATABASE_URL: required(postgresUrl),
  ETL_DATABASE_URL: required(postgresUrl),
  SENSORS_POISON_SHARE: optional(number(0, 1, false), 0.1),
  METRICS_PORT: optional(number(0, 65_535), 9464),
  UNTIL: optional(like(/^caught-up$/, "can only be caught-up")),
};
type ConsumerEnv = Env<typeof consumerVariables> & ConnectEnv;

/** Postgres's types that a column of ClickHouse holds every value of, as Debezium writes them. */
const fitting: Record<string, string[]> = {
  Int64: ["bigint", "integer", "smallint"],
  String: ["text", "character varying", "uuid"],
  Float64: ["double precision", "real"],
  Bool: ["boolean"],
  "DateTime64(6, 'UTC')": ["timestamp with time zone"],
};
/** LowCardinality(Nullable(String)) → String */
const plain = (type: string): string =>
  type.replace(/^LowCardinality\((.*)\)$/, "$1").replace(/^Nullable\((.*)\)$/, "$1");

/**
 * Compares the source table with the columns of sensor_readings, before anything is ingested.
 * @param wanted empty where ClickHouse cannot say: only the source itself is looked at then.
 * @returns the names of its columns that are not there, whose values go to _unknown.
 * @throws UsageError that lists each column that is gone or has another type.
 */
export async function checkReadings(env: { SOURCE_DATABASE_URL: string }, wanted: Column[]): Promise<string[]> {
  await using source = connect(env.SOURCE_DATABASE_URL, { application: "etl:sensors", timeoutSeconds: 30 });
  await checkSession("SOURCE_DATABASE_URL", source);
  const found = await source<{ name: string; type: string; full: boolean }[]>`
    select attname as name, format_type(atttypid, null) as type, relreplident = 'f' as full
    from pg_attribute join pg_class c on c.oid = attrelid
    where attrelid = to_regclass(${sourceTable}) and attnum > 0 and not attisdropped order by attnum`;
  const faults = wanted.flatMap(({ name, type }) => {
    const is = found.find((column) => column.name === name)?.type ?? "no such column";
    if (fitting[plain(type)]?.includes(is)) return [];
    return [`  column ${sourceTable}.${name}: expected one for ${type} (ClickHouse's sensor_readings), found ${is}`];
  });
  if (found[0]?.full === false)
    faults.push(
      `  table ${sourceTable}: its changes lack the old row. Run as its owner: alter table ${sourceTable} replica identity full;`,
    );
  if (faults.length)
    throw new UsageError(
      `the source differs from ClickHouse's sensor_readings, nothing was ingested:\n${faults.join("\n")}\nChange ` +
        `the source back, or sensor_readings by a new file in schemas/clickhouse; README, "When the schema ` +
        `changes".`,
    );
  const unknown = found.map(({ name }) => name).filter((name) => !wanted.some((column) => column.name === name));
  if (wanted.length && unknown.length)
    log({
      step: "warning",
      warning: `${sourceTable} has columns that sensor_readings has not; their values are kept in _unknown`,
      columns: unknown.join(),
    });
  return unknown;
}

/** Which of a batch's messages are dead letters: their indices. */
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
  const dead = new Set(letters.map(({ offset }) => offset));
  return messages.flatMap(({ offset }, index) => (dead.has(offset) ? [index] : []));
}

const POISON_MESSAGES = { least: 100, last: 1000 };

/**
 * Called with the number of a batch's messages and the indices of those that are dead letters, ascending.
 * @throws Error where these are more than the share of the last 1,000 messages (of at least 100), at any of them: the format has
 * changed then, and it is not a message that is bad.
 */
export function createPoisonLimit(share: number): (messages: number, dead: number[]) => void {
  let seen = 0;
  let bad: number[] = []; // which of the messages, of the last 1,000
  const judge = (message: number): void => {
    bad = bad.filter((one) => one > message - POISON_MESSAGES.last);
    const last = Math.min(message, POISON_MESSAGES.last);
    if (last < POISON_MESSAGES.least || bad.length <= share * last) return;
    throw new Error(
      `${thousands(bad.length)} of the last ${thousands(last)} messages are no valid change (limit: ` +
        `SENSORS_POISON_SHARE=${share}). The last batch was not committed; the next start reads it again. Next: ` +
        `make dead-letters (says why)`,
    );
  };
  return (messages, dead) => {
    for (const index of dead) {
      bad.push(seen + index + 1);
      judge(seen + index + 1);
    }
    seen += messages;
    judge(seen);
  };
}

/**
 * `stop` aborts at the first SIGTERM or Ctrl-C, `abandon` 7 s later, so that whoever waits for a server that is away ends too.
 * A second one ends the process.
 */
export function stopSignals(): { stop: AbortController; abandon: AbortSignal } {
  const [stop, abandon] = [new AbortController(), new AbortController()];
  onSignal((signal) => {
    log({ step: "stopping", signal, next: "the batch under way is finished and committed" });
    stop.abort(new Error(`stopped by ${signal}`));
    setTimeout(() => abandon.abort(new Error(`stopped by ${signal}`)), 7000).unref();
  });
  return { stop, abandon: abandon.signal };
}

/** Metrics at METRICS_PORT, and a line every ten seconds. @param lag asks Kafka. */
export async function createReport(env: ConsumerEnv, lag: () => Promise<PartitionState[]>) {
  const slotRetainedBytes = async (): Promise<number | undefined> => {
    await using source = connect(env.SOURCE_DATABASE_URL, { application: "etl:sensors", timeoutSeconds: 3 });
    const [slot] = await source<{ bytes: string }[]>`
      select pg_wal_lsn_diff(pg_current_wal_lsn(), restart_lsn) as bytes from pg_replication_slots where slot_name = ${namesOf(env).slot}`;
    return slot && Number(slot.bytes);
  };
  const connectorRunning = () => isRunning(env);
  const metrics = await serveMetrics(env.METRICS_PORT, { lag, connectorRunning, slotRetainedBytes });
  log({ step: "serving", metrics: `http://127.0.0.1:${metrics.port}/metrics` });
  const started = performance.now();
  const total = { rows: 0, batches: 0, dead_letters: 0 };
  let [said, saidRows, waitingSince] = [started, 0, 0];
  return {
    unknownColumns: (columns: string[]): void => metrics.unknownColumns.set(columns.length),
    /** A batch was inserted, and its dead letters counted. */
    inserted: ({ messages }: Batch, dead: number, seconds: number): void => {
      const changes = messages.filter(({ value }) => value).length - dead;
      total.rows += changes;
      total.batches += 1;
      total.dead_letters += dead;
      metrics.rows.inc(changes);
      metrics.batches.inc();
      metrics.deadLetters.inc(dead);
      metrics.insertSeconds.observe(seconds);
      const age = ageOf(messages.at(-1)?.value);
      if (age !== undefined) metrics.eventAge.set(age);
      const now = performance.now();
      if (now - said < 10_000) return;
      const perSecond = Math.round((total.rows - saidRows) / ((now - said) / 1000));
      log({ step: "inserted", ...total, rows_per_second: perSecond, event_age_seconds: age && Number(age.toFixed(1)) });
      [said, saidRows] = [now, total.rows];
    },
    /** ClickHouse is away, or is up again. */
    waiting: (error?: Error): void => {
      metrics.away.set(error ? 1 : 0);
      if (error && !waitingSince) log({ step: "waiting", for: "ClickHouse", error: error.message.slice(0, 300) });
      if (!error && waitingSince)
        log({ step: "back", waited_seconds: Math.round((performance.now() - waitingSince) / 1000) });
      waitingSince = error ? waitingSince || performance.now() : 0;
    },
    done: (): void => {
      const seconds = (performance.now() - started) / 1000;
      log({
        step: "done",
        ...total,
        seconds: Number(seconds.toFixed(3)),
        rows_per_second: Math.round(total.rows / seconds),
        peak_rss_mb: Math.round(process.resourceUsage().maxRSS / 1024),
      });
    },
    [Symbol.asyncDispose]: () => metrics[Symbol.asyncDispose](),
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
