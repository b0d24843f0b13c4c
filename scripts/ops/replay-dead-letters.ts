#!/usr/bin/env -S npx tsx
/**
 * replay-dead-letters: sends the dead letters of the topic's current epoch through the views again, as they are and with the versions that
 * they had, so that none wins over newer data. Those that now are changes are dead letters no more; the rest stays.
 *
 *   safe to re-run   yes: a message that is replayed twice writes the same row
 */
import { postgresUrl, readEnv, required } from "../../shared/env.ts";
import { log } from "../../shared/log.ts";
import { main } from "../../shared/main.ts";
import { kafkaVariables } from "../../shared/sensors/broker.ts";
import { clickhouseVariables, connectClickHouse, select } from "../../shared/sensors/clickhouse.ts";
import { readEpoch } from "../../shared/sensors/epoch.ts";
import { openSession } from "../../shared/session.ts";

await main(import.meta, async () => {
  const own = { ETL_DATABASE_URL: required(postgresUrl), SENSORS_TOPIC: kafkaVariables.SENSORS_TOPIC };
  const env = readEnv({ ...clickhouseVariables, ...own });
  await using client = connectClickHouse(env);

  // 1. This epoch's only: what was dead before is in the snapshot that the epoch began with, or was deleted since.
  await using etl = openSession(env.ETL_DATABASE_URL, { application: "etl:replay-dead-letters", timeoutSeconds: 30 });
  const epoch = (await readEpoch(etl, env.SENSORS_TOPIC))?.number ?? 0;
  const letters = "sensor_dead_letters FINAL WHERE topic = {topic: String} AND epoch = {epoch: UInt16}";
  const parameters = { topic: env.SENSORS_TOPIC, epoch, marked: 0 };
  const count = async () => {
    const query = `SELECT toUInt32(count()) AS letters, max(attempt) AS latest FROM ${letters}`;
    return ((await select(client, query, parameters)) as [{ letters: number; latest: number }])[0];
  };
  const settings = { wait_end_of_query: 1, lightweight_deletes_sync: "2" } as const;
  const change = (query: string) => client.command({ query, query_params: parameters, clickhouse_settings: settings });
  const before = await count();

  // 2. Mark them: consumers write others meanwhile, which are not to be taken for replayed.
  parameters.marked = before.latest + 1;
  await change(`INSERT INTO sensor_dead_letters SELECT * REPLACE ({marked: UInt32} AS attempt) FROM ${letters}`);

  // 3. Through the views again: those that fail again are dead letters under the next number.
  const marked = "attempt = {marked: UInt32}";
  await change(
    `INSERT INTO sensor_landing SELECT topic, epoch, partition, offset, {marked: UInt32} + 1, key, value FROM ${letters} AND ${marked}`,
  );

  // 4. The others of them are changes now.
  const gone = `SELECT epoch, partition, offset FROM ${letters} AND ${marked}`;
  await change(`DELETE FROM sensor_dead_letters WHERE topic = {topic: String} AND (epoch, partition, offset) IN (${gone})`);
  const left = (await count()).letters;
  log({ step: "replayed", epoch, dead_letters: before.letters, left, ...(left && { next: "make dead-letters" }) });
});
