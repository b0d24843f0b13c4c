/**
 * Where the readings of the source and of ClickHouse differ: the source's rows are loaded into a table beside the real one, and
 * ClickHouse compares the two.
 *
 * What differs at first may be on its way. In this order: each reading's _version, the source (L is its log's position after that), and,
 * where anything differs, a wait until all changes up to L are inserted, the comparison once more, and each _version again. A reading whose
 * version has not moved has to be what the source had: all that it went through up to L was inserted by then. Another one was under way.
 */
import type { ClickHouseClient } from "@clickhouse/client";
import type { Env } from "../../../shared/env.ts";
import { thousands } from "../../../shared/log.ts";
import type { Run } from "../../../shared/run.ts";
import type { kafkaVariables } from "../../../shared/sensors/broker.ts";
import { readCanary } from "../../../shared/sensors/canary.ts";
import * as clickhouse from "../../../shared/sensors/clickhouse.ts";
import { namesOf, sourceTable } from "../../../shared/sensors/connector.ts";
import { readEpoch, topicState } from "../../../shared/sensors/epoch.ts";
import { connectKafka, withAdmin } from "../../../shared/sensors/kafka.ts";
import { waitUntil } from "./answer.ts";
import { type Comparison, comparison, type Found, total } from "./verify.ts";

type SensorsEnv = clickhouse.ClickHouseEnv & Env<typeof kafkaVariables> & { LIMIT: number };

/**
 * Compares all readings. @param fill of a rebuild, which no consumer fills meanwhile: inserts what the topic has. Its dead letters are no
 * differences. @throws UsageError while the table is being rebuilt; Error where what the source had committed does not arrive.
 */
export async function compareReadings(run: Run, env: SensorsEnv, fill?: () => Promise<void>): Promise<Comparison> {
  await readEpoch(run.etl, env.SENSORS_TOPIC, env.CLICKHOUSE_DATABASE);
  await run.etl`select pg_advisory_lock(hashtextextended('etl:verify-sensors', 0))`; // the tables' names are fixed
  await using client = clickhouse.connectClickHouse(env);
  await clickhouse.checkMigrations(client, env);
  // Without a match a join gives NULL.
  const settings = "SETTINGS join_use_nulls = 1";
  const create = (table: string, query: string) =>
    client.command({ query: `CREATE OR REPLACE TABLE verify_${table} ENGINE = MergeTree ORDER BY id ${query}` });
  const versions = "SELECT id, max(_version) AS version FROM sensor_readings GROUP BY id";
  const columns = await clickhouse.readingColumns(client);
  const differing = differingStatement(columns);
  const isAlive = fill ? "s.id NOT IN (SELECT JSONExtractInt(ifNull(key, ''), 'id') FROM sensor_dead_letters)" : "1";
  const canary = await readCanary(run.etl, env.SENSORS_TOPIC);
  try {
    await create("before", `AS ${versions}`);
    await create("source", "AS sensor_readings");
    const rows = await loadSource(run, client, columns);
    const [first] = await clickhouse.select<{ n: number }>(client, `SELECT toUInt32(count()) AS n FROM (${differing}) ${settings}`);
    const candidates = first?.n ?? 0;
    const found: Found[] = [];
    if (candidates) {
      run.log("again", { because: "what differs may be on its way", differences: candidates });
      await awaitArrival(run, env, candidates, fill);
      await create("still", `AS ${differing} ${settings}`);
      const query = `
        SELECT s.kind AS kind, 'id=' || toString(s.id) AS name, s.columns AS columns,
          toUInt32(count() OVER (PARTITION BY s.kind)) AS total
        FROM verify_still AS s LEFT JOIN verify_before AS b ON b.id = s.id LEFT JOIN (${versions}) AS a ON a.id = s.id
        WHERE b.version <=> a.version AND ${isAlive} ORDER BY s.id LIMIT ${env.LIMIT} BY s.kind ${settings}`;
      found.push(...(await clickhouse.select<Found>(client, query)));
    }
    const compared = comparison(rows, found);
    // All that the source had then is in ClickHouse: that gap is none. One that came since stays.
    if (canary?.gap && !found.length)
      await run.etl`update etl.topics set canary_gap = null where topic = ${env.SENSORS_TOPIC} and canary_gap = ${canary.gap}`;
    compared.counts.new = Math.max(0, candidates - total(compared));
    return compared;
  } finally {
    for (const table of ["before", "source", "still"]) await client.command({ query: `DROP TABLE IF EXISTS verify_${table}` });
  }
}

/** Loads the source's readings into verify_source, from one snapshot. A time that the views refuse comes as 1970. @returns how many. */
async function loadSource(run: Run, client: ClickHouseClient, columns: clickhouse.Column[]): Promise<number> {
  const selected = columns.map(({ name, type }) =>
    type.startsWith("DateTime64")
      ? `case when "${name}" >= '0001-01-01Z' and "${name}" < '10000-01-01Z' then "${name}" end as "${name}"`
      : `"${name}"`,
  );
  await using rows = run.copy(`select row_to_json(reading) from (select ${selected.join(", ")} from ${sourceTable}) reading`, {});
  await clickhouse.insertRows(client, "verify_source FORMAT JSONEachRow", rows.lines, { date_time_input_format: "best_effort" });
  return rows.sent.rows;
}

/**
 * The ids whose readings differ, how, and in which columns: by their text, in which NaN equals NaN and 0 is not -0. An id that ClickHouse
 * has twice is two rows of the join.
 */
function differingStatement(columns: clickhouse.Column[]): string {
  const differ = columns.map(({ name }) => `if(toString(s.${name}) <=> toString(r.${name}), '', '${name}')`);
  return `
    SELECT assumeNotNull(coalesce(s.id, r.id)) AS id,
      multiIf(count() > 1, 'twice', isNull(any(r.id)), 'missing', isNull(any(s.id)), 'extra', 'different') AS kind,
      arrayStringConcat(arrayFilter(x -> x != '', any([${differ.join(", ")}])), ', ') AS columns
    FROM verify_source AS s FULL JOIN (SELECT * FROM sensor_readings FINAL) AS r ON s.id = r.id
    GROUP BY id HAVING count() > 1 OR columns != ''`;
}

/** Waits until what the source has committed by now is in the topic, and all of that is inserted. */
async function awaitArrival({ source }: Run, env: SensorsEnv, differences: number, fill?: () => Promise<void>): Promise<void> {
  const broker = connectKafka(env, "etl-verify");
  const where = () => withAdmin(broker, env, (admin) => topicState(admin, env.SENSORS_TOPIC, env.SENSORS_GROUP));
  const { slot } = namesOf(env);
  const seconds = 120; // what is on its way may take
  const late = `${thousands(differences)} readings differ and may be on their way, but after ${seconds} s`;
  const [now] = await source<{ lsn: string }[]>`select pg_current_wal_lsn()::text as lsn`;
  const passed = () => source`
    select from pg_replication_slots where slot_name = ${slot} and confirmed_flush_lsn >= ${now?.lsn ?? ""}::text::pg_lsn`;
  const undecoded = `${late} Debezium's slot ${slot} has not passed what the source had committed. Next: make connector`;
  await waitUntil(async () => (await passed()).count > 0, seconds, undecoded);
  await fill?.();
  const ends = await where();
  const inserted = async (): Promise<boolean> => (await where()).every(({ end, lag }, at) => BigInt(lag) <= end - (ends[at]?.end ?? end));
  const next = "Next: is a consumer running? systemctl status etl-sensors";
  await waitUntil(inserted, seconds, `${late} its messages are not in ClickHouse. ${next}`);
}
