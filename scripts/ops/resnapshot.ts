/**
 * resnapshot: rebuilds sensor_readings from a fresh snapshot, beside the table that readers see, and swaps it in. For a topic that
 * was made anew or has other partitions, a TRUNCATE at the source, a lost slot, or doubt.
 *
 *   1. stop all consumers (systemctl stop etl-sensors)
 *   2. make resnapshot                 a new epoch; the connector starts again with a snapshot; waits until that is in Kafka
 *   3. make sensors UNTIL=caught-up CLICKHOUSE_DATABASE=…_rebuild       (step 2 prints it)
 *   4. make resnapshot SWAP=1          EXCHANGE TABLES: readers see the new table, at one instant
 *   5. start the consumers
 *
 *   safe to re-run   yes: step 2 begins the rebuild anew; until step 4 readers see the old table, as it was
 */

import { flag, optional, postgresUrl, readEnv, required, UsageError } from "../../shared/env.ts";
import { log, progress, thousands } from "../../shared/log.ts";
import { main } from "../../shared/main.ts";
import { clickhouseVariables, connectClickHouse, migrateClickHouse, select } from "../../shared/sensors/clickhouse.ts";
import { beginEpoch, readEpoch, settleEpoch } from "../../shared/sensors/epoch.ts";
import { checkGroupIsEmpty, connectKafka, kafkaVariables, topicState, withAdmin } from "../../shared/sensors/kafka.ts";
import {
  awaitSnapshot,
  checkReplication,
  connectorConfig,
  connectorVariables,
  createReadingsTopic,
  dropSlot,
  forgetConnector,
  namesOf,
  putConnector,
  stopConnector,
} from "../../shared/sensors/kafka-connect.ts";
import { checkSession, connect } from "../../shared/session.ts";

const tables = ["sensor_readings", "sensor_dead_letters"];

await main(import.meta, async () => {
  const env = readEnv({
    ETL_DATABASE_URL: required(postgresUrl),
    ...clickhouseVariables,
    ...kafkaVariables,
    ...connectorVariables,
    SWAP: optional(flag, false),
  });
  const { SENSORS_TOPIC: topic, SENSORS_GROUP: groupId, CLICKHOUSE_DATABASE: database } = env;
  const rebuild = `${database}_rebuild`;
  const etl = connect(env.ETL_DATABASE_URL, { application: "etl:resnapshot", timeoutSeconds: 30 });
  await checkSession("ETL_DATABASE_URL", etl);
  const server = connectClickHouse(env, "default");
  const broker = connectKafka(env, "etl-resnapshot");
  const where = () => withAdmin(broker, env, (admin) => topicState(admin, topic, groupId));
  const readLag = async (): Promise<number> => (await where()).reduce((sum, { lag }) => sum + lag, 0);
  await withAdmin(broker, env, (admin) => checkGroupIsEmpty(admin, groupId));

  if (env.SWAP) {
    const epoch = await readEpoch(etl, topic);
    if (epoch?.database !== rebuild)
      throw new UsageError(`there is no rebuild of ${topic} to swap in. Begin one: make resnapshot`);
    await awaitSnapshot(env, () => {});
    const lag = await readLag();
    if (lag > 0)
      throw new UsageError(
        `${thousands(lag)} messages are not in ${rebuild} yet. Next: make sensors UNTIL=caught-up CLICKHOUSE_DATABASE=${rebuild}`,
      );
    // A table's comment goes with it: swapped once is swapped, also where this was killed in between.
    for (const table of tables) {
      const [seen] = await select<{ comment: string }>(
        server,
        "SELECT comment FROM system.tables WHERE database = {database: String} AND name = {table: String}",
        { database, table },
      );
      if (seen?.comment !== `epoch ${epoch.number}`)
        await server.command({ query: `EXCHANGE TABLES ${database}.${table} AND ${rebuild}.${table}` });
    }
    await settleEpoch(etl, topic, database);
    log({
      step: "done",
      swapped: `${database}.sensor_readings`,
      epoch: epoch.number,
      before: `${rebuild}.sensor_readings`,
      next: `start the consumers; DROP DATABASE ${rebuild} when nobody misses it`,
    });
  } else {
    // 1. Stop the connector, so that nothing of the old epoch comes after.
    await checkReplication(env);
    const config = connectorConfig(env);
    await createReadingsTopic(env, config);
    await stopConnector(env, config);

    // 2. The new epoch: its messages are those after what the topic has now. From here on the old table's consumers are refused, so
    // that what is forgotten next, and they have not read, cannot be missed there.
    const partitions = await where();
    const epoch = await beginEpoch(etl, topic, rebuild, partitions);
    await withAdmin(broker, env, (admin) =>
      admin.setOffsets({
        groupId,
        topic,
        partitions: partitions.map(({ partition, end }) => ({ partition, offset: String(end) })),
      }),
    );
    await forgetConnector(env);
    await dropSlot(env);
    log({
      step: "epoch",
      topic,
      epoch: epoch.number,
      partitions: partitions.length,
      offsets: partitions.map(({ end }) => end).join(),
    });

    // 3. Empty tables of its own, with the views that fill them.
    await server.command({ query: `DROP DATABASE IF EXISTS ${rebuild} SYNC` });
    const refused = await migrateClickHouse(env, rebuild, async (_, work) => void (await work()));
    if (refused.length) throw new Error(refused.join("\n"));
    for (const table of tables)
      await server.command({ query: `ALTER TABLE ${rebuild}.${table} MODIFY COMMENT 'epoch ${epoch.number}'` });

    // 4. The snapshot.
    await putConnector(env, config);
    const started = performance.now();
    await awaitSnapshot(env, () =>
      progress(`the snapshot goes to Kafka: ${Math.round((performance.now() - started) / 1000)} s`),
    );
    progress("");
    log({
      step: "done",
      connector: namesOf(env).connector,
      epoch: epoch.number,
      messages: await readLag(),
      next: `make sensors UNTIL=caught-up CLICKHOUSE_DATABASE=${rebuild}; then make resnapshot SWAP=1`,
    });
  }
  await Promise.all([etl.end(), server.close()]);
});
