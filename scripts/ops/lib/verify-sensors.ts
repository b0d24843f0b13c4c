/**
 * Where the readings of the source and of ClickHouse differ.
 */
import { setTimeout as delay } from "node:timers/promises";
import type { clickhouse, Env, kafka } from "../../../shared/env.ts";
import { thousands } from "../../../shared/log.ts";
import type { Run } from "../../../shared/run.ts";
import { checkDefinitions, connectClickHouse, readDefinitions } from "../../../shared/sensors/clickhouse.ts";
import { connectKafka, topicState, withAdmin } from "../../../shared/sensors/kafka.ts";
import { namesOf, sourceTable } from "../../../shared/sensors/kafka-connect.ts";
import { clickhouseLayout, clickhouseSide, postgresSide } from "./checksum.ts";
import { type Comparison, compare } from "./verify.ts";

type SensorsEnv = Env<(typeof clickhouse)[number] | (typeof kafka)[number]>;

/** Readings that are younger may be on their way. */
const SETTLED = "10 minutes";
/** How long what is on its way may take. */
const ARRIVAL_SECONDS = 120;

/**
 * Compares the readings that were recorded more than ten minutes ago. Where some differ, they may have been changed a moment ago:
 * once more, when all that the source has committed by then is inserted.
 * @throws Error where that does not come about.
 */
export async function compareReadings(run: Run, env: SensorsEnv): Promise<Comparison> {
  const client = connectClickHouse(env);
  try {
    await checkDefinitions(client, env.CLICKHOUSE_DATABASE);
    const table = readDefinitions().find(({ name }) => name === "sensor_readings");
    const columns = table?.columns.filter(({ name }) => !name.startsWith("_")) ?? [];
    const found = await run.source<{ name: string; type: string }[]>`
      select attname as name, typname as type from pg_attribute join pg_type t on t.oid = atttypid
      where attrelid = to_regclass(${sourceTable}) and attnum > 0 and not attisdropped`;
    const layout = clickhouseLayout(columns, Object.fromEntries(found.map(({ name, type }) => [name, type])));
    const [cut] = await run.source<{ micros: string }[]>`
      select (extract(epoch from now() - ${SETTLED}::interval) * 1000000)::bigint::text as micros`;
    const micros = cut?.micros ?? "0";
    const select = `select ${columns.map(({ name }) => `"${name}"`).join(", ")} from ${sourceTable}`;
    const settled = `q.recorded_at < 'epoch'::timestamptz + ${micros} * interval '1 microsecond'`;
    const source = postgresSide(run.source, layout, select, settled);
    const destination = clickhouseSide(
      client,
      layout,
      `${env.CLICKHOUSE_DATABASE}.sensor_readings`,
      `r.recorded_at < fromUnixTimestamp64Micro(${micros}, 'UTC')`,
    );
    const first = await compare(layout, source, destination);
    if (!first.differences.length) return first;
    run.log("again", { because: "what differs may be on its way", differences: first.differences.length });
    await awaitArrival(run, env, first.differences.length);
    return await compare(layout, source, destination);
  } finally {
    await client.close();
  }
}

/** Waits until what the source has committed by now is in the topic, and all of that is inserted. */
async function awaitArrival({ source, signal }: Run, env: SensorsEnv, differences: number): Promise<void> {
  const broker = connectKafka(env, "etl-verify");
  const where = () => withAdmin(broker, env, (admin) => topicState(admin, env.SENSORS_TOPIC, env.SENSORS_GROUP));
  const { slot } = namesOf(env);
  const [now] = await source<{ lsn: string }[]>`select pg_current_wal_lsn()::text as lsn`;
  const decoded = async (): Promise<boolean> => {
    const [at] = await source<{ passed: boolean }[]>`
      select confirmed_flush_lsn >= ${now?.lsn ?? ""}::text::pg_lsn as passed from pg_replication_slots where slot_name = ${slot}`;
    return at?.passed === true;
  };
  const before = performance.now();
  let state = "";
  for (;;) {
    if (await decoded()) {
      const lag = (await where()).reduce((sum, partition) => sum + partition.lag, 0);
      if (lag === 0) return;
      state = `${thousands(lag)} messages are not in ClickHouse. Next: is a consumer running? systemctl status etl-sensors`;
    } else state = `Debezium's slot ${slot} has not passed what the source had committed. Next: make connector`;
    if (performance.now() - before > ARRIVAL_SECONDS * 1000)
      throw new Error(
        `${thousands(differences)} readings differ and may be on their way, but after ${ARRIVAL_SECONDS} s ${state}`,
      );
    await delay(1000, undefined, { signal });
  }
}
