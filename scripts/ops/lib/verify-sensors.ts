/**
 * Where the readings of the source and of ClickHouse differ: the source's rows are loaded into a table beside the real one, and
 * ClickHouse compares the two.
 *
 * Changes are always on their way, so what differs at first is only a candidate. Then, in this order: each candidate's _version, the
 * source once more (L is its log's position after that), a wait until all changes up to L are inserted, the comparison with these
 * rows, and each candidate's _version again. Where that has not moved, no change came since it was first read: all that its reading
 * went through up to L was inserted by then, and the reading has to be what the source had. It differs: that is a difference. A
 * reading whose _version moved was under way.
 */
import { Readable } from "node:stream";
import { setTimeout as delay } from "node:timers/promises";
import type { ClickHouseClient } from "@clickhouse/client";
import { copyJsonLines } from "../../../shared/copy.ts";
import type { Env } from "../../../shared/env.ts";
import { thousands } from "../../../shared/log.ts";
import { newRunId, type Run } from "../../../shared/run.ts";
import type { kafkaVariables } from "../../../shared/sensors/broker.ts";
import {
  checkMigrations,
  type clickhouseVariables,
  connectClickHouse,
  readingColumns,
  select,
} from "../../../shared/sensors/clickhouse.ts";
import { namesOf, sourceTable } from "../../../shared/sensors/connector.ts";
import { topicState } from "../../../shared/sensors/epoch.ts";
import { connectKafka, withAdmin } from "../../../shared/sensors/kafka.ts";
import { type Comparison, type Difference, type Kind, kinds, type verifyVariables } from "./verify.ts";

type SensorsEnv = Env<typeof clickhouseVariables> & Env<typeof kafkaVariables> & Env<typeof verifyVariables>;
type Columns = { name: string; type: string }[];

/** How long what is on its way may take. */
const ARRIVAL_SECONDS = 120;
const DAY_MS = 86_400_000;
/** Without a match a join gives NULL. The id that it returns is never NULL, but its type is then. */
const settings = { join_use_nulls: 1 as const };

/**
 * Compares all readings.
 * @throws Error where what the source had committed does not arrive.
 */
export async function compareReadings(run: Run, env: SensorsEnv): Promise<Comparison> {
  await using client = connectClickHouse(env);
  await checkMigrations(client, env.CLICKHOUSE_DATABASE);
  const columns = await readingColumns(client);
  const at = (name: string): string => `verify_${run.id}_${name}`;
  const keep = async (name: string, query: string): Promise<number> => {
    const create = `CREATE TABLE ${at(name)} ENGINE = MergeTree ORDER BY id AS ${query}`;
    await client.command({ query: create, clickhouse_settings: settings });
    const [counted] = await select<{ rows: string }>(client, `SELECT count() AS rows FROM ${at(name)}`);
    return Number(counted?.rows);
  };
  const versions = (of: string): string =>
    `SELECT id, max(_version) AS version FROM sensor_readings WHERE id IN (SELECT id FROM ${of}) GROUP BY id`;
  await dropTables(client, `verify_${newRunId(Date.now() - DAY_MS)}`); // of a verify that was killed
  try {
    const rows = await loadSource(run, env, client, at("source"), columns);
    const candidates = await keep(
      "candidates",
      `SELECT DISTINCT id FROM (${joined(columns, at("source"))}) WHERE differs`,
    );
    const found = { rows, fresh: 0, newer: 0, counts: countsOf([]), shown: [] };
    if (!candidates) return found;
    run.log("again", { because: "what differs may be on its way", differences: candidates });
    await keep("before", versions(at("candidates")));
    await loadSource(run, env, client, at("again"), columns);
    await awaitArrival(run, env, candidates);
    const some = `id IN (SELECT id FROM ${at("candidates")})`;
    await keep(
      "still",
      `SELECT id, multiIf(count() > 1, 'twice', NOT max(in_table), 'missing', NOT max(in_source), 'extra', 'different') AS kind,
        arrayStringConcat(any(columns), ', ') AS columns
       FROM (${joined(columns, at("again"), some)}) GROUP BY id HAVING max(differs)`,
    );
    const differ = await keep(
      "differences",
      `SELECT s.id AS id, s.kind AS kind, s.columns AS columns FROM ${at("still")} AS s
       LEFT JOIN ${at("before")} AS b ON b.id = s.id LEFT JOIN (${versions(at("still"))}) AS a ON a.id = s.id
       WHERE b.version <=> a.version`,
    );
    const counts = await select<{ kind: Kind; n: string }>(
      client,
      `SELECT kind, count() AS n FROM ${at("differences")} GROUP BY kind`,
    );
    const shown = await select<{ kind: Kind; id: string; columns: string }>(
      client,
      `SELECT kind, toString(id) AS id, columns FROM ${at("differences")} AS d ORDER BY d.id LIMIT ${env.LIMIT}`,
    );
    return { ...found, fresh: candidates - differ, counts: countsOf(counts), shown: shown.map(describeReading) };
  } finally {
    await dropTables(client, at(""), true);
  }
}

const countsOf = (found: { kind: Kind; n: string }[]): Record<Kind, number> =>
  Object.fromEntries(
    kinds.map((kind) => [kind, Number(found.find((one) => one.kind === kind)?.n ?? 0)]),
  ) as Comparison["counts"];

