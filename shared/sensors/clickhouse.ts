/** ClickHouse: a client, the record of schemas/clickhouse, retries while it is away or overloaded, and inserts of raw messages. */
import { Readable } from "node:stream";
import { setTimeout as delay } from "node:timers/promises";
import { type ClickHouseClient, ClickHouseError, ClickHouseLogLevel, type ClickHouseSettings, createClient } from "@clickhouse/client";
import { type Env, like, name, optional, required, secret, serverUrl, UsageError } from "../env.ts";
import { type Applied, pendingMigrations } from "../migrations.ts";

export const clickhouseVariables = {
  CLICKHOUSE_URL: required(serverUrl),
  CLICKHOUSE_DATABASE: required(like(/^[A-Za-z_]\w*$/, "may hold letters, digits and _ only")),
  CLICKHOUSE_USER: required(name),
  CLICKHOUSE_PASSWORD: optional(secret, ""),
};
export type ClickHouseEnv = Env<typeof clickhouseVariables>;

/** A client whose unqualified names are those of `database`. */
export function connectClickHouse(env: ClickHouseEnv, database: string = env.CLICKHOUSE_DATABASE): ClickHouseClient {
  return createClient({
    url: env.CLICKHOUSE_URL,
    username: env.CLICKHOUSE_USER,
    password: env.CLICKHOUSE_PASSWORD,
    database,
    application: "etl",
    request_timeout: 120_000,
    keep_alive: { idle_socket_ttl: 2500 },
    log: { level: ClickHouseLogLevel.OFF }, // errors come as errors
  });
}

/** The rows of a SELECT. */
export async function select<T>(client: ClickHouseClient, query: string, parameters: Record<string, unknown> = {}): Promise<T[]> {
  const answer = await client.query({ query, query_params: parameters, format: "JSONEachRow" });
  return await answer.json<T>();
}

/** The files of schemas/clickhouse that were applied to the client's database; none where there is no such database. */
export async function appliedMigrations(client: ClickHouseClient): Promise<Applied[]> {
  const applied = select<Applied>(client, "SELECT file, sha256, toString(applied_at) AS at FROM etl_migrations");
  return await applied.catch((error: Error & { code?: string }) => {
    if (error instanceof ClickHouseError && ["60", "81"].includes(error.code)) return []; // UNKNOWN_TABLE, UNKNOWN_DATABASE
    throw error;
  });
}

/** Names the server in an error of its own, or of the way to it. */
export function nameClickHouse({ CLICKHOUSE_URL: url }: ClickHouseEnv, error: Error): never {
  const next = "Check CLICKHOUSE_USER and CLICKHOUSE_PASSWORD; is it running?";
  throw new Error(`ClickHouse at ${new URL(url).host} (CLICKHOUSE_URL): ${error.message.trim()} ${next}`);
}

/** What schemas/clickhouse makes. */
const objects =
  "sensor_readings sensor_dead_letters sensor_landing sensor_changes sensor_changes_view sensor_readings_view sensor_dead_letters_view";

/**
 * @returns the UUID of sensor_readings.
 * @throws UsageError where a file was not applied, or edited since, or a table or view is gone; Error where ClickHouse does not answer.
 */
export async function checkMigrations(client: ClickHouseClient, env: ClickHouseEnv): Promise<string> {
  const applied = await appliedMigrations(client).catch((error: Error) => nameClickHouse(env, error));
  const where = `ClickHouse's database ${env.CLICKHOUSE_DATABASE}`;
  const [first, ...others] = pendingMigrations("schemas/clickhouse", applied);
  if (first)
    throw new UsageError(
      `${first.folder}/${first.file}${others.length ? ` and ${others.length} more files were` : " was"} not applied to ${where} ` +
        `(CLICKHOUSE_DATABASE). Run: make migrate`,
    );
  const query = "SELECT name, toString(uuid) AS uuid FROM system.tables WHERE database = currentDatabase()";
  const tables = new Map((await select<{ name: string; uuid: string }>(client, query)).map(({ name, uuid }) => [name, uuid]));
  const lost = objects.split(" ").filter((name) => !tables.has(name));
  if (lost.length)
    throw new UsageError(
      `${where} has lost ${lost.join(", ")}, which schemas/clickhouse made. Run there: DROP TABLE etl_migrations, then: make ` +
        `migrate (it applies every file again, and loses no row)`,
    );
  return tables.get("sensor_readings") ?? "";
}

