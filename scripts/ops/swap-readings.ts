#!/usr/bin/env -S npx tsx
/**
 * swap-readings: lets readers see the sensor_readings that make resnapshot has begun and a consumer has filled, by EXCHANGE TABLES, at one
 * instant. The old table stays in the database …_rebuild until the next rebuild.
 *
 *   refused          while consumers run, without a rebuild, and where make verify's comparison finds that it differs from the source, once
 *                    a consumer that ends has inserted what came since (a change that was dead-lettered is no difference)
 *   safe to re-run   yes, also after a kill
 */
import { spawn } from "node:child_process";
import { once } from "node:events";
import { join } from "node:path";
import { readEnv, root, UsageError } from "../../shared/env.ts";
import { log } from "../../shared/log.ts";
import { main } from "../../shared/main.ts";
import { pipelineVariables, runPipeline } from "../../shared/run.ts";
import { connectClickHouse, select } from "../../shared/sensors/clickhouse.ts";
import { openRebuild } from "./lib/rebuild.ts";
import { describe, total } from "./lib/verify.ts";
import { compareReadings } from "./lib/verify-sensors.ts";

await main(import.meta, async () => {
  const { env, topic, database, rebuild, etl, epoch, checkIsEmpty } = await openRebuild("swap-readings");

  // 1. The rebuild is proven to be the source's rows: a snapshot that was interrupted keeps rows that were deleted meanwhile. From then on
  // consumers are refused, until readers have the table that the epoch has filled.
  if (epoch?.database === rebuild) {
    const variables = { CLICKHOUSE_DATABASE: rebuild, UNTIL: "caught-up", METRICS_PORT: "0" };
    const fill = async (): Promise<void> => {
      const options = { stdio: "inherit", env: { ...process.env, ...variables } } as const;
      const [code] = await once(spawn(process.execPath, [join(root, "scripts/sensors.ts")], options), "exit");
      if (code !== 0) throw new Error(`make sensors UNTIL=caught-up CLICKHOUSE_DATABASE=${rebuild} failed`);
    };
    const all = { ...env, ...readEnv(pipelineVariables), ...variables, LIMIT: 10, DRY_RUN: true };
    await runPipeline("sensors", all, async (run) => {
      run.next = "nothing was swapped. Next: make swap-readings";
      await fill();
      const found = await compareReadings(run, all, fill);
      if (total(found)) throw new Error(`${describe(`${rebuild}.sensor_readings`, found)}\nNothing was swapped. Next: make resnapshot`);
      run.log("proven", { rows: found.rows });
    });
    await etl`update etl.topics set database = ${database} where topic = ${topic} and epoch = ${epoch.number}`;
    await checkIsEmpty();
  }

  // 2. Copy its dead letters, and exchange the readings. A table keeps its UUID, by which the epoch knows the one that it has filled: a
  // swap that was killed is resumed, and one that is done is not undone.
  await using client = connectClickHouse(env);
  const [filled] = await etl`select readings as uuid from etl.topics where topic = ${topic}`;
  const query = "SELECT name FROM system.tables WHERE database = {rebuild: String} AND toString(uuid) = {uuid: String}";
  if (!(await select(client, query, { rebuild, uuid: filled?.uuid ?? "" })).length)
    throw new UsageError(`there is no rebuild of ${topic} to swap in. Run: make resnapshot`);
  await client.command({ query: "TRUNCATE TABLE sensor_dead_letters" });
  await client.command({ query: `INSERT INTO sensor_dead_letters SELECT * FROM ${rebuild}.sensor_dead_letters` });
  await client.command({ query: `EXCHANGE TABLES sensor_readings AND ${rebuild}.sensor_readings` });
  const next = `start the consumers; DROP DATABASE ${rebuild} when nobody misses it`;
  log({ step: "done", swapped: `${database}.sensor_readings`, epoch: epoch?.number, before: `${rebuild}.sensor_readings`, next });
  await etl.end();
});
