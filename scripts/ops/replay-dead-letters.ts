#!/usr/bin/env -S npx tsx
/**
 * replay-dead-letters: sends the dead letters of the topic's current epoch through the views again, as they are and with the versions that
 * they had, so that none wins over newer data. Those that now are changes are dead letters no more; the rest stays.
 *
 *   make replay-dead-letters
 *   safe to re-run   yes: a message that is replayed twice writes the same row
 */
import { postgresUrl, readEnv, required } from "../../shared/env.ts";
import { log } from "../../shared/log.ts";
import { main } from "../../shared/main.ts";
import { kafkaVariables } from "../../shared/sensors/broker.ts";
import { clickhouseVariables, connectClickHouse, select } from "../../shared/sensors/clickhouse.ts";
import { readEpoch } from "../../shared/sensors/epoch.ts";
import { connect } from "../../shared/session.ts";

const ours = "topic = {topic: String} AND epoch = {epoch: UInt16}";

await main(import.meta, async () => {
  const { SENSORS_TOPIC } = kafkaVariables;
  const env = readEnv({ ETL_DATABASE_URL: required(postgresUrl), ...clickhouseVariables, SENSORS_TOPIC });
  const { SENSORS_TOPIC: topic } = env;
  await using client = connectClickHouse(env);

  // 1. This epoch's only: what was dead before is in the snapshot that the epoch began with, or was deleted since.
  await using etl = connect(env.ETL_DATABASE_URL, { application: "etl:replay-dead-letters", timeoutSeconds: 30 });
  const place = { topic, epoch: (await readEpoch(etl, topic))?.number ?? 0 };
  const count = async (from: string, parameters = {}) => {
    const query = `SELECT count() AS letters, max(attempt) AS latest FROM sensor_dead_letters FINAL WHERE ${from}`;
    const [found] = await select<{ letters: string; latest: number }>(client, query, { ...place, ...parameters });
    return { letters: Number(found?.letters), latest: Number(found?.latest) };
  };
  const before = await count(ours);

  // 2. Mark them: consumers write others meanwhile, which are not to be taken for replayed.
  const marks = { ...place, marked: before.latest + 1, failed: before.latest + 2 };
  const replay = async (query: string): Promise<unknown> =>
    await client.command({
      query,
      query_params: marks,
      clickhouse_settings: { wait_end_of_query: 1, lightweight_deletes_sync: "2" },
    });
  await replay(
    "INSERT INTO sensor_dead_letters SELECT topic, epoch, partition, offset, {marked: UInt32}, reason, key, " +
      `value, parked_at FROM sensor_dead_letters FINAL WHERE ${ours}`,
  );

  // 3. Through the views again: those that fail again are dead letters under the next number.
  const marked = `${ours} AND attempt = {marked: UInt32}`;
  await replay(
    "INSERT INTO sensor_landing SELECT topic, epoch, partition, offset, {failed: UInt32}, key, value FROM " +
      `sensor_dead_letters FINAL WHERE ${marked}`,
  );

  // 4. The others of them are changes now.
  const changes = await count(marked, marks);
  await replay(
    `DELETE FROM sensor_dead_letters WHERE ${ours} AND (partition, offset) IN (SELECT partition, offset FROM ` +
      `sensor_dead_letters FINAL WHERE ${marked})`,
  );
  const { letters: left } = await count(ours);
  const counts = { epoch: place.epoch, dead_letters: before.letters, now_changes: changes.letters, left };
  log({ step: "replayed", ...counts, ...(left && { next: "make dead-letters" }) });
});
