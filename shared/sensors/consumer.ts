/** What the consumer of sensors does: it checks the source's columns, inserts messages, and stops at a mass of dead letters. */
import type { ClickHouseClient } from "@clickhouse/client";
import { like, number, optional, postgresUrl, required, UsageError } from "../env.ts";
import { thousands } from "../log.ts";
import { checkSession, openSession, queryFile } from "../session.ts";
import { type Column, insertRows, landingRows, type Message, type Place, plainType, select } from "./clickhouse.ts";
import { sourceTable } from "./connector.ts";

export const consumerVariables = {
  SOURCE_DATABASE_URL: required(postgresUrl),
  ETL_DATABASE_URL: required(postgresUrl),
  SENSORS_POISON_SHARE: optional(number(0, 1, false), 0.1),
  METRICS_PORT: optional(number(0, 65_535), 9464),
  UNTIL: optional(like(/^caught-up$/, "can only be caught-up")),
};

/**
 * Compares the source table with the columns of sensor_readings, before anything is ingested.
 * @returns the names of its columns that are not there, whose values go to _unknown.
 * @throws UsageError that lists each column that is gone or has another type, and each table without its changes' old rows.
 */
export async function checkReadings(env: { SOURCE_DATABASE_URL: string }, columns: Column[]): Promise<string[]> {
  await using source = openSession(env.SOURCE_DATABASE_URL, { application: "etl:sensors", timeoutSeconds: 30 });
  await checkSession("SOURCE_DATABASE_URL", source);
  const wanted = columns.map((column) => ({ ...column, plain: plainType(column.type) }));
  const settings = { "etl.source": sourceTable, "etl.wanted": JSON.stringify(wanted) };
  type Checked = { faults: string[]; unknown: string[] };
  const [{ faults, unknown }] = (await queryFile(source, "readings_checks", settings)) as [Checked];
  if (!faults.length) return unknown;
  throw new UsageError(
    `the source differs from ClickHouse's sensor_readings:\n  ${faults.join("\n  ")}\nChange the source back, or sensor_readings ` +
      `by a new file in schemas/clickhouse; schemas/README.md, "When the schema changes".`,
  );
}

/** Inserts messages of one partition, in their order, by one insert. @returns how many of them are dead letters. */
export async function insertMessages(client: ClickHouseClient, place: Place, messages: Message[]): Promise<number> {
  if (!messages.length) return 0;
  await insertRows(client, "sensor_landing FORMAT RowBinary", [landingRows(place, messages)]);
  const [letters] = await select<{ dead: number }>(
    client,
    `SELECT toUInt32(uniqExact(offset)) AS dead FROM sensor_dead_letters WHERE topic = {topic: String} AND epoch = {epoch: UInt16}
     AND partition = {partition: UInt32} AND offset BETWEEN {first: UInt64} AND {last: UInt64}
     SETTINGS select_sequential_consistency = 1`, // a replica of ClickHouse Cloud may lag behind the one that was written
    { ...place, first: messages[0]?.offset, last: messages.at(-1)?.offset },
  );
  return letters?.dead ?? 0;
}

/**
 * Called with the number of a batch's messages, and of its dead letters.
 * @throws Error where these are more than the share of the last 1,000 messages (at least 100, at most a batch more): the format has
 * changed then, and it is not a message that is bad.
 */
export function createPoisonLimit(share: number): (messages: number, dead: number) => void {
  let [seen, bad] = [0, 0];
  return (messages, dead) => {
    seen += messages;
    bad += dead;
    if (seen >= 100 && bad > share * seen)
      throw new Error(
        `${thousands(bad)} of the last ${thousands(seen)} messages are not valid changes (limit: SENSORS_POISON_SHARE=${share}). ` +
          `The last batch was not committed; the next start reads it again. Next: make dead-letters (says why)`,
      );
    if (seen >= 1000) [seen, bad] = [0, 0];
  };
}
