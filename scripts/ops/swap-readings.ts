#!/usr/bin/env -S npx tsx
/**
 * swap-readings: lets readers see the sensor_readings that make resnapshot has begun and a consumer has filled, by EXCHANGE TABLES, at one
 * instant. The old table stays in the database …_rebuild until the next rebuild.
 *
 *   refused          while consumers run, without a rebuild, and while messages of its snapshot are not in it
 *   safe to re-run   yes: killed between the tables, it exchanges the other one
 *
 *   make swap-readings
 */
import { UsageError } from "../../shared/env.ts";
import { log, thousands } from "../../shared/log.ts";
import { main } from "../../shared/main.ts";
import { connectClickHouse, select } from "../../shared/sensors/clickhouse.ts";
import { readEpoch } from "../../shared/sensors/epoch.ts";
import { awaitSnapshot } from "./lib/kafka-connect.ts";
import { openRebuild, tables } from "./lib/rebuild.ts";

await main(import.meta, async () => {
  const { env, topic, database, rebuild, etl, lag } = await openRebuild("swap-readings");

  // 1. The rebuild is there, and complete.
  const epoch = await readEpoch(etl, topic);
  if (epoch?.database !== rebuild)
    throw new UsageError(`there is no rebuild of ${topic} to swap in. Run: make resnapshot`);
  await awaitSnapshot(env, () => {});
  const left = await lag();
  if (left > 0)
    throw new UsageError(
      `${thousands(left)} messages are not in ${rebuild} yet. Next: make sensors UNTIL=caught-up CLICKHOUSE_DATABASE=${rebuild}`,
    );

  // 2. Exchange. A table's comment moves with it: one that was exchanged already, by a swap that was killed, is told by it.
  await using server = connectClickHouse(env, "default");
  for (const table of tables) {
    const query = "SELECT comment FROM system.tables WHERE database = {database: String} AND name = {table: String}";
    const [seen] = await select<{ comment: string }>(server, query, { database, table });
    if (seen?.comment !== `epoch ${epoch.number}`)
      await server.command({ query: `EXCHANGE TABLES ${database}.${table} AND ${rebuild}.${table}` });
  }

  // 3. From now on the epoch's rows belong into the database that readers see.
  await etl`update etl.topics set database = ${database} where topic = ${topic}`;
  const next = `start the consumers; DROP DATABASE ${rebuild} when nobody misses it`;
  const names = { swapped: `${database}.sensor_readings`, epoch: epoch.number, before: `${rebuild}.sensor_readings` };
  log({ step: "done", ...names, next });
  await etl.end();
});
