/**
 * ClickHouse: a client, the record of schemas/clickhouse, retries while a server is away or overloaded, and inserts of raw messages.
 */
import { Readable } from "node:stream";
import { setTimeout as delay, setInterval as ticks } from "node:timers/promises";
import { type ClickHouseClient, ClickHouseError, ClickHouseLogLevel, createClient } from "@clickhouse/client";
import { type Env, httpUrl, like, name, optional, required, secret, UsageError } from "../env.ts";
import { type Applied, pendingMigrations, readMigrations } from "../migrations.ts";

export const clickhouseVariables = {
  CLICKHOUSE_URL: required(httpUrl),
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
export async function select<T>(
  client: ClickHouseClient,
  query: string,
  parameters: Record<string, unknown> = {},
): Promise<T[]> {
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

/** @throws UsageError where a file of schemas/clickhouse was not applied, or was edited since, or a table or view of theirs is gone. */
export async function checkMigrations(client: ClickHouseClient, database: string): Promise<void> {
  const applied = await appliedMigrations(client);
  const [first, ...more] = pendingMigrations("schemas/clickhouse", applied);
  if (first)
    throw new UsageError(
      `${first.folder}/${first.file}${more.length ? ` and ${more.length} more files were` : " was"} not applied to ClickHouse's database ${database} (CLICKHOUSE_DATABASE). Run: make migrate`,
    );
  const objects = new Set<string>();
  for (const { sql } of readMigrations("schemas/clickhouse"))
    for (const [, verb, name = ""] of sql.matchAll(/^(CREATE|DROP) [A-Z ]+ EXISTS (\w+)/gm))
      verb === "CREATE" ? objects.add(name) : objects.delete(name);
  for (const { name } of await select<{ name: string }>(client, "SHOW TABLES")) objects.delete(name);
  if (objects.size)
    throw new UsageError(
      `ClickHouse's database ${database} has lost ${[...objects].join(", ")}, which schemas/clickhouse made. Run ` +
        `there: DROP TABLE etl_migrations, then: make migrate (it applies every file again, and loses no row)`,
    );
}

export interface Column {
  name: string;
  type: string;
}
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

/** Overload, or a server that is starting, stopping or full: names of ClickHouse's src/Common/ErrorCodes.cpp. */
const retryable = new RegExp(
  "^(TIMEOUT_EXCEEDED|READONLY|TOO_MANY_SIMULTANEOUS_QUERIES|SOCKET_TIMEOUT|NETWORK_ERROR|ABORTED|MEMORY_LIMIT_EXCEEDED|TABLE_IS_READ_ONLY" +
    "|NOT_ENOUGH_SPACE|TOO_MANY_PARTS|UNKNOWN_STATUS_OF_INSERT|QUERY_WAS_CANCELLED|KEEPER_EXCEPTION)$",
);

/** An error that ClickHouse did not raise is the network's or a proxy's, and can be retried. */
function isRetryable(error: unknown): boolean {
  if (error instanceof ClickHouseError) return retryable.test(error.type ?? "");
  return !(error instanceof TypeError || error instanceof RangeError || error instanceof UsageError);
}

const RETRY_SECONDS = 60;

/**
 * Repeats `work` until the server is up and takes it, for a minute at most; `heartbeat` is called each second meanwhile.
 * @param onWait gets the error of each attempt that is repeated, and nothing once one of them has succeeded.
 * @throws Error after a minute, of a server that refuses the work, of `heartbeat`, and once `signal` aborts.
 */
export async function retryUntilUp<T>(
  work: (signal: AbortSignal) => Promise<T>,
  heartbeat: () => Promise<void>,
  signal: AbortSignal,
  onWait: (error?: Error) => void,
): Promise<T> {
  const [end, minute] = [new AbortController(), AbortSignal.timeout(RETRY_SECONDS * 1000)];
  const over = AbortSignal.any([signal, minute, end.signal]);
  let last: Error | undefined;
  const attempts = async (): Promise<T> => {
    for (let attempt = 0; ; attempt++)
      try {
        const result = await work(over);
        if (last) onWait();
        return result;
      } catch (error) {
        if (over.aborted || !isRetryable(error)) throw refused(error);
        last = error as Error;
        onWait(last);
        await delay(Math.min(5000, 250 * 2 ** attempt), undefined, { signal: over });
      }
  };
  const heartbeats = async (): Promise<never> => {
    for await (const _ of ticks(1000, undefined, { signal: over })) await heartbeat();
    throw over.reason;
  };
  try {
    return await Promise.race([attempts(), heartbeats()]);
  } catch (error) {
    if (!minute.aborted || signal.aborted) throw error;
    throw new Error(
      `ClickHouse has not answered for ${RETRY_SECONDS} s ` +
        `(${last?.message.trim().slice(0, 300) || "no answer at all"}). What was not inserted is not committed; the ` +
        `next start reads it again. Next: make doctor`,
    );
  } finally {
    end.abort();
  }
}

function refused(error: unknown): unknown {
  if (!(error instanceof ClickHouseError)) return error;
  return new Error(
    `ClickHouse refused: ${error.message.trim()} (code ${error.code}, ${error.type}). The batch was not ` +
      "committed; the next start reads it again. Next: make doctor; ops/runbook.md#etlsensorsdown says how to get a " +
      `dropped table back`,
    { cause: error },
  );
}

/**
 * Messages of one partition as RowBinary rows of sensor_landing (schemas/clickhouse/003_sensor_landing.sql): their bytes as they are.
 * A tombstone, whose value is null, is no row.
 */
export function landingRows(
  { topic, epoch, partition }: { topic: string; epoch: number; partition: number },
  messages: { offset: string; key: Buffer | null; value: Buffer | null }[],
): Buffer {
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
export async function insertRowBinary(
  client: ClickHouseClient,
  table: string,
  rows: Buffer,
  signal: AbortSignal,
): Promise<void> {
  const { stream } = await client.exec({
    query: `INSERT INTO ${table} FORMAT RowBinary`,
    values: Readable.from([rows], { objectMode: false }),
    abort_signal: signal,
    // A server's profile may have inserts answered before they are done, or a view's error swallowed.
    clickhouse_settings: { async_insert: 0, wait_end_of_query: 1, materialized_views_ignore_errors: 0 },
  });
  for await (const _ of stream); // an answer that is not read keeps its connection
}