export interface Column {
  name: string;
  type: string;
}
/** LowCardinality(Nullable(String)) → String */
export const plainType = (type: string): string => type.replace(/^LowCardinality\((.*)\)$/, "$1").replace(/^Nullable\((.*)\)$/, "$1");

/** The columns of sensor_readings that are the contract with the source, in their order. */
export async function readingColumns(client: ClickHouseClient): Promise<Column[]> {
  return await select<Column>(
    client,
    `SELECT name, type FROM system.columns
     WHERE database = currentDatabase() AND table = 'sensor_readings' AND NOT startsWith(name, '_') ORDER BY position`,
  );
}

/**
 * Repeats `work` while ClickHouse is away, overloaded or broken, for a minute at most: a consumer that ends is started again.
 * @param onWait gets the error of each attempt that is repeated, and nothing once one of them has succeeded.
 * @throws Error after a minute, with the words of the last attempt.
 */
export async function retryForAMinute<T>(work: () => Promise<T>, onWait: (error?: Error) => void): Promise<T> {
  let last: Error | undefined;
  const attempts = async (): Promise<T> => {
    for (let pause = 250; ; pause = Math.min(5000, 2 * pause))
      try {
        const result = await work();
        if (last) onWait();
        return result;
      } catch (error) {
        last = error as Error;
        onWait(last);
        await delay(pause);
      }
  };
  const { promise: late, reject } = Promise.withResolvers<never>();
  const timer = setTimeout(() => {
    const said = last?.message.trim().slice(0, 300) ?? "no answer at all";
    const next = "Next: make doctor; ops/runbook.md#etlsensorsdown says how to get a dropped table back";
    reject(new Error(`ClickHouse has not taken a batch for 60 s (${said}). It was not committed; the next start reads it again. ${next}`));
  }, 60_000);
  return await Promise.race([attempts(), late]).finally(() => clearTimeout(timer));
}

/** Where a message is, but for its offset. */
export type Place = { topic: string; epoch: number; partition: number };
export type Message = { offset: string; key: Buffer | null; value: Buffer | null };

/**
 * Messages of one partition as RowBinary rows of sensor_landing (schemas/clickhouse/003_sensor_landing.sql): their bytes as they are.
 * A tombstone, whose value is null, is no row.
 */
export function landingRows({ topic, epoch, partition }: Place, messages: Message[]): Buffer {
  const name = Buffer.from(topic);
  const sizes = messages.map(({ key, value }) => (value ? name.length + (key?.length ?? 0) + value.length + 34 : 0));
  const rows = Buffer.allocUnsafe(sizes.reduce((sum, size) => sum + size, 0));
  let at = 0;
  const text = (bytes: Buffer): void => {
    let length = bytes.length;
    for (; length > 127; length >>>= 7) rows[at++] = (length & 127) | 128; // LEB128
    rows[at++] = length;
    at += bytes.copy(rows, at);
  };
  for (const { offset, key, value } of messages) {
    if (!value) continue;
    text(name);
    at = rows.writeUInt16LE(epoch, at);
    at = rows.writeUInt32LE(partition, at);
    at = rows.writeBigUInt64LE(BigInt(offset), at);
    at = rows.writeUInt32LE(0, at);
    at = rows.writeUInt8(key ? 0 : 1, at); // Nullable: 1 is NULL
    if (key) text(key);
    text(value);
  }
  return rows.subarray(0, at);
}

type Rows = Iterable<Buffer> | AsyncIterable<Buffer>;

/** Inserts rows by one insert, which is complete when this resolves. @param into the table, and the format of the rows. */
export async function insertRows(client: ClickHouseClient, into: string, rows: Rows, settings: ClickHouseSettings = {}): Promise<void> {
  const { stream } = await client.exec({
    query: `INSERT INTO ${into}`,
    values: Readable.from(rows, { objectMode: false }),
    // A server's profile may have inserts answered before they are done, or a view's error swallowed.
    clickhouse_settings: { ...settings, async_insert: 0, wait_end_of_query: 1, materialized_views_ignore_errors: 0 },
  });
  for await (const _ of stream); // an answer that is not read keeps its connection
}
