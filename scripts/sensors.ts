#!/usr/bin/env -S npx tsx
/**
 * sensors: Postgres → Debezium → Kafka → ClickHouse.
 *
 *   source         public.sensor_readings, through schemas/debezium/sensor_readings.json (make connector) into SENSORS_TOPIC
 *   target         CLICKHOUSE_DATABASE.sensor_readings, by the views of schemas/clickhouse; what is no change goes to sensor_dead_letters
 *   key            the sorting key sensor_id, metric, recorded_at, id; _version is epoch and Kafka offset
 *   watermark      the group's offsets in Kafka, committed after the insert
 *   schedule       always on (systemd); several processes share the topic's partitions
 *   safe to re-run yes: a message that comes again writes the same row with the same version
 *
 *   make sensors                      until SIGTERM or Ctrl-C, which finish and commit the batch under way
 *   make sensors UNTIL=caught-up      ends once all that the topic had when it started is inserted
 *
 * Touches: reads the source's catalog as a read-only role, and the topic; writes ClickHouse, the group's offsets and schema etl.
 * Serves /metrics and /healthz at METRICS_PORT.
 */

import { readEnv, UsageError } from "../shared/env.ts";
import { main } from "../shared/main.ts";
import { kafkaVariables } from "../shared/sensors/broker.ts";
import * as canary from "../shared/sensors/canary.ts";
import * as clickhouse from "../shared/sensors/clickhouse.ts";
import { checkDebezium, connectVariables } from "../shared/sensors/connector.ts";
import * as consumer from "../shared/sensors/consumer.ts";
import { type PartitionState, takeEpoch, topicState, writeOffset } from "../shared/sensors/epoch.ts";
import { connectKafka, consume, withAdmin } from "../shared/sensors/kafka.ts";
import { createReport } from "../shared/sensors/report.ts";
import { checkSession, openSession } from "../shared/session.ts";

/** Kafka Connect and the source may be away: what is in Kafka is consumed all the same. */
function unlessAway(error: Error): void {
  if (error instanceof UsageError) throw error;
}

await main(import.meta, async () => {
  const env = readEnv({
    ...consumer.consumerVariables,
    ...clickhouse.clickhouseVariables,
    ...kafkaVariables,
    ...connectVariables,
    ...canary.canaryVariables,
  });
  const { SENSORS_TOPIC: topic, SENSORS_GROUP: groupId, CLICKHOUSE_DATABASE: database } = env;
  const { stop, abandon } = consumer.stopSignals();
  const etl = openSession(env.ETL_DATABASE_URL, { application: "etl:sensors", timeoutSeconds: 30 });
  const client = clickhouse.connectClickHouse(env);
  const broker = connectKafka(env, "etl-sensors");
  const where = () => withAdmin(broker, env, (admin) => topicState(admin, topic, groupId));
  await checkSession("ETL_DATABASE_URL", etl);
  await using report = await createReport(env, where, () => canary.readCanary(etl, topic));
  const retry = <T>(server: string, work: (until: AbortSignal) => Promise<T>, until: AbortSignal): Promise<T> =>
    clickhouse.retryUntilUp(server, work, until, report.waiting);

  // 1. Check that ClickHouse has what schemas/clickhouse makes, and the source its columns, before a message moves.
  const check = async () => [await clickhouse.checkMigrations(client, database), await clickhouse.readingColumns(client)] as const;
  const [table, columns] = await retry("ClickHouse", check, stop.signal).catch((error: Error): [string, clickhouse.Column[]] => {
    if (!stop.signal.aborted) throw error;
    return ["", []]; // stopped while ClickHouse was away: nothing is under way
  });
  const checkSource = async () => report.unknownColumns(await consumer.checkReadings(env, columns));
  if (columns.length) await checkSource();
  await checkDebezium(env).catch(unlessAway);

  let epoch = 0;
  let ends: PartitionState[] | undefined;
  const join = async (): Promise<void> => {
    epoch = await takeEpoch(etl, topic, database, where, table);
  };
  const limitPoison = consumer.createPoisonLimit(env.SENSORS_POISON_SHARE);
  await using _ = canary.startCanary(env);
  await consume(broker, env, stop.signal, {
    // 2. At the start and after each rebalance: the epoch, whose partitions and offsets the topic must still have.
    join,
    batch: async (batch, lost) => {
      const place = { topic, epoch, partition: batch.partition };
      const over = AbortSignal.any([abandon, lost]);
      const started = performance.now();
      const canaries = batch.messages.filter(canary.isCanary);
      const messages = batch.messages.filter((one) => !canaries.includes(one));
      await canary.checkSnapshot(etl, topic, messages);
      // 3. Insert each batch's bytes as they are, by one insert; count its dead letters; stop where they are too many.
      const rows = clickhouse.landingRows(place, messages);
      const insert = (until: AbortSignal) => clickhouse.insertRowBinary(client, "sensor_landing", rows, until);
      if (rows.length) await retry("ClickHouse", insert, over);
      const dead = await retry("ClickHouse", () => consumer.findDeadLetters(client, place, messages), over);
      limitPoison(messages.length, dead);
      // 4. Only then record how far this is, in schema etl and, when this has returned, in the group's offsets.
      const record = async (): Promise<void> => {
        await canary.recordCanaries(etl, topic, canaries);
        await writeOffset(etl, topic, batch.partition, BigInt(batch.lastOffset()) + 1n);
      };
      await retry("Schema etl", record, over);
      report.inserted(messages, dead.length, (performance.now() - started) / 1000);
      // 5. With each canary see whether the source's columns are still those.
      if (canaries.length) await checkSource().catch(unlessAway);
    },
    tick: async () => {
      if (!epoch) await join();
      if (!env.UNTIL) return;
      const now = await where();
      ends ??= now;
      if (now.every(({ committed, lag }, at) => !lag || committed >= (ends?.[at]?.end ?? 0n))) await join().then(() => stop.abort());
    },
  });

  // 6. Report.
  report.done();
  await Promise.all([etl.end({ timeout: 5 }), client.close()]);
  process.exit(); // kafkajs may still be asking a broker that is away
});
