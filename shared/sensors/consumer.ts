/**
 * What the consumer of sensors does beside moving batches: it checks the source's columns, counts the dead letters, and stops where
 * too many are.
 */
import type { ClickHouseClient } from "@clickhouse/client";
import { like, number, optional, postgresUrl, required, UsageError } from "../env.ts";
import { log, thousands } from "../log.ts";
import { onSignal } from "../main.ts";
import { checkSession, openSession } from "../session.ts";
import { type Column, type Place, plainType, select } from "./clickhouse.ts";
import { sourceTable } from "./connector.ts";

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
  String: ["text", "character varying", "uuid"],
  Float64: ["double precision", "real"],
  Bool: ["boolean"],
  "DateTime64(6, 'UTC')": ["timestamp with time zone"],
};

/**
 * Compares the source table with the columns of sensor_readings, before anything is ingested.
 * @param wanted empty where ClickHouse cannot say: only the source itself is looked at then.
 * @returns the names of its columns that are not there, whose values go to _unknown.
 * @throws UsageError that lists each column that is gone or has another type.
 */
export async function checkReadings(env: { SOURCE_DATABASE_URL: string }, wanted: Column[]): Promise<string[]> {
  await using source = openSession(env.SOURCE_DATABASE_URL, { application: "etl:sensors", timeoutSeconds: 30 });
  await checkSession("SOURCE_DATABASE_URL", source);
  const found = await source<{ name: string; type: string }[]>`
    select attname as name, format_type(atttypid, null) as type
    from pg_attribute where attrelid = to_regclass(${sourceTable}) and attnum > 0 and not attisdropped order by attnum`;
  // And each of its partitions, where it is partitioned.
  const partial = await source<{ name: string }[]>`
    select oid::regclass::text as name from pg_class where relreplident <> 'f' and (oid = to_regclass(${sourceTable})
      or oid in (select relid from pg_partition_tree(to_regclass(${sourceTable}))))`;
  const faults = wanted.flatMap(({ name, type }) => {
    const is = found.find((column) => column.name === name)?.type ?? "no such column";
    if (fitting[plainType(type)]?.includes(is)) return [];
    return [`  column ${sourceTable}.${name}: expected one for ${type} (ClickHouse's sensor_readings), found ${is}`];
  });
  for (const { name } of partial)
    faults.push(`  table ${name}: its changes lack the old row. Run as its owner: alter table ${name} replica identity full;`);
  if (faults.length)
    throw new UsageError(
      `the source differs from ClickHouse's sensor_readings:\n${faults.join("\n")}\nChange ` +
        `the source back, or sensor_readings by a new file in schemas/clickhouse; schemas/README.md, "When the schema ` +
        `changes".`,
    );
  return found.map(({ name }) => name).filter((name) => !wanted.some((column) => column.name === name));
}

/** Which of a batch's messages are dead letters: their indices. */
export async function findDeadLetters(client: ClickHouseClient, place: Place, messages: { offset: string }[]): Promise<number[]> {
  if (!messages.length) return [];
  const letters = await select<{ offset: string }>(
    client,
    `SELECT DISTINCT toString(offset) AS offset FROM sensor_dead_letters WHERE topic = {topic: String} AND epoch = {epoch: UInt16}
     AND partition = {partition: UInt32} AND sensor_dead_letters.offset BETWEEN {first: UInt64} AND {last: UInt64}
     SETTINGS select_sequential_consistency = 1`, // a replica of ClickHouse Cloud may lag behind the one that was written
    { ...place, first: messages[0]?.offset ?? "0", last: messages.at(-1)?.offset ?? "0" },
  );
  const dead = new Set(letters.map(({ offset }) => offset));
  return messages.flatMap(({ offset }, index) => (dead.has(offset) ? [index] : []));
}

const POISON_MESSAGES = { least: 100, last: 1000 };

/**
 * Called with the number of a batch's messages and the indices of those that are dead letters.
 * @throws Error where these are more than the share of the last 1,000 messages (of at least 100), at any of them: the format has
 * changed then, and it is not a message that is bad.
 */
export function createPoisonLimit(share: number): (messages: number, dead: number[]) => void {
  const last = new Uint8Array(POISON_MESSAGES.last); // 1 for a dead letter
  let [seen, bad] = [0, 0];
  return (messages, dead) => {
    const letters = new Set(dead);
    for (let index = 0; index < messages; index++) {
      const [at, letter] = [seen % last.length, letters.has(index) ? 1 : 0];
      bad += letter - (last[at] ?? 0);
      last[at] = letter;
      seen += 1;
      const of = Math.min(seen, last.length);
      if (of >= POISON_MESSAGES.least && bad > share * of)
        throw new Error(
          `${thousands(bad)} of the last ${thousands(of)} messages are not valid changes (limit: SENSORS_POISON_SHARE=` +
            `${share}). The last batch was not committed; the next start reads it again. Next: make dead-letters (says why)`,
        );
    }
  };
}

/** `stop` aborts at SIGTERM or Ctrl-C, `abandon` 7 s later, so that whoever waits for a server that is away ends too. */
export function stopSignals(): { stop: AbortController; abandon: AbortSignal } {
  const [stop, abandon] = [new AbortController(), new AbortController()];
  onSignal((signal) => {
    log({ step: "stopping", signal, next: "the batch under way is finished and committed" });
    stop.abort(new Error(`stopped by ${signal}`));
    setTimeout(() => abandon.abort(new Error(`stopped by ${signal}`)), 7000).unref();
  });
  return { stop, abandon: abandon.signal };
}
