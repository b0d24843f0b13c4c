/**
 * Where the readings of the source and of ClickHouse differ: the source's rows are loaded into a table beside the real one, and
 * ClickHouse compares the two.
 *
 * Changes are always on their way, so what differs at first may be one of them. In this order: each reading's _version, the source (L is
 * its log's position after that), and, where anything differs, a wait until all changes up to L are inserted, the comparison once more,
 * and each _version again. A reading whose version has not moved was not changed in ClickHouse meanwhile: all that it went through up to
 * L was inserted by then, and it has to be what the source had. One whose version moved was under way.
 */
import { Readable } from "node:stream";
import type { ClickHouseClient } from "@clickhouse/client";
import type { Env } from "../../../shared/env.ts";
import { thousands } from "../../../shared/log.ts";
import { newRunId, type Run } from "../../../shared/run.ts";
import type { kafkaVariables } from "../../../shared/sensors/broker.ts";
import { readCanary } from "../../../shared/sensors/canary.ts";
import * as clickhouse from "../../../shared/sensors/clickhouse.ts";
import { namesOf, sourceTable } from "../../../shared/sensors/connector.ts";
import { readEpoch, topicState } from "../../../shared/sensors/epoch.ts";
import { connectKafka, withAdmin } from "../../../shared/sensors/kafka.ts";
import { waitUntil } from "./answer.ts";
import { type Comparison, comparison, type Found, total } from "./verify.ts";

type SensorsEnv = clickhouse.ClickHouseEnv & Env<typeof kafkaVariables> & { LIMIT: number };

/** How long what is on its way may take. */
const ARRIVAL_SECONDS = 120;

/**
 * Compares all readings. @param fill of a rebuild, which no consumer fills meanwhile: inserts what the topic has. Its dead letters are no
 * differences. @throws UsageError while the table is being rebuilt; Error where what the source had committed does not arrive.
 */
export async function compareReadings(run: Run, env: SensorsEnv, fill?: () => Promise<void>): Promise<Comparison> {
  await readEpoch(run.etl, env.SENSORS_TOPIC, env.CLICKHOUSE_DATABASE);
  await using client = clickhouse.connectClickHouse(env);
  await clickhouse.checkMigrations(client, env);
  const columns = await clickhouse.readingColumns(client);
  const at = (name: string): string => `verify_${run.id}_${name}`;
  // Without a match a join gives NULL.
  const settings = "SETTINGS join_use_nulls = 1";
  const create = (name: string, query: string) =>
    client.command({ query: `CREATE TABLE ${at(name)} ENGINE = MergeTree ORDER BY id AS ${query} ${settings}` });
  const versions = (some = "1"): string => `SELECT id, max(_version) AS version FROM sensor_readings WHERE ${some} GROUP BY id`;
  const differing = `
    SELECT id, multiIf(count() > 1, 'twice', NOT max(in_table), 'missing', NOT max(in_source), 'extra', 'different') AS kind,
      arrayStringConcat(any(columns), ', ') AS columns FROM (${joined(columns, at("source"))}) GROUP BY id HAVING max(differs)`;
  // Of one that was killed, a day ago or more.
  await dropTables(client, `match(name, '^verify_[0-9]{8}_') AND name < 'verify_${newRunId(Date.now() - 86_400_000)}'`);
  const canary = await readCanary(run.etl, env.SENSORS_TOPIC);
  try {
    await create("before", versions());
    const rows = await loadSource(run, client, at("source"), columns);
    const [first] = await clickhouse.select<{ n: string }>(client, `SELECT count() AS n FROM (${differing}) ${settings}`);
    const candidates = Number(first?.n);
    const found: Found[] = [];
    if (candidates) {
      run.log("again", { because: "what differs may be on its way", differences: candidates });
      await awaitArrival(run, env, candidates, fill);
      await create("still", differing);
      const query = `
        SELECT s.kind AS kind, 'id=' || toString(s.id) AS name, s.columns AS columns, false AS newer,
          toUInt32(count() OVER (PARTITION BY s.kind)) AS total, 0 AS staged
        FROM ${at("still")} AS s LEFT JOIN ${at("before")} AS b ON b.id = s.id
        LEFT JOIN (${versions(`id IN (SELECT id FROM ${at("still")})`)}) AS a ON a.id = s.id
        WHERE b.version <=> a.version${fill ? ` AND s.id NOT IN (${deadIds})` : ""} ORDER BY s.id LIMIT ${env.LIMIT} BY s.kind ${settings}`;
      found.push(...(await clickhouse.select<Found>(client, query)));
    }
    const compared = comparison(rows, found);
    // All that the source had then is in ClickHouse: that gap is none. One that came since stays.
    if (canary?.gap && !found.length)
      await run.etl`update etl.topics set canary_gap = null where topic = ${env.SENSORS_TOPIC} and canary_gap = ${canary.gap}`;
    return { ...compared, fresh: Math.max(0, candidates - total(compared)) };
  } finally {
    await dropTables(client, `startsWith(name, '${at("")}')`);
  }
}

