/**
 * dead-letters: the messages of the sensors' topic that are no valid change: where they were, when, why, and how they begin.
 *
 *   make dead-letters                 the latest twenty (LIMIT=), and how many there are for each reason
 *   make replay-dead-letters          tries those of this epoch again, as they are and with the versions that they had, so that none
 *                                     wins over newer data; those that now are changes are dead letters no more, the rest is reported
 *
 *   safe to re-run   yes: a message that is replayed twice writes the same row
 */
import { connectClickHouse, select } from "../../shared/clickhouse.ts";
import { clickhouse, readEnv } from "../../shared/env.ts";
import { connect } from "../../shared/postgres.ts";
import { log, table } from "../../shared/progress.ts";
import { main } from "../../shared/run.ts";

await main(import.meta, async () => {
  const env = readEnv("ETL_DATABASE_URL", ...clickhouse, "SENSORS_TOPIC", "REPLAY", "LIMIT", "JSON");
  const { SENSORS_TOPIC: topic } = env;
  const client = connectClickHouse(env);
  if (env.REPLAY) {
    // 1. This epoch's only: what was parked before is in the snapshot that the epoch began with, or was deleted since.
    const etl = connect(env.ETL_DATABASE_URL, { application: "etl:replay-dead-letters", timeoutSeconds: 30 });
    const [current] = await etl<{ epoch: number }[]>`select epoch from etl.topics where topic = ${topic}`;
    await etl.end();
    const place = { topic, epoch: current?.epoch ?? 0 };
    const ours = "topic = {topic: String} AND epoch = {epoch: UInt16}";

    // 2. Through the views again, with the next attempt's number: those that fail again are parked under it.
    const [before] = await select<{ letters: string; attempt: number }>(
      client,
      `SELECT count() AS letters, max(attempt) AS attempt FROM sensor_dead_letters FINAL WHERE ${ours}`,
      place,
    );
    const attempt = Number(before?.attempt) + 1;
    await client.command({
      query: `INSERT INTO sensor_landing SELECT topic, epoch, partition, offset, {attempt: UInt32}, key, value FROM sensor_dead_letters FINAL WHERE ${ours}`,
      query_params: { ...place, attempt },
      clickhouse_settings: { wait_end_of_query: 1 },
    });

    // 3. Those that were not parked again are changes now.
    await client.command({
      query: `DELETE FROM sensor_dead_letters WHERE ${ours} AND (partition, offset) NOT IN (SELECT partition, offset FROM sensor_dead_letters WHERE ${ours} AND attempt >= {attempt: UInt32})`,
      query_params: { ...place, attempt },
      clickhouse_settings: { lightweight_deletes_sync: "2" },
    });
    const [after] = await select<{ letters: string }>(
      client,
      `SELECT count() AS letters FROM sensor_dead_letters FINAL WHERE ${ours}`,
      place,
    );
    const left = Number(after?.letters);
    log({
      step: "replayed",
      epoch: place.epoch,
      dead_letters: Number(before?.letters),
      now_changes: Number(before?.letters) - left,
      left,
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
