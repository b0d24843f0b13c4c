/**
 * ClickHouse: a client, the record of schemas/clickhouse, retries while a server is away or overloaded, and inserts of raw messages.
 */
import { addAbortListener } from "node:events";
import { Readable } from "node:stream";
import { setTimeout as delay } from "node:timers/promises";
import { type ClickHouseClient, ClickHouseError, ClickHouseLogLevel, createClient } from "@clickhouse/client";
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

/** What schemas/clickhouse makes. */
const objects =
  "sensor_readings sensor_dead_letters sensor_landing sensor_changes sensor_changes_view sensor_readings_view sensor_dead_letters_view";

/** @returns the UUID of sensor_readings. @throws UsageError where a file was not applied, or edited since, or a table or view is gone. */
export async function checkMigrations(client: ClickHouseClient, database: string): Promise<string> {
  const pending = pendingMigrations("schemas/clickhouse", await appliedMigrations(client));
  const [first] = pending;
  if (first)
    throw new UsageError(
      `${first.folder}/${first.file}${pending.length > 1 ? ` and ${pending.length - 1} more files were` : " was"} not ` +
        `applied to ClickHouse's database ${database} (CLICKHOUSE_DATABASE). Run: make migrate`,
    );
  const query = "SELECT name, toString(uuid) AS uuid FROM system.tables WHERE database = currentDatabase()";
  const tables = new Map((await select<{ name: string; uuid: string }>(client, query)).map(({ name, uuid }) => [name, uuid]));
  const lost = objects.split(" ").filter((name) => !tables.has(name));
  if (lost.length)
    throw new UsageError(
      `ClickHouse's database ${database} has lost ${lost.join(", ")}, which schemas/clickhouse made. Run there: DROP ` +
        `TABLE etl_migrations, then: make migrate (it applies every file again, and loses no row)`,
    );
  return tables.get("sensor_readings") ?? "";
}

export interface Column {
  name: string;
  type: string;
}
/** LowCardinality(Nullable(String)) → String */
export const plainType = (type: string): string => type.replace(/^LowCardinality\((.*)\)$/, "$1").replace(/^Nullable\((.*)\)$/, "$1");

/** The columns of sensor_readings that are the contract with the source, in their order. @throws UsageError without the table. */
export async function readingColumns(client: ClickHouseClient): Promise<Column[]> {
  const columns = await select<Column>(
    client,
    `SELECT name, type FROM system.columns
     WHERE database = currentDatabase() AND table = 'sensor_readings' AND NOT startsWith(name, '_') ORDER BY position`,
  );
  if (!columns.length) throw new UsageError("ClickHouse has no table sensor_readings. Run: make migrate");
  return columns;
}

/** Overload, or a server that is starting, stopping or full: names of ClickHouse's src/Common/ErrorCodes.cpp, Postgres's codes. */
const retryable = new RegExp(
  "^(TIMEOUT_EXCEEDED|READONLY|TOO_MANY_SIMULTANEOUS_QUERIES|SOCKET_TIMEOUT|NETWORK_ERROR|ABORTED|MEMORY_LIMIT_EXCEEDED" +
    "|TABLE_IS_READ_ONLY|NOT_ENOUGH_SPACE|TOO_MANY_PARTS|UNKNOWN_STATUS_OF_INSERT|QUERY_WAS_CANCELLED|KEEPER_EXCEPTION|53...|57P0.)$",
);

/** An error that neither server raised is the network's or a proxy's, and can be retried. */
function isRetryable(error: unknown): boolean {
  if (error instanceof ClickHouseError) return retryable.test(error.type ?? "");
  const { name, code } = error as { name?: string; code?: string };
  if (name === "PostgresError") return retryable.test(code ?? "");
  return !(error instanceof TypeError || error instanceof RangeError || error instanceof UsageError);
}

const RETRY_SECONDS = 60;
const uncommitted = "The batch was not committed; the next start reads it again.";

/**
 * Repeats `work` until the server is up and takes it, for a minute at most.
 * @param server for messages.
 * @param onWait gets the error of each attempt that is repeated, and nothing once one of them has succeeded.
 * @throws Error after a minute, of a server that refuses the work, and once `signal` aborts: its reason.
 */
export async function retryUntilUp<T>(
  server: string,
  work: (signal: AbortSignal) => Promise<T>,
  signal: AbortSignal,
  onWait: (server: string, error?: Error) => void,
): Promise<T> {
  const minute = AbortSignal.timeout(RETRY_SECONDS * 1000);
  const over = AbortSignal.any([signal, minute]);
  const aborted = new Promise<never>((_, reject) => void addAbortListener(over, () => reject(over.reason)));
  let last: Error | undefined;
  for (let attempt = 0; ; attempt++)
    try {
      const result = await Promise.race([work(over), aborted]);
      if (last) onWait(server);
      return result;
    } catch (error) {
      signal.throwIfAborted();
      if (minute.aborted)
        throw new Error(
          `${server} has not answered for ${RETRY_SECONDS} s (${last?.message.trim().slice(0, 300) ?? "no answer at all"}). ` +
            `${uncommitted} Next: make doctor`,
        );
      if (!isRetryable(error)) {
        const next = "Next: make doctor; ops/runbook.md#etlsensorsdown says how to get a dropped table back";
        if (error instanceof ClickHouseError)
          error.message = `ClickHouse refused: ${error.message.trim()} (code ${error.code}, ${error.type}). ${uncommitted} ${next}`;
        throw error;
      }
      last = error as Error;
      onWait(server, last);
      await delay(Math.min(5000, 250 * 2 ** attempt), undefined, { signal: over }).catch(() => {});
    }
}

/** Where a message is, but for its offset. */
export type Place = { topic: string; epoch: number; partition: number };
type Message = { offset: string; key: Buffer | null; value: Buffer | null };

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

/**
 * Inserts RowBinary rows by one insert, which is complete when this resolves.
 * @throws ClickHouseError where the server refuses it.
 */
export async function insertRowBinary(client: ClickHouseClient, table: string, rows: Buffer, signal: AbortSignal): Promise<void> {
  const { stream } = await client.exec({
    query: `INSERT INTO ${table} FORMAT RowBinary`,
    values: Readable.from([rows], { objectMode: false }),
    abort_signal: signal,
    // A server's profile may have inserts answered before they are done, or a view's error swallowed.
    clickhouse_settings: { async_insert: 0, wait_end_of_query: 1, materialized_views_ignore_errors: 0 },
  });
  for await (const _ of stream); // an answer that is not read keeps its connection
}