const deadIds = "SELECT JSONExtractInt(ifNull(key, ''), 'id') FROM sensor_dead_letters";

async function dropTables(client: ClickHouseClient, which: string): Promise<void> {
  const query = `SELECT name FROM system.tables WHERE database = currentDatabase() AND ${which}`;
  for (const { name } of await clickhouse.select<{ name: string }>(client, query))
    await client.command({ query: `DROP TABLE IF EXISTS ${name}` });
}

/** Loads all readings of the source, from one snapshot. A time that the views refuse comes as NULL. @returns how many. */
async function loadSource(run: Run, client: ClickHouseClient, table: string, columns: clickhouse.Column[]): Promise<number> {
  const defined = columns.map(({ name, type }) => `${name} ${name === "id" ? type : `Nullable(${clickhouse.plainType(type)})`}`);
  await client.command({ query: `CREATE TABLE ${table} (${defined.join(", ")}) ENGINE = MergeTree ORDER BY id` });
  const time = (name: string): string =>
    `case when "${name}" >= '0001-01-01Z' and "${name}" < '10000-01-01Z'
     then to_char("${name}", 'YYYY-MM-DD HH24:MI:SS.US') end as "${name}"`;
  const selected = columns.map(({ name, type }) => (type.startsWith("DateTime64") ? time(name) : `"${name}"`));
  const lines = `select row_to_json(reading) from (select ${selected.join(", ")} from ${sourceTable}) reading`;
  await using rows = run.copy(lines, {});
  const { stream } = await client.exec({
    query: `INSERT INTO ${table} FORMAT JSONEachRow`,
    values: Readable.from(rows.lines, { objectMode: false }),
    abort_signal: run.signal,
    clickhouse_settings: { async_insert: 0, wait_end_of_query: 1 },
  });
  for await (const _ of stream); // an answer that is not read keeps its connection
  const [loaded] = await clickhouse.select<{ n: string }>(client, `SELECT count() AS n FROM ${table}`);
  if (Number(loaded?.n) === rows.sent.rows) return rows.sent.rows;
  throw new Error(`${rows.sent.rows} readings were read, and ${loaded?.n} were loaded into ${table}. Next: make verify PIPELINE=sensors`);
}

/** Both sides' readings by id, and in which columns they differ; two rows where ClickHouse has an id twice. Floats by their bits. */
function joined(columns: clickhouse.Column[], source: string): string {
  const value = (of: string, { name, type }: clickhouse.Column): string =>
    clickhouse.plainType(type) === "Float64"
      ? `if(isNull(${of}.${name}), NULL, if(isNaN(${of}.${name}), 'NaN', hex(assumeNotNull(${of}.${name}))))`
      : `${of}.${name}`;
  const differ = columns.map((column) => `if(${value("s", column)} <=> ${value("r", column)}, '', '${column.name}')`);
  // The id is never NULL, but its type would be.
  return `SELECT assumeNotNull(coalesce(s.id, r.id)) AS id, isNotNull(s.id) AS in_source, isNotNull(r.id) AS in_table,
    arrayFilter(x -> x != '', [${differ.join(", ")}]) AS columns, notEmpty(columns) AS differs
  FROM ${source} AS s FULL JOIN (SELECT ${columns.map(({ name }) => name).join(", ")} FROM sensor_readings FINAL) AS r ON s.id = r.id`;
}

/** Waits until what the source has committed by now is in the topic, and all of that is inserted. */
async function awaitArrival({ source }: Run, env: SensorsEnv, differences: number, fill?: () => Promise<void>): Promise<void> {
  const broker = connectKafka(env, "etl-verify");
  const where = () => withAdmin(broker, env, (admin) => topicState(admin, env.SENSORS_TOPIC, env.SENSORS_GROUP));
  const { slot } = namesOf(env);
  const late = `${thousands(differences)} readings differ and may be on their way, but after ${ARRIVAL_SECONDS} s`;
  const [now] = await source<{ lsn: string }[]>`select pg_current_wal_lsn()::text as lsn`;
  const passed = () => source`
    select from pg_replication_slots where slot_name = ${slot} and confirmed_flush_lsn >= ${now?.lsn ?? ""}::text::pg_lsn`;
  const undecoded = `${late} Debezium's slot ${slot} has not passed what the source had committed. Next: make connector`;
  await waitUntil(async () => (await passed()).count > 0, ARRIVAL_SECONDS, undecoded);
  await fill?.();
  const ends = await where();
  const inserted = async (): Promise<boolean> => (await where()).every(({ end, lag }, at) => BigInt(lag) <= end - (ends[at]?.end ?? end));
  const next = "Next: is a consumer running? systemctl status etl-sensors";
  await waitUntil(inserted, ARRIVAL_SECONDS, `${late} its messages are not in ClickHouse. ${next}`);
}
