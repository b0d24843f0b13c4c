// What the pipelines may rely on of the local ClickHouse: its HTTP interface as @clickhouse/client uses it.
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
async function rows<T>(query: string, query_params: Record<string, unknown> = {}): Promise<T[]> {
  const answer = await client.query({ query, query_params, format: "JSONEachRow" });
  return answer.json<T>();
}
const count = async (table: string): Promise<number> =>
  Number((await rows<{ n: string }>(`SELECT count() AS n FROM ${table}`))[0]?.n);

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

test("it pings, also through a query, and has the database of the request", async () => {
  assert.equal((await client.ping()).success, true);
  assert.equal((await client.ping({ select: true })).success, true);
  assert.deepEqual(await rows("SELECT currentDatabase() AS d"), [{ d: database }]);
});

test("rows go in as JSON, as a stream, gzipped, as RowBinary, and come back", async () => {
  await command("CREATE TABLE t (id UInt64, value String) ENGINE = MergeTree ORDER BY id");
  const values = Array.from({ length: 1000 }, (_, id) => ({ id, value: `'"\\\n\t\0é ${id}` }));
  const { summary } = await client.insert({ table: "t", values, format: "JSONEachRow" });
  assert.equal(summary?.written_rows, "1000");
  assert.deepEqual(await rows("SELECT * FROM t WHERE id = 7"), [{ id: 7, value: `'"\\\n\t\0é 7` }]);
  await client.insert({ table: "t", values: Readable.from(values), format: "JSONEachRow", columns: ["id", "value"] });
  const zipped = connection({ compression: { request: true, response: true } });
  await zipped.insert({ table: "t", values, format: "JSONEachRow" });
  const answer = await zipped.query({ query: "SELECT count() AS n FROM t", format: "JSON" });
  assert.deepEqual((await answer.json<{ n: string }>()).data, [{ n: 3000 }]);
  await zipped.close();
  const { stream, summary: sum } = await client.exec({
    query: "INSERT INTO t FORMAT RowBinary",
    values: Readable.from([rowBinary(5000, 5500), rowBinary(5500, 6000)], { objectMode: false }),
    clickhouse_settings: { max_insert_threads: "1" },
  });
  assert.equal(await text(stream), "");
  assert.equal(sum?.written_rows, "1000");
  assert.deepEqual(await rows("SELECT value FROM t WHERE id = 5999"), [{ value: "value 5999\0" }]);
  await command("INSERT INTO t VALUES (9000, 'a;b'), (9001, 'c')");
  await command("INSERT INTO t SELECT number, 'x' FROM numbers(10)");
  assert.equal(await count("t"), 4012);
});

test("5 MB strings pass", async () => {
  await command("CREATE TABLE large (s String) ENGINE = MergeTree ORDER BY ()");
  const s = "x\0".repeat(2_500_000);
  await client.insert({ table: "large", values: [{ s }, { s }], format: "JSONEachRow" });
  assert.deepEqual(await rows("SELECT count() AS n, min(length(s)) AS l FROM large"), [{ n: 2, l: 5_000_000 }]);
});

test("parameters and settings are the query's own, however many run at once", async () => {
  const tricky = "a'b\\c\n\t{x:String} é";
  assert.deepEqual(await rows("SELECT {x:String} AS x, {n:Nullable(UInt8)} AS n", { x: tricky, n: null }), [
    { x: tricky, n: null },
  ]);
  const seen = await Promise.all(
    Array.from({ length: 50 }, async (_, i) => {
      const query = "SELECT {i:UInt32} AS i, getSetting('max_threads') AS t, sleep(0.01) AS s";
      const settings = { max_threads: (i % 4) + 1 };
      const answer = await client.query({
        query,
        query_params: { i },
        clickhouse_settings: settings,
        format: "JSONEachRow",
      });
      const [row] = await answer.json<{ i: number; t: number }>();
      return row?.i === i && row.t === (i % 4) + 1;
    }),
  );
  assert.ok(seen.every(Boolean));
});