const describeReading = ({ kind, id, columns }: { kind: Kind; id: string; columns: string }): Difference => ({
  kind,
  name: `id=${id}`,
  columns: kind === "different" ? columns.split(", ") : [],
  newer: false,
});

/** Drops verify's tables up to that name, or of that prefix. A run's id begins with its time, so that the names sort by it. */
async function dropTables(client: ClickHouseClient, name: string, isPrefix = false): Promise<void> {
  const which = isPrefix
    ? "startsWith(name, {name: String})"
    : "match(name, '^verify_[0-9]{8}_') AND name < {name: String}";
  const query = `SELECT name FROM system.tables WHERE database = currentDatabase() AND ${which}`;
  for (const { name: table } of await select<{ name: string }>(client, query, { name }))
    await client.command({ query: `DROP TABLE IF EXISTS ${table}` });
}

const plain = (type: string): string =>
  type.replace(/^LowCardinality\((.*)\)$/, "$1").replace(/^Nullable\((.*)\)$/, "$1");

/** Loads all readings of the source, from one snapshot. A time that DateTime64 cannot hold comes as NULL. @returns how many. */
async function loadSource(
  run: Run,
  env: SensorsEnv,
  client: ClickHouseClient,
  table: string,
  columns: Columns,
): Promise<number> {
  const defined = columns.map(({ name, type }) => `${name} ${name === "id" ? type : `Nullable(${plain(type)})`}`);
  await client.command({ query: `CREATE TABLE ${table} (${defined.join(", ")}) ENGINE = MergeTree ORDER BY id` });
  const time = (name: string): string =>
    `case when "${name}" >= '1900-01-01Z' and "${name}" < '2300-01-01Z'
     then to_char("${name}", 'YYYY-MM-DD HH24:MI:SS.US') end as "${name}"`;
  const selected = columns.map(({ name, type }) => (type.startsWith("DateTime64") ? time(name) : `"${name}"`));
  const lines = `select row_to_json(reading) from (select ${selected.join(", ")} from ${sourceTable}) reading`;
  const window = { from: "-infinity", to: "infinity" };
  await using rows = await copyJsonLines(env.SOURCE_DATABASE_URL, lines, run.session, window);
  const pieces = async function* (): AsyncGenerator<Buffer> {
    for await (const piece of rows.lines) yield Buffer.from(piece); // its memory is used again
  };
  const { stream } = await client.exec({
    query: `INSERT INTO ${table} FORMAT JSONEachRow`,
    values: Readable.from(pieces(), { objectMode: false }),
    abort_signal: run.signal,
    clickhouse_settings: { async_insert: 0, wait_end_of_query: 1 },
  });
  for await (const _ of stream); // an answer that is not read keeps its connection
  const [counted] = await select<{ n: string }>(client, `SELECT count() AS n FROM ${table}`);
  if (Number(counted?.n) !== rows.sent.rows)
    throw new Error(
      `${rows.sent.rows} readings were read from the source, and ${counted?.n} were loaded into ${table}`,
    );
  return rows.sent.rows;
}

/** Both sides' readings by id, and in which columns they differ; two rows where ClickHouse has an id twice. Floats by their bits. */
function joined(columns: Columns, source: string, some = "1"): string {
  const value = (of: string, { name, type }: Columns[number]): string =>
    plain(type) === "Float64"
      ? `if(isNull(${of}.${name}), NULL, if(isNaN(${of}.${name}), 'NaN', hex(assumeNotNull(${of}.${name}))))`
      : `${of}.${name}`;
  const differ = columns.map((column) => `if(${value("s", column)} <=> ${value("r", column)}, '', '${column.name}')`);
  const names = columns.map(({ name }) => name).join(", ");
  return `SELECT assumeNotNull(coalesce(s.id, r.id)) AS id, isNotNull(s.id) AS in_source, isNotNull(r.id) AS in_table,
    arrayFilter(x -> x != '', [${differ.join(", ")}]) AS columns, notEmpty(columns) AS differs
  FROM (SELECT ${names} FROM ${source} WHERE ${some}) AS s
  FULL JOIN (SELECT ${names} FROM sensor_readings FINAL WHERE ${some}) AS r ON s.id = r.id`;
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
  let ends: Map<number, bigint> | undefined; // of the topic's partitions, once all of it is there
  for (;;) {
    let state = `Debezium's slot ${slot} has not passed what the source had committed. Next: make connector`;
    if (ends || (await decoded())) {
      const partitions = await where();
      ends ??= new Map(partitions.map(({ partition, end }) => [partition, end]));
      const lags = partitions.map(({ partition, end, lag }) => BigInt(lag) - (end - (ends?.get(partition) ?? end)));
      const lag = lags.reduce((sum, one) => sum + (one > 0n ? Number(one) : 0), 0);
      if (lag === 0) return;
      state = `${thousands(lag)} messages are not in ClickHouse. Next: is a consumer running? systemctl status etl-sensors`;
    }
    if (performance.now() - before > ARRIVAL_SECONDS * 1000)
      throw new Error(
        `${thousands(differences)} readings differ and may be on their way, but after ${ARRIVAL_SECONDS} s ${state}`,
      );
    await delay(1000, undefined, { signal });
  }
}
