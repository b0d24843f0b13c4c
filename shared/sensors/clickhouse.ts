/**
 * ClickHouse: inserts that wait out a server that is away, and the committed definitions of schemas/clickhouse.
 */
import { readdirSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { Readable } from "node:stream";
import { setTimeout as delay } from "node:timers/promises";
import { type ClickHouseClient, ClickHouseError, ClickHouseLogLevel, createClient } from "@clickhouse/client";
import { type Env, httpUrl, like, name, optional, required, root, secret, UsageError } from "../env.ts";

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

/** Where the database is not what the definitions say. */
interface Difference {
  /** In words: expected, found. Undefined where it is no difference to a consumer. */
  fault: string | undefined;
  /** What brings it there and loses nothing, in words and as a statement. Undefined where that is a person's to decide. */
  remedy: string | undefined;
  query: string;
}

/** In the order of the definitions' numbers: what a view reads and writes comes before it. */
async function compareDefinitions(client: ClickHouseClient, database: string): Promise<Difference[]> {
  const differences: Difference[] = [];
  const differ = (fault: string | undefined, remedy?: string, query = ""): void =>
    void differences.push({ fault, remedy, query });
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
  for (const { name: table, file, kind, statement, stores, columns: wanted, select: query, ttl } of readDefinitions()) {
    const at = `${database}.${table}`;
    const there = tables.find(({ name }) => name === table);
    if (!there) differ(`${at} is not there (${file})`, `create ${kind} ${at}`, statement);
    else if (kind === "view") {
      if ((await canonical(client, query)) !== (await canonical(client, there.as_select, database)))
        differ(
          `view ${at}: its SELECT is not that of ${file}`,
          `replace the SELECT of view ${at}`,
          `ALTER TABLE ${table} MODIFY QUERY\n${query}`,
        );
    } else {
      if (ttl && ttlOf(there.engine_full) !== ttl)
        differ(undefined, `keep rows of ${at} until ${ttl}`, `ALTER TABLE ${table} MODIFY TTL ${ttl}`);
      const actual = columns.filter((column) => column.table === table);
      for (const { name, type } of wanted) {
        const found = actual.find((column) => column.name === name)?.type;
        const fault = `column ${at}.${name}: expected ${type} (${file}), found ${found ?? "no such column"}`;
        // New columns come last: tables and views bind them by name.
        if (found === undefined)
          differ(fault, `add column ${at}.${name} ${type}`, `ALTER TABLE ${table} ADD COLUMN ${name} ${type}`);
        else if (found !== type && !stores)
          differ(fault, `change column ${at}.${name} ${type}`, `ALTER TABLE ${table} MODIFY COLUMN ${name} ${type}`);
        else if (found !== type) differ(fault);
      }
      for (const { name } of actual)
        if (!wanted.some((column) => column.name === name))
          differ(`column ${at}.${name}: is there, but ${file} has no such column`);
    }
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
  const differences = await compareDefinitions(client, database).catch((error: Error) => {
    if ((error as ClickHouseError).code !== "81") throw error;
    throw new UsageError(`ClickHouse has no database ${database} (CLICKHOUSE_DATABASE). Run: make migrate`);
  });
  const faults = differences.flatMap(({ fault }) => fault ?? []);
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
    const create = { query: `CREATE DATABASE IF NOT EXISTS ${database}` };
    if (!there) await apply(`create database ${database}`, () => server.command(create));
    const differences = await compareDefinitions(server, database);
    for (const { remedy, query } of differences) if (remedy) await apply(remedy, () => client.command({ query }));
    return differences.flatMap(({ fault, remedy }) => (remedy ? [] : (fault ?? [])));
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
