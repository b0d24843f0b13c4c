#!/usr/bin/env -S npx tsx
/**
 * swap-readings: lets readers see the sensor_readings that make resnapshot has begun and a consumer has filled, by EXCHANGE TABLES, at one
 * instant. The old table stays in the database …_rebuild until the next rebuild.
 *
 *   first            what the topic has and the rebuild has not is inserted, by a consumer that ends
 *   refused          while consumers run, without a rebuild, and where make verify's comparison finds that it differs from the source (a
 *                    change that was dead-lettered is no difference)
 *   safe to re-run   yes: killed between the tables, it exchanges the other one
 */
import { spawn } from "node:child_process";
import { once } from "node:events";
import { join } from "node:path";
import { readEnv, root, UsageError } from "../../shared/env.ts";
import { log, thousands } from "../../shared/log.ts";
import { main } from "../../shared/main.ts";
import { pipelineVariables, runPipeline } from "../../shared/run.ts";
import { connectClickHouse, select } from "../../shared/sensors/clickhouse.ts";
import { awaitSnapshot } from "./lib/kafka-connect.ts";
import { openRebuild, tables } from "./lib/rebuild.ts";
import { total } from "./lib/verify.ts";
import { compareReadings } from "./lib/verify-sensors.ts";

await main(import.meta, async () => {
  const { env, topic, database, rebuild, etl, epoch, checkIsEmpty } = await openRebuild("swap-readings");
  const proven = `${rebuild}_swap`;
  if (epoch?.database !== rebuild && epoch?.database !== proven)
    throw new UsageError(`there is no rebuild of ${topic} to swap in. Run: make resnapshot`);
  const move = (to: string) => etl`update etl.topics set database = ${to} where topic = ${topic} and epoch = ${epoch.number}`;

  // 1. The rebuild is complete, and proven. From then on a consumer is refused: after the first exchange the old table stands in its place.
  if (epoch.database === rebuild) {
    await awaitSnapshot(env, () => {});
    await prove({ ...env, ...readEnv(pipelineVariables), CLICKHOUSE_DATABASE: rebuild, LIMIT: 10 });
    await move(proven);
    await checkIsEmpty();
  }

  // 2. Exchange. A table's comment moves with it: one that was exchanged already, by a swap that was killed, is told by it.
  await using server = connectClickHouse(env, "default");
  for (const table of tables) {
    const query = "SELECT comment FROM system.tables WHERE database = {database: String} AND name = {table: String}";
    const [seen] = await select<{ comment: string }>(server, query, { database, table });
    if (seen?.comment !== `epoch ${epoch.number}`)
      await server.command({ query: `EXCHANGE TABLES ${database}.${table} AND ${rebuild}.${table}` });
  }

  // 3. From now on the epoch's rows belong into the database that readers see.
  await move(database);
  const next = `start the consumers; DROP DATABASE ${rebuild} when nobody misses it`;
  const names = { swapped: `${database}.sensor_readings`, epoch: epoch.number, before: `${rebuild}.sensor_readings` };
  log({ step: "done", ...names, next });
  await etl.end();
});

/** @throws Error where the rebuild differs from the source: a snapshot that was interrupted keeps rows that were deleted meanwhile. */
async function prove(env: Parameters<typeof compareReadings>[1] & Parameters<typeof runPipeline>[1]): Promise<void> {
  const { CLICKHOUSE_DATABASE } = env;
  // What changes at the source meanwhile comes by a consumer that ends.
  const fill = async (): Promise<void> => {
    const variables = { CLICKHOUSE_DATABASE, UNTIL: "caught-up", METRICS_PORT: "0" };
    const options = { stdio: "inherit", env: { ...process.env, ...variables } } as const;
    const [code] = await once(spawn(process.execPath, [join(root, "scripts/sensors.ts")], options), "exit");
    if (code !== 0) throw new Error(`make sensors UNTIL=caught-up CLICKHOUSE_DATABASE=${CLICKHOUSE_DATABASE} failed`);
  };
  await runPipeline("sensors", { ...env, DRY_RUN: true }, async (run) => {
    await fill();
    run.next = "nothing was swapped. Next: make swap-readings";
    const found = await compareReadings(run, env, fill);
    const names = found.shown.map(({ kind, name }) => `${kind} ${name}`).join(", ");
    const differ = `differs from the source in ${thousands(total(found))} of ${thousands(found.rows)} rows (${names})`;
    if (total(found)) throw new Error(`${CLICKHOUSE_DATABASE}.sensor_readings ${differ}. Nothing was swapped. Next: make resnapshot`);
    run.log("proven", { rows: found.rows });
  });
}
