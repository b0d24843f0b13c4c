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
 *   make sensors UNTIL=caught-up      ends once the lag is zero
 *
 * Touches: reads the source's catalog as a read-only role, and the topic; writes ClickHouse, the group's offsets and schema etl.
 * Serves /metrics and /healthz at METRICS_PORT.
 */

import { readEnv, UsageError } from "../shared/env.ts";
import { log } from "../shared/log.ts";
import { main } from "../shared/main.ts";
import { kafkaVariables } from "../shared/sensors/broker.ts";
import {
  checkMigrations,
  clickhouseVariables,
  connectClickHouse,
  insertRowBinary,
  landingRows,
  readingColumns,
  retryUntilUp,
} from "../shared/sensors/clickhouse.ts";
import { connectVariables } from "../shared/sensors/connector.ts";
import {
  checkReadings,
  consumerVariables,
  createPoisonLimit,
  createReport,
  findDeadLetters,
  stopSignals,
} from "../shared/sensors/consumer.ts";
import { takeEpoch, topicState, writeOffsets } from "../shared/sensors/epoch.ts";
import { connectKafka, consume, withAdmin } from "../shared/sensors/kafka.ts";
import { checkSession, connect } from "../shared/session.ts";

await main(import.meta, async () => {
  const env = readEnv({ ...consumerVariables, ...clickhouseVariables, ...kafkaVariables, ...connectVariables });
  const { SENSORS_TOPIC: topic, SENSORS_GROUP: groupId, CLICKHOUSE_DATABASE: database } = env;
  const { stop, abandon } = stopSignals();
  const etl = connect(env.ETL_DATABASE_URL, { application: "etl:sensors", timeoutSeconds: 30 });
  const client = connectClickHouse(env);
  const broker = connectKafka(env, "etl-sensors");
  const where = () => withAdmin(broker, env, (admin) => topicState(admin, topic, groupId));
  await checkSession("ETL_DATABASE_URL", etl);
  await using report = await createReport(env, where);
  const { waiting } = report;

  // 1. Check that ClickHouse has what schemas/clickhouse makes, and the source its columns, before a message moves.
  const check = () => checkMigrations(client, database).then(() => readingColumns(client));
  const columns = await retryUntilUp(check, async () => {}, stop.signal, waiting).catch((error: Error) => {
    if (!stop.signal.aborted) throw error;
    return []; // stopped while ClickHouse was away: nothing is under way
  });
  if (columns.length) report.unknownColumns(await checkReadings(env, columns));

  let epoch = 0;
  const limitPoison = createPoisonLimit(env.SENSORS_POISON_SHARE);
  await consume(broker, env, stop.signal, {
    // 2. After each rebalance: the epoch, whose partitions and offsets the topic must still have.
    join: async () => {
      const now = await takeEpoch(etl, topic, database, where);
      if (now.database !== database)
        throw new UsageError(
          `epoch ${now.number} of ${topic} belongs into database ${now.database}, not ${database}: the table is ` +
            `being rebuilt there. Next: make sensors UNTIL=caught-up CLICKHOUSE_DATABASE=${now.database}, then make ` +
            `swap-readings`,
        );
      epoch = now.number;
    },
    // 3. Each batch: insert its bytes as they are, by one insert; count its dead letters; stop where they are too many.
    batch: async (batch, heartbeat) => {
      const place = { topic, epoch, partition: batch.partition };
      const started = performance.now();
      const rows = landingRows(place, batch.messages);
      if (rows.length)
        await retryUntilUp(
          (until) => insertRowBinary(client, "sensor_landing", rows, until),
          heartbeat,
          abandon,
          waiting,
        );
      const dead = await retryUntilUp(() => findDeadLetters(client, place, batch), heartbeat, abandon, waiting);
      report.inserted(batch, dead.length, (performance.now() - started) / 1000);
      limitPoison(batch.messages.length, dead);
    },
    // 4. Only then is its offset committed; schema etl remembers it, to tell a topic that was created again.
    commit: (partition, next) =>
      writeOffsets(etl, topic, [{ partition, next }]).catch(({ message }: Error) =>
        log({ step: "warning", warning: "schema etl does not know how far this is; Kafka does", error: message }),
      ),
    fetch: async () => {
      if (env.UNTIL && (await where()).every(({ lag }) => lag === 0)) stop.abort();
    },
  });

  // 5. Report.
  report.done();
  await Promise.all([etl.end({ timeout: 5 }), client.close()]);
  process.exit(); // kafkajs may still be asking a broker that is away
});