test("errors have ClickHouse's code and type", async () => {
  const code = (type: string, number: string) => (error: unknown) =>
    error instanceof ClickHouseError && error.code === number && error.type === type;
  await assert.rejects(command("SELECT * FROM nowhere"), code("UNKNOWN_TABLE", "60"));
  await assert.rejects(command("SELEC 1"), code("SYNTAX_ERROR", "62"));
  await assert.rejects(command("SELECT 1; SELECT 2"), code("SYNTAX_ERROR", "62"));
  await assert.rejects(
    connection({ database: "nowhere" }).command({ query: "SELECT 1" }),
    code("UNKNOWN_DATABASE", "81"),
  );
  await assert.rejects(
    client.command({ query: "SELECT 1", clickhouse_settings: { nonsense: 1 } }),
    code("UNKNOWN_SETTING", "115"),
  );
  await assert.rejects(
    connection({ password: "wrong" }).command({ query: "SELECT 1" }),
    code("AUTHENTICATION_FAILED", "516"),
  );
  await assert.rejects(
    connection({ username: "default", password: "" }).command({ query: "SELECT 1" }),
    /Authentication failed/,
  );
  await assert.rejects(
    client.command({ query: "SELECT count() FROM numbers(1e12)", clickhouse_settings: { max_execution_time: 1 } }),
    code("TIMEOUT_EXCEEDED", "159"),
  );
  const wrong = await fetch(env.CLICKHOUSE_URL ?? "", { method: "POST", body: "SELECT 1" });
  assert.deepEqual([wrong.status, wrong.headers.get("x-clickhouse-exception-code")], [403, "516"]);
  assert.match(
    await wrong.text(),
    /^Code: 516\. DB::Exception: default: Authentication failed.*\(AUTHENTICATION_FAILED\)/,
  );
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

test("what the schema needs: Null, views into a deduplicating table, a swap of tables, system tables", async () => {
  await command("CREATE TABLE raw (key UInt64, version UInt64, deleted UInt8, value String) ENGINE = Null");
  const target = "(key UInt64, value String, _version UInt64, _deleted UInt8)";
  await command(`CREATE TABLE latest ${target} ENGINE = ReplacingMergeTree(_version, _deleted) ORDER BY key`);
  const select = "SELECT key, value, version AS _version, deleted AS _deleted FROM raw";
  await command(`CREATE MATERIALIZED VIEW to_latest TO latest AS ${select}`);
  await command("INSERT INTO raw VALUES (1, 2, 0, 'new'), (2, 1, 0, 'x')");
  await command("INSERT INTO raw VALUES (1, 1, 0, 'old'), (2, 2, 1, '')");
  assert.deepEqual(await rows("SELECT key, value FROM latest FINAL"), [{ key: 1, value: "new" }]);
  await command(`CREATE TABLE other ${target} ENGINE = ReplacingMergeTree(_version, _deleted) ORDER BY key`);
  await command("EXCHANGE TABLES latest AND other");
  await command("INSERT INTO raw VALUES (3, 1, 0, 'after')");
  assert.deepEqual(await rows("SELECT key, value FROM latest"), [{ key: 3, value: "after" }]);
  await command("SYSTEM STOP MERGES other");
  await command("SYSTEM START MERGES other");
  await command("OPTIMIZE TABLE other FINAL");
  assert.deepEqual(
    await rows("SELECT count() AS n FROM system.parts WHERE database = {d:String} AND table = 'other' AND active", {
      d: database,
    }),
    [{ n: 1 }],
  );
  const [shown] = await rows<{ statement: string }>("SHOW CREATE TABLE latest");
  assert.match(shown?.statement ?? "", /ReplacingMergeTree\(_version, _deleted\)/);
});

test("a session keeps its temporary tables; another does not see them", async () => {
  const mine = connection({ session_id: database });
  await mine.command({ query: "CREATE TEMPORARY TABLE mine (x UInt8)" });
  await mine.command({ query: "INSERT INTO mine VALUES (1)" });
  const answer = await mine.query({ query: "SELECT * FROM mine", format: "JSONEachRow" });
  assert.deepEqual(await answer.json(), [{ x: 1 }]);
  await assert.rejects(command("SELECT * FROM mine"), { code: "60" });
  await mine.close();
});

test("long queries neither block each other nor the ping, and a client that goes away harms nothing", async () => {
  const long = { query: "SELECT sum(sleepEachRow(0.5)) FROM numbers(4) SETTINGS max_block_size = 1" };
  const given = connection({ request_timeout: 300 });
  await assert.rejects(given.command(long), /Timeout/);
  await given.close();
  const started = Date.now();
  const many = Array.from({ length: 9 }, () => client.command(long));
  await sleep(100);
  const asked = Date.now();
  assert.equal((await client.ping()).success, true);
  assert.ok(Date.now() - asked < 500);
  await Promise.all(many);
  assert.ok(Date.now() - started < 10_000); // 18 s one after the other
});
