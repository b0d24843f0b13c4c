// What the pipelines may rely on of the local ClickHouse, its HTTP interface as @clickhouse/client uses it, beyond what the tests of sensors
// use it for.
import assert from "node:assert/strict";
import { createHash } from "node:crypto";
import { request } from "node:http";
import { PassThrough, Readable } from "node:stream";
import { text } from "node:stream/consumers";
import { after, before, test } from "node:test";
import { setTimeout as sleep } from "node:timers/promises";
import {
  type ClickHouseClient,
  type ClickHouseClientConfigOptions,
  ClickHouseError,
  ClickHouseLogLevel,
  createClient,
} from "@clickhouse/client";
import { localEnv } from "./env.ts";

const env = localEnv();
const database = `stack_${createHash("sha256").update(String(process.pid)).digest("hex").slice(0, 8)}`;
const connection = (more: ClickHouseClientConfigOptions = {}): ClickHouseClient =>
  createClient({
    url: env.CLICKHOUSE_URL ?? "",
    username: env.CLICKHOUSE_USER ?? "",
    password: env.CLICKHOUSE_PASSWORD ?? "",
    database,
    log: { level: ClickHouseLogLevel.OFF },
    ...more,
  });
const client = connection();
const command = (query: string) => client.command({ query });
async function count(table: string): Promise<number> {
  const answer = await client.query({ query: `SELECT count() AS n FROM ${table}`, format: "JSONEachRow" });
  return Number((await answer.json<{ n: string }>())[0]?.n);
}

/** Rows of (UInt64, String) as RowBinary. */
function rowBinary(from: number, to: number): Buffer {
  const parts: Buffer[] = [];
  for (let id = from; id < to; id++) {
    const value = Buffer.from(`value ${id}\0`);
    const head = Buffer.alloc(9);
    head.writeBigUInt64LE(BigInt(id));
    head[8] = value.length;
    parts.push(head, value);
  }
  return Buffer.concat(parts);
}

before(async () => {
  const first = connection({ database: "default" });
  await first.command({ query: `CREATE DATABASE ${database}` });
  await first.close();
});
after(async () => {
  await command(`DROP DATABASE ${database}`);
  await client.close();
});

test("errors have ClickHouse's code and type", async () => {
  const code = (type: string, number: string) => (error: unknown) =>
    error instanceof ClickHouseError && error.code === number && error.type === type;
  await assert.rejects(command("SELECT * FROM nowhere"), code("UNKNOWN_TABLE", "60"));
  await assert.rejects(command("SELEC 1"), code("SYNTAX_ERROR", "62"));
  await assert.rejects(command("SELECT 1; SELECT 2"), code("SYNTAX_ERROR", "62"));
  await assert.rejects(connection({ database: "nowhere" }).command({ query: "SELECT 1" }), code("UNKNOWN_DATABASE", "81"));
  await assert.rejects(client.command({ query: "SELECT 1", clickhouse_settings: { nonsense: 1 } }), code("UNKNOWN_SETTING", "115"));
  await assert.rejects(connection({ password: "wrong" }).command({ query: "SELECT 1" }), code("AUTHENTICATION_FAILED", "516"));
  await assert.rejects(connection({ username: "default", password: "" }).command({ query: "SELECT 1" }), /Authentication failed/);
  await assert.rejects(
    client.command({ query: "SELECT count() FROM numbers(1e12)", clickhouse_settings: { max_execution_time: 1 } }),
    code("TIMEOUT_EXCEEDED", "159"),
  );
  const wrong = await fetch(env.CLICKHOUSE_URL ?? "", { method: "POST", body: "SELECT 1" });
  assert.deepEqual([wrong.status, wrong.headers.get("x-clickhouse-exception-code")], [403, "516"]);
  assert.match(await wrong.text(), /^Code: 516\. DB::Exception: default: Authentication failed.*\(AUTHENTICATION_FAILED\)/);
});

test("an insert with a bad row, or cut off in the middle, inserts nothing", async () => {
  await command("CREATE TABLE whole (id UInt64, value String) ENGINE = MergeTree ORDER BY id");
  const lines = Array.from({ length: 200_000 }, (_, id) => `{"id":${id},"value":"v"}\n`);
  const bad = Readable.from([lines.join(""), '{"id": oops}\n'], { objectMode: false });
  await assert.rejects(
    client.exec({ query: "INSERT INTO whole FORMAT JSONEachRow", values: bad }),
    (error: ClickHouseError) => error.code === "27" && /at row 200001/.test(error.message),
  );
  assert.equal(await count("whole"), 0);
  const values = new PassThrough();
  values.write(rowBinary(0, 1000));
  const abort = new AbortController();
  const cut = client.exec({ query: "INSERT INTO whole FORMAT RowBinary", values, abort_signal: abort.signal });
  setTimeout(() => abort.abort(), 200);
  await assert.rejects(cut, /aborted/);
  const credentials = Buffer.from(`${env.CLICKHOUSE_USER}:${env.CLICKHOUSE_PASSWORD}`).toString("base64");
  const url = `${env.CLICKHOUSE_URL}/?database=${database}&query=INSERT%20INTO%20whole%20FORMAT%20RowBinary`;
  const headers = { authorization: `Basic ${credentials}`, "content-length": 1_000_000 };
  const short = request(url, { method: "POST", headers });
  short.on("error", () => {});
  short.write(rowBinary(0, 1000));
  await sleep(200);
  short.destroy();
  await new Promise((resolve) => short.on("close", resolve));
  await sleep(300);
  assert.equal(await count("whole"), 0);
  const none = Readable.from([], { objectMode: false });
  await text((await client.exec({ query: "INSERT INTO whole FORMAT RowBinary", values: none })).stream);
  assert.equal(await count("whole"), 0);
});
