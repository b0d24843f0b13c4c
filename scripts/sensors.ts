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
import { log } from "../shared/log.ts";
import { main, onSignal } from "../shared/main.ts";
import { kafkaVariables } from "../shared/sensors/broker.ts";
import * as canary from "../shared/sensors/canary.ts";
import * as clickhouse from "../shared/sensors/clickhouse.ts";
import { checkDebezium, connectVariables } from "../shared/sensors/connector.ts";
import * as consumer from "../shared/sensors/consumer.ts";
import { type PartitionState, takeEpoch, topicState, writeOffset } from "../shared/sensors/epoch.ts";
import { connectKafka, consume, withAdmin } from "../shared/sensors/kafka.ts";
import { createReport } from "../shared/sensors/report.ts";
import { checkSession, openSession } from "../shared/session.ts";

const variables = { ...clickhouse.clickhouseVariables, ...kafkaVariables, ...connectVariables, ...canary.canaryVariables };

await main(import.meta, async () => {
  const env = readEnv({ ...variables, ...consumer.consumerVariables });
  const { SENSORS_TOPIC: topic, SENSORS_GROUP: groupId, CLICKHOUSE_DATABASE: database } = env;
  const etl = openSession(env.ETL_DATABASE_URL, { application: "etl:sensors", timeoutSeconds: 30 });
  const client = clickhouse.connectClickHouse(env);
  const broker = connectKafka(env, "etl-sensors");
  const where = () => withAdmin(broker, env, (admin) => topicState(admin, topic, groupId));

  // 1. Check that ClickHouse has what schemas/clickhouse makes, and the source its columns, before a message moves.
  await checkSession("ETL_DATABASE_URL", etl);
  const table = await clickhouse.checkMigrations(client, env);
  const columns = await clickhouse.readingColumns(client);
  const report = await createReport(env, where, () => canary.readCanary(etl, topic));
  const checkSource = async () => report.unknownColumns(await consumer.checkReadings(env, columns));
  await checkSource();
  await checkDebezium(env).catch(unlessAway);

  // 2. At the start and after each rebalance: the epoch, whose partitions and offsets the topic must still have.
  let epoch = 0;
  const join = async (): Promise<void> => {
    epoch = await takeEpoch(etl, topic, database, where, table);
  };
  const stop = stopSignal();
  const limitPoison = consumer.createPoisonLimit(env.SENSORS_POISON_SHARE);
  let ends: PartitionState[] | undefined;
  canary.startCanary(env);
  await consume(broker, env, stop.signal, {
    join,
    batch: async (batch) => {
      const [started, place] = [performance.now(), { topic, epoch, partition: batch.partition }];
      const canaries = batch.messages.filter(canary.isCanary);
      const messages = batch.messages.filter((one) => !canaries.includes(one));
      await canary.checkSnapshot(etl, topic, messages);
      // 3. Insert each batch's bytes as they are, by one insert; count its dead letters; stop where they are too many.
      const insert = () => consumer.insertMessages(client, place, messages);
      const dead = await clickhouse.retryForAMinute(insert, report.waiting);
      limitPoison(messages.length, dead);
      // 4. Only then record how far this is, in schema etl and, when this has returned, in the group's offsets.
      await canary.recordCanaries(etl, topic, canaries);
      await writeOffset(etl, topic, batch.partition, BigInt(batch.lastOffset()) + 1n);
      report.inserted(messages, dead, (performance.now() - started) / 1000);
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
  process.exit(); // kafkajs may still be asking a broker that is away
});

/** Kafka Connect and the source may be away: what is in Kafka is consumed all the same. */
function unlessAway(error: Error): void {
  if (error instanceof UsageError) throw error;
}

/** Aborts at the first SIGTERM or Ctrl-C. */
function stopSignal(): AbortController {
  const stop = new AbortController();
  onSignal((signal) => {
    log({ step: "stopping", signal, next: "the batch under way is finished and committed" });
    stop.abort();
  });
  return stop;
}
