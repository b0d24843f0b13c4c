/**
 * dead-letters: the messages of the sensors' topic that are no valid change: where they were, when, why, and how they begin.
 *
 *   make dead-letters                 the latest twenty (LIMIT=), and how many there are for each reason; JSON=1 for programs
 *   make replay-dead-letters          tries those of this epoch again, as they are and with the versions that they had, so that none
 *                                     wins over newer data; those that now are changes are dead letters no more, the rest is reported
 *
 *   safe to re-run   yes: a message that is replayed twice writes the same row
 */

import { flag, number, optional, postgresUrl, readEnv, required } from "../../shared/env.ts";
import { log } from "../../shared/log.ts";
import { main } from "../../shared/main.ts";
import { clickhouseVariables, connectClickHouse, select } from "../../shared/sensors/clickhouse.ts";
import { readEpoch } from "../../shared/sensors/epoch.ts";
import { kafkaVariables } from "../../shared/sensors/kafka.ts";
import { connect } from "../../shared/session.ts";
import { table } from "../../shared/table.ts";

await main(import.meta, async () => {
  const env = readEnv({
    ETL_DATABASE_URL: required(postgresUrl),
    ...clickhouseVariables,
    SENSORS_TOPIC: kafkaVariables.SENSORS_TOPIC,
    REPLAY: optional(flag, false),
    LIMIT: optional(number(1, 100_000), 20),
    JSON: optional(flag, false),
  });
  const { SENSORS_TOPIC: topic } = env;
  const client = connectClickHouse(env);
  if (env.REPLAY) {
    // 1. This epoch's only: what was parked before is in the snapshot that the epoch began with, or was deleted since.
    const etl = connect(env.ETL_DATABASE_URL, { application: "etl:replay-dead-letters", timeoutSeconds: 30 });
    const current = await readEpoch(etl, topic);
    await etl.end();
    const place = { topic, epoch: current?.number ?? 0 };
    const ours = "topic = {topic: String} AND epoch = {epoch: UInt16}";

    // 2. Mark them: consumers park others meanwhile, which are not to be taken for replayed.
    const [before] = await select<{ letters: string; attempt: number }>(
      client,
      `SELECT count() AS letters, max(attempt) AS attempt FROM sensor_dead_letters FINAL WHERE ${ours}`,
      place,
    );
    const marks = { ...place, marked: Number(before?.attempt) + 1, failed: Number(before?.attempt) + 2 };
    const replay = async (query: string): Promise<unknown> =>
      await client.command({
        query,
        query_params: marks,
        clickhouse_settings: { wait_end_of_query: 1, lightweight_deletes_sync: "2" },
      });
    await replay(
      `INSERT INTO sensor_dead_letters SELECT topic, epoch, partition, offset, {marked: UInt32}, reason, key, value, parked_at FROM sensor_dead_letters FINAL WHERE ${ours}`,
    );

    // 3. Through the views again: those that fail again are parked under the next number.
    await replay(
      `INSERT INTO sensor_landing SELECT topic, epoch, partition, offset, {failed: UInt32}, key, value FROM sensor_dead_letters FINAL WHERE ${ours} AND attempt = {marked: UInt32}`,
    );

    // 4. The others of them are changes now.
    const now = `SELECT partition, offset FROM sensor_dead_letters FINAL WHERE ${ours} AND attempt = {marked: UInt32}`;
    const [changes] = await select<{ letters: string }>(client, `SELECT count() AS letters FROM (${now})`, marks);
    await replay(`DELETE FROM sensor_dead_letters WHERE ${ours} AND (partition, offset) IN (${now})`);
    const [after] = await select<{ letters: string }>(
      client,
      `SELECT count() AS letters FROM sensor_dead_letters FINAL WHERE ${ours}`,
      place,
    );
    log({
      step: "replayed",
      epoch: place.epoch,
      dead_letters: Number(before?.letters),
      now_changes: Number(changes?.letters),
      left: Number(after?.letters),
    });
  }

  // The list. A replay prints what is left.
  const reasons = await select<Record<string, string>>(
    client,
    `SELECT reason, epoch, count() AS messages, min(parked_at) AS first, max(parked_at) AS last
     FROM sensor_dead_letters FINAL WHERE topic = {topic: String} GROUP BY reason, epoch ORDER BY messages DESC, reason`,
    { topic },
  );
  const letters = await select<Record<string, string>>(
    client,
    `SELECT epoch, partition, offset, parked_at, reason, ifNull(left(key, 40), 'NULL') AS key, length(value) AS bytes,
       replaceRegexpAll(toValidUTF8(left(value, 60)), '[[:cntrl:]]', '?') AS begins
     FROM sensor_dead_letters FINAL WHERE topic = {topic: String} ORDER BY parked_at DESC, epoch DESC, partition, offset LIMIT {limit: UInt32}`,
    { topic, limit: env.LIMIT },
  );
  await client.close();
  if (env.JSON) process.stdout.write(`${JSON.stringify({ reasons, letters })}\n`);
  else if (!reasons.length) process.stdout.write(`no dead letters of ${topic}\n`);
  else
    process.stdout.write(
      `${table(letters)}\n\n${table(reasons)}\n\nNext: mend the source or the views (make migrate), then: make replay-dead-letters\n`,
    );
});
