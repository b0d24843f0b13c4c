#!/usr/bin/env -S npx tsx
/**
 * resnapshot: rebuilds sensor_readings from a fresh snapshot, beside the table that readers see. For a topic that was created again or
 * has other partitions, a TRUNCATE at the source, a lost slot, or doubt.
 *
 *   1. stop all consumers (systemctl stop etl-sensors)
 *   2. make resnapshot                 a new epoch; the connector starts again with a snapshot; waits until that is in Kafka
 *   3. make sensors UNTIL=caught-up CLICKHOUSE_DATABASE=…_rebuild       (step 2 prints it)
 *   4. make swap-readings              readers see the new table, at one instant
 *   5. start the consumers
 *
 *   safe to re-run   yes: step 2 begins the rebuild again; until step 4 readers see the old table, as it was
 */
import { log } from "../../shared/log.ts";
import { main } from "../../shared/main.ts";
import { connectClickHouse } from "../../shared/sensors/clickhouse.ts";
import { namesOf } from "../../shared/sensors/connector.ts";
import { beginEpoch } from "../../shared/sensors/epoch.ts";
import * as connector from "./lib/kafka-connect.ts";
import { migrateClickHouse } from "./lib/migrations.ts";
import { openRebuild } from "./lib/rebuild.ts";

await main(import.meta, async () => {
  const { env, topic, groupId, rebuild, etl, ask, where, epoch } = await openRebuild("resnapshot");

  // 1. Stop the connector, so that nothing of the old epoch comes after.
  await connector.checkReplication(env, false);
  await connector.createReadingsTopic(env);
  await connector.stopConnector(env);

  // 2. The new epoch: its messages are those after what the topic has now. From here on the old table's consumers are refused, so
  // that what is forgotten next, and they have not read, cannot be missed there.
  const from = (await where()).map(({ partition, end }) => ({ partition, next: end }));
  const number = (epoch?.number ?? 0) + 1;
  if (!(await beginEpoch(etl, topic, number - 1, rebuild, from)))
    throw new Error(`another make resnapshot has begun epoch ${number} of ${topic}. Run this again when it has ended`);
  const partitions = from.map(({ partition, next }) => ({ partition, offset: String(next) }));
  await ask((admin) => admin.setOffsets({ groupId, topic, partitions }));
  await connector.forgetProgress(env);
  log({ step: "epoch", topic, epoch: number, offsets: partitions.map(({ offset }) => offset).join() });

  // 3. A separate database with empty tables, and the views that fill them.
  await using server = connectClickHouse(env, "default");
  await server.command({ query: `DROP DATABASE IF EXISTS ${rebuild} SYNC` });
  await server.command({ query: `CREATE DATABASE ${rebuild}` });
  await using client = connectClickHouse(env, rebuild);
  await migrateClickHouse(client);

  // 4. The snapshot.
  await connector.startConnector(env);
  await connector.awaitSnapshot(env);
  const next = `make sensors UNTIL=caught-up CLICKHOUSE_DATABASE=${rebuild}; then make swap-readings`;
  log({ step: "done", connector: namesOf(env).connector, epoch: number, next });
  await etl.end();
});
