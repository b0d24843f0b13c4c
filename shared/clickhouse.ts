/**
 * ClickHouse: inserts that wait out a server that is away, and the committed definitions of schemas/clickhouse.
 */
import { readdirSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { Readable } from "node:stream";
import { setTimeout as delay } from "node:timers/promises";
import { type ClickHouseClient, ClickHouseError, ClickHouseLogLevel, createClient } from "@clickhouse/client";
import { type Env, root, UsageError } from "./env.ts";

type ClickHouseEnv = Env<"CLICKHOUSE_URL" | "CLICKHOUSE_DATABASE" | "CLICKHOUSE_USER" | "CLICKHOUSE_PASSWORD">;

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

/** Overload, or a server that is starting, stopping or full: codes of ClickHouse's src/Common/ErrorCodes.cpp. */
const passing: Record<string, string> = {
  159: "TIMEOUT_EXCEEDED",
  164: "READONLY",
  202: "TOO_MANY_SIMULTANEOUS_QUERIES",
  209: "SOCKET_TIMEOUT",
  210: "NETWORK_ERROR",
  236: "ABORTED",
  241: "MEMORY_LIMIT_EXCEEDED",
  242: "TABLE_IS_READ_ONLY",
  243: "NOT_ENOUGH_SPACE",
  252: "TOO_MANY_PARTS",
  319: "UNKNOWN_STATUS_OF_INSERT",
  394: "QUERY_WAS_CANCELLED",
  999: "KEEPER_EXCEPTION",
};

/**
 * Whether the server is away or overloaded, so that the same request will be answered later. What is no answer of ClickHouse's own
 * comes from the network or from a proxy before it.
 */
function isPassing(error: unknown): boolean {
  if (error instanceof ClickHouseError) return error.code in passing;
  return !(error instanceof TypeError || error instanceof RangeError || error instanceof UsageError);
}

/**
 * Does `work` again until the server answers, for as long as it takes; in between and meanwhile `beat` is called each second.
 * @throws Error of a server that answers with any other error, of `beat`, and once `signal` aborts.
 */
export async function waitOut<T>(
  work: (signal: AbortSignal) => Promise<T>,
  beat: () => Promise<void>,
  signal: AbortSignal,
  onWait: (error?: Error) => void,
): Promise<T> {
  for (let attempt = 0; ; attempt++) {
    const stop = new AbortController();
    const all = AbortSignal.any([signal, stop.signal]);
    try {
      const result = await beating(work(all), beat, all);
      if (attempt) onWait();
      return result;
    } catch (error) {
      stop.abort(); // nothing of this attempt goes on beside the next
      if (signal.aborted || !isPassing(error)) throw refused(error);
      onWait(error as Error);
      await beating(delay(Math.min(5000, 250 * 2 ** attempt), undefined, { signal }), beat, signal);
    }
  }
}

function refused(error: unknown): unknown {
  if (!(error instanceof ClickHouseError)) return error;
  return new Error(
    `ClickHouse refused: ${error.message.trim()} (code ${error.code}, ${error.type}). Nothing of this batch was committed. Mend it (make migrate creates what is missing), then start the consumer again`,
    { cause: error },
  );
}

async function beating<T>(work: Promise<T>, beat: () => Promise<void>, signal: AbortSignal): Promise<T> {
  const end = new AbortController();
  const either = AbortSignal.any([signal, end.signal]);
  const beats = async (): Promise<never> => {
    for (;;) {
      await delay(1000, undefined, { signal: either });
      await beat();
    }
  };
  return await Promise.race([work, beats()]).finally(() => end.abort());
}

/** A definition in schemas/clickhouse: one object a file, in the order of their numbers. */
export interface Definition {
  /** From the project's root, for messages. */
  file: string;
  name: string;
  kind: "table" | "view";
  statement: string;
  /** Engine Null: nothing in it can be lost. */
  stores: boolean;
  /** Of a table: its columns as ClickHouse writes them. */
  columns: { name: string; type: string }[];
  /** Of a view: its SELECT. */
  select: string;
  /** Of a table: when its rows go, as ClickHouse writes it, or "". */
  ttl: string;
}

export function readDefinitions(): Definition[] {
  return readdirSync(join(root, "schemas/clickhouse"))
    .filter((entry) => entry.endsWith(".sql"))
    .sort()
    .map((entry) => {
      const file = `schemas/clickhouse/${entry}`;
      const statement = readFileSync(join(root, file), "utf8").replace(/;\s*$/, "");
      const [, view, name = ""] = /^CREATE (?:TABLE|(MATERIALIZED VIEW)) (\w+)/m.exec(statement) ?? [];
      if (!name)
        throw new UsageError(`${JSON.stringify(file)} must be CREATE TABLE NAME or CREATE MATERIALIZED VIEW NAME`);
      const body = /\(\n(.*?)\n\)\n/s.exec(statement)?.[1] ?? "";
      const columns = view ? [] : [...body.matchAll(/^ {2}(\w+) (.+?),?$/gm)];
      return {
        file,
        name,
        kind: view ? "view" : "table",
        stores: !/^ENGINE = Null$/m.test(statement),
        statement,
        columns: columns.map(([, column = "", type = ""]) => ({ name: column, type })),
        select: view ? statement.replace(/^.*?\bAS\n/s, "") : "",
        ttl: ttlOf(statement),
      };
    });
}

const ttlOf = (statement: string): string => /\bTTL (.+?)(?=\n|$| SETTINGS )/.exec(statement)?.[1] ?? "";

/** What the database has and the definitions say otherwise. */
interface Differences {
  missing: Definition[];
  /** Columns that the table has not, or, in one that stores nothing, of another type. */
  added: { definition: Definition; name: string; type: string; found?: string | undefined }[];
  /** Views whose SELECT is another. */
  changed: Definition[];
  /** Tables whose rows go at another time, or never. It is no difference to a consumer. */
  kept: Definition[];
  /** In words: column, expected, found. Nothing that a command may decide. */
  refused: string[];
}

async function compareDefinitions(client: ClickHouseClient, database: string): Promise<Differences> {
  const differences: Differences = { missing: [], added: [], changed: [], kept: [], refused: [] };
  const tables = await select<{ name: string; as_select: string; engine_full: string }>(
    client,
    "SELECT name, as_select, engine_full FROM system.tables WHERE database = {database: String}",
    { database },
  );
  const columns = await select<{ table: string; name: string; type: string }>(
    client,
    "SELECT table, name, type FROM system.columns WHERE database = {database: String}",
    { database },
  );
  for (const definition of readDefinitions()) {
    const { name: table, file, kind } = definition;
    const there = tables.find(({ name }) => name === table);
    if (!there) {
      differences.missing.push(definition);
      continue;
    }
    if (kind === "view") {
      if ((await canonical(client, definition.select)) !== (await canonical(client, there.as_select, database)))
        differences.changed.push(definition);
      continue;
    }
    if (definition.ttl && ttlOf(there.engine_full) !== definition.ttl) differences.kept.push(definition);
    const actual = columns.filter((column) => column.table === table);
    for (const { name, type } of definition.columns) {
      const found = actual.find((column) => column.name === name)?.type;
      if (found === undefined || (found !== type && !definition.stores))
        differences.added.push({ definition, name, type, found });
      else if (found !== type)
        differences.refused.push(`column ${database}.${table}.${name}: expected ${type} (${file}), found ${found}`);
    }
    for (const { name } of actual)
      if (!definition.columns.some((column) => column.name === name))
        differences.refused.push(`column ${database}.${table}.${name}: is there, but ${file} has no such column`);
  }
  return differences;
}

/** A SELECT in ClickHouse's own writing; system.tables has it so, with the database before each table's name. */
async function canonical(client: ClickHouseClient, query: string, database?: string): Promise<string> {
  const [row] = await select<{ text: string }>(client, "SELECT formatQuerySingleLine({query: String}) AS text", {
    query,
  });
  const text = row?.text ?? "";
  return database === undefined
    ? text
    : text.replaceAll(`FROM ${database}.`, "FROM ").replaceAll(`FROM \`${database}\`.`, "FROM ");
}

/**
 * @throws UsageError that lists every difference between the database and schemas/clickhouse.
 */
export async function checkDefinitions(client: ClickHouseClient, database: string): Promise<void> {
  const { missing, added, changed, refused } = await compareDefinitions(client, database).catch((error: Error) => {
    if ((error as ClickHouseError).code !== "81") throw error;
    throw new UsageError(`ClickHouse has no database ${database} (CLICKHOUSE_DATABASE). Run: make migrate`);
  });
  const faults = [
    ...missing.map(({ file, name }) => `${database}.${name} is not there (${file})`),
    ...added.map(
      ({ definition, name, type, found }) =>
        `column ${database}.${definition.name}.${name}: expected ${type} (${definition.file}), found ${found ?? "no such column"}`,
    ),
    ...changed.map(({ file, name }) => `view ${database}.${name}: its SELECT is not that of ${file}`),
    ...refused,
  ];
  if (!faults.length) return;
  throw new UsageError(
    `ClickHouse differs from schemas/clickhouse, nothing was moved:\n${faults.map((fault) => `  ${fault}`).join("\n")}\nRun: make migrate. What it refuses is yours to decide; README, "When the schema changes".`,
  );
}

/**
 * Brings a database to the definitions, by what loses nothing: it creates what is missing, adds columns, and replaces a view's
 * SELECT at one instant. A view is never dropped: what is inserted before it is there again would be lost.
 * @returns what it refuses, in words.
 */
export async function migrateClickHouse(
  env: ClickHouseEnv,
  database: string,
  apply: (what: string, work: () => Promise<unknown>) => Promise<void>,
): Promise<string[]> {
  await using server = connectClickHouse(env, "default");
  await using client = connectClickHouse(env, database);
  try {
    const [there] = await select(server, "SELECT name FROM system.databases WHERE name = {database: String}", {
      database,
    });
    if (!there)
      await apply(`create database ${database}`, () =>
        server.command({ query: `CREATE DATABASE IF NOT EXISTS ${database}` }),
      );
    const { missing, added, changed, kept, refused } = await compareDefinitions(server, database);
    for (const { definition, name, type, found } of added) {
      // New columns come last: tables and views bind them by name.
      const query = `ALTER TABLE ${definition.name} ${found ? "MODIFY" : "ADD"} COLUMN ${name} ${type}`;
      await apply(`${found ? "change" : "add"} column ${database}.${definition.name}.${name} ${type}`, () =>
        client.command({ query }),
      );
    }
    for (const { name, ttl } of kept)
      await apply(`keep rows of ${database}.${name} until ${ttl}`, () =>
        client.command({ query: `ALTER TABLE ${name} MODIFY TTL ${ttl}` }),
      );
    for (const { kind, name, statement } of missing)
      await apply(`create ${kind} ${database}.${name}`, () => client.command({ query: statement }));
    for (const { name, select } of changed)
      await apply(`replace the SELECT of view ${database}.${name}`, () =>
        client.command({ query: `ALTER TABLE ${name} MODIFY QUERY\n${select}` }),
      );
    return refused;
  } catch (error) {
    if (error instanceof ClickHouseError || error instanceof UsageError) throw error;
    const { host } = new URL(env.CLICKHOUSE_URL);
    throw new Error(
      `ClickHouse at ${host} (CLICKHOUSE_URL) does not answer: ${(error as Error).message}. For the local stack: make up`,
    );
  }
}

/**
 * Messages of one partition as RowBinary rows of sensor_landing (schemas/clickhouse/3_sensor_landing.sql): their bytes as they are.
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
 * One insert of RowBinary rows, which is there as a whole when this resolves.
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
