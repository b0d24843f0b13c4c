/**
 * make bench: what the sensors pipeline does. MESSAGES= (default 2,000,000) envelopes from Kafka into ClickHouse beside
 * kcat | split | curl into the same insert, RUNS= (default 3) of each, interleaved; then for SECONDS= (default 60) at 139 rows/s the
 * time from a commit to its queryable row. PARTS=throughput,latency does one of them. Absolute figures are this machine's.
 */
import { spawn } from "node:child_process";
import { once } from "node:events";
import { globSync } from "node:fs";
import { join } from "node:path";
import { Readable } from "node:stream";
import { pipeline } from "node:stream/promises";
import { setTimeout as delay } from "node:timers/promises";
import type { ClickHouseClient } from "@clickhouse/client";
import type { Sql } from "postgres";
import { thousands } from "../../shared/log.ts";
import { table } from "../../shared/table.ts";
import { createSensors } from "../lib/sensors.ts";
import { until } from "../lib/shop.ts";
import { debianPath } from "../stack/debian.ts";
import { localEnv, root } from "../stack/env.ts";
import { kcat } from "../stack/kcat.ts";
import { say } from "../stack/stack.ts";
import { compare, type Measured, measure, percentile } from "./measure.ts";

const messages = Number(process.env.MESSAGES ?? 2_000_000);
const seconds = Number(process.env.SECONDS ?? 60);
const parts = (process.env.PARTS ?? "throughput,latency").split(",");
/** 500,000 an hour. */
const rowsPerSecond = 139;

// 1. Throughput

async function throughput(): Promise<void> {
  const templates = await realMessages();
  await using bench = await createSensors({ connector: false, partitions: 3 });
  const { shop, topic, admin } = bench;
  const ours = shop.env.CLICKHOUSE_DATABASE ?? "";
  await using floor = {
    name: `${ours}_floor`,
    [Symbol.asyncDispose]: () => dropDatabase(shop.clickhouse, `${ours}_floor`),
  };
  await shop.succeed("scripts/ops/migrate.ts", { CLICKHOUSE_DATABASE: floor.name });
  say(`bench: writing ${thousands(messages)} envelopes`);
  const expected = { rows: 0, ids: 0, bytes: 0 };
  await produce(topic, envelopes(templates, expected));
  say(`bench: written; ${Math.round(expected.bytes / messages)} bytes each`);

  /** Runs it, proves that it read everything, and makes it forget. */
  const checked = async (database: string, run: Promise<Measured>): Promise<Measured> => {
    const measured = await run;
    await check(shop.clickhouse, database, expected);
    await shop.clickhouse.command({ query: `TRUNCATE TABLE ${database}.sensor_readings` });
    await shop.admin`delete from etl.topic_offsets where topic = ${topic}`;
    await shop.admin`delete from etl.topics where topic = ${topic}`;
    await admin.deleteGroups([shop.env.SENSORS_GROUP ?? ""]).catch(() => {}); // there is none yet
    return measured;
  };
  await compare("sensors", messages, [
    {
      by: "kcat | split | curl",
      run: () => checked(floor.name, measure({ command: "bash", args: ["-c", floorScript], env: floorEnv(topic, floor.name) })),
    },
    {
      by: "ours",
      run: () =>
        checked(
          ours,
          measure({
            command: process.execPath,
            args: [join(root, "scripts/sensors.ts")],
            env: { ...shop.env, UNTIL: "caught-up" },
          }),
        ),
    },
  ]);
}

const dropDatabase = async (client: ClickHouseClient, name: string): Promise<void> =>
  void (await client.command({ query: `DROP DATABASE IF EXISTS ${name}` }));

/** Every message became what it says: as many rows with FINAL as are left, and no dead letter. */
async function check(client: ClickHouseClient, database: string, expected: { rows: number; ids: number }): Promise<void> {
  const answer = await client.query({
    query: `SELECT toFloat64(count()) AS rows, toFloat64(sum(id)) AS ids, (SELECT toFloat64(count()) FROM ${database}.sensor_dead_letters) AS dead FROM ${database}.sensor_readings FINAL`,
    format: "JSONEachRow",
  });
  const [found] = await answer.json<{ rows: number; ids: number; dead: number }>();
  if (found?.rows !== expected.rows || found.ids !== expected.ids || found.dead !== 0)
    throw new Error(`${database} has ${JSON.stringify(found)}, not ${JSON.stringify(expected)} and no dead letter`);
}

/**
 * The floor. JSON has neither raw tabs nor raw newlines, so what kcat prints is TabSeparatedRaw as it is: no program between the broker and
 * ClickHouse looks at a message. split starts one curl for as many lines as `make sensors` has in an insert, and kcat fetches ahead.
 */
const floorScript = `set -o pipefail
LD_LIBRARY_PATH="$KCAT_LIBRARIES" "$KCAT" -q -C -e -b "$BROKER" -t "$TOPIC" -o beginning -f "$TOPIC\\t1\\t%p\\t%o\\t0\\t%k\\t%s\\n" |
  split --lines=10000 --filter='curl -sSf --user "$LOGIN" -H "content-type: text/plain" --data-binary @- "$URL"'`;

const kcatEnv = (): NodeJS.ProcessEnv => ({
  PATH: process.env.PATH,
  KCAT: debianPath("kcat", "usr/bin/kcat"),
  KCAT_LIBRARIES: globSync(debianPath("kcat", "usr/lib/*-linux-gnu"))[0],
  BROKER: localEnv().KAFKA_BROKERS,
});

function floorEnv(topic: string, database: string): NodeJS.ProcessEnv {
  const { CLICKHOUSE_URL = "", CLICKHOUSE_USER, CLICKHOUSE_PASSWORD } = localEnv();
  const url = new URL(CLICKHOUSE_URL);
  url.searchParams.set("database", database);
  url.searchParams.set("query", "INSERT INTO sensor_landing FORMAT TabSeparatedRaw");
  return {
    ...kcatEnv(),
    TOPIC: topic,
    URL: url.href,
    LOGIN: `${CLICKHOUSE_USER}:${CLICKHOUSE_PASSWORD}`,
  };
}

/** What Debezium writes of an insert, an update and a delete. */
async function realMessages(): Promise<Record<"c" | "u" | "d", string>> {
  await using sensors = await createSensors();
  const { shop, topic } = sensors;
  await shop.admin`insert into sensor_readings (id, sensor_id, metric, value, recorded_at) values (1, 'JFK', 'temp', 39.02, '2024-01-01T00:00:00.123456Z')`;
  await shop.admin`update sensor_readings set value = 41.5`;
  await shop.admin`delete from sensor_readings`;
  return await until("an insert, an update and a delete are in the topic", async () => {
    const lines = (await kcat(shop.env, "-C", "-e", "-t", topic)).split("\n");
    const [c, u, d] = ["c", "u", "d"].map((op) => lines.find((line) => line.includes(`"op":"${op}"`)));
    return c && u && d ? { c, u, d } : undefined;
  });
}

/**
 * Messages as lines of key, tab, envelope, in pieces of some 100 KB: of each 20, 17 insert, two update and one deletes rows that
 * were inserted just before. `sum` gets the rows that are left.
 */
function* envelopes(templates: Record<"c" | "u" | "d", string>, sum: { rows: number; ids: number; bytes: number }): Generator<string> {
  const start = Date.UTC(2024, 0, 1);
  const metrics = ["temp", "dewp", "humid", "wind_dir", "wind_speed", "wind_gust", "precip", "pressure", "visib"];
  const row = (id: number, value: number): string => {
    const at = new Date(start + id * 7).toISOString().replace("Z", `${String(id % 1000).padStart(3, "0")}Z`);
    return `{"id":${id},"sensor_id":"${["JFK", "LGA", "EWR"][id % 3]}","metric":"${metrics[id % 9]}","value":${value},"recorded_at":"${at}"}`;
  };
  const fill = { c: filler(templates.c), u: filler(templates.u), d: filler(templates.d) };
  let text = "";
  for (let n = 0; n < messages; n++) {
    const [block, turn] = [Math.floor(n / 20), n % 20];
    const op = turn < 17 ? "c" : turn < 19 ? "u" : "d";
    const id = block * 17 + 1 + (turn % 17);
    const value = (id % 9999) / 100;
    const line = fill[op](n, op === "c" ? "null" : row(id, value), op === "d" ? "null" : row(id, op === "u" ? value + 1 : value));
    if (op === "c" || op === "d") {
      sum.rows += op === "c" ? 1 : -1;
      sum.ids += op === "c" ? id : -id;
    }
    sum.bytes += line.length;
    text += `{"id":${id}}\t${line}\n`;
    if (text.length < 100_000) continue;
    yield text;
    text = "";
  }
  yield text;
}

/** A real envelope with other row states, and with times, transaction and log position that go on with n. */
function filler(template: string): (n: number, before: string, after: string) => string {
  const envelope = JSON.parse(template);
  const moment = { ts_ms: "@ms@", ts_us: "@us@", ts_ns: "@ns@" };
  const source = { ...envelope.source, ...moment, txId: "@txId@", lsn: "@lsn@" };
  const pieces = JSON.stringify({ ...envelope, before: "@before@", after: "@after@", source, ...moment }).split(/"@(\w+)@"/);
  const { ts_ms, txId, lsn } = envelope.source;
  return (n, before, after) => {
    const ms = ts_ms + Math.floor(n / 100);
    const us = `${ms}${String(n % 1000).padStart(3, "0")}`;
    const values: Record<string, string> = { before, after, ms: String(ms), us, ns: `${us}000` };
    values.txId = String(txId + n);
    values.lsn = String(lsn + n * 200);
    return pieces.map((piece, i) => (i % 2 ? values[piece] : piece)).join("");
  };
}

/** Writes lines to the topic as a Java producer would: its partitioner, and its batches of at most 16 KB. */
async function produce(topic: string, lines: Iterable<string>): Promise<void> {
  const settings = ["topic.partitioner=murmur2_random", "batch.size=16384"].flatMap((setting) => ["-X", setting]);
  const { KCAT = "", KCAT_LIBRARIES, BROKER = "" } = kcatEnv();
  const child = spawn(KCAT, ["-q", "-P", "-b", BROKER, "-t", topic, "-K", "\\t", ...settings], {
    env: { LD_LIBRARY_PATH: KCAT_LIBRARIES },
    stdio: ["pipe", "ignore", "inherit"],
  });
  const closed = once(child, "close");
  await pipeline(Readable.from(lines), child.stdin);
  const [code] = await closed;
  if (code !== 0) throw new Error(`kcat -P exited ${code}`);
}

// 2. Latency

/** Inserts rows one by one, each its own transaction, `rowsPerSecond` of them a second from id `first` on. */
async function write(sql: Sql, first: number, onSend: (id: number) => void = () => {}): Promise<void> {
  const started = performance.now();
  const pending = new Set<Promise<unknown>>();
  for (let sent = 0; sent < seconds * rowsPerSecond; ) {
    const due = Math.min(seconds, (performance.now() - started) / 1000) * rowsPerSecond;
    for (; sent < due; sent++) {
      const id = first + sent;
      onSend(id);
      const insert = sql`insert into sensor_readings (id, sensor_id, metric, value) values (${id}, ${["JFK", "LGA", "EWR"][id % 3] ?? ""}, 'temp', ${id % 100})`;
      const done: Promise<unknown> = insert.then(() => pending.delete(done));
      pending.add(done);
    }
    await Promise.race([delay(5), ...pending]); // a failed insert ends it
    await delay(5);
  }
  await Promise.all(pending);
}

async function latency(): Promise<void> {
  await using sensors = await createSensors();
  const { shop } = sensors;
  const { child, ended } = await sensors.consumer();
  const visible = async (above: number): Promise<number[]> => {
    const answer = await shop.clickhouse.query({
      query: `SELECT toFloat64(id) FROM sensor_readings WHERE id > ${above}`,
      format: "JSONCompactEachRow",
    });
    return (await answer.json<[number]>()).map(([id]) => id);
  };
  await shop.admin`insert into sensor_readings (id, sensor_id, metric) values (0, 'JFK', 'temp')`;
  await until("the first row is in ClickHouse", async () => (await visible(-1)).length);

  say(`bench: latency, ${seconds} s at ${rowsPerSecond} rows/s`);
  const sent = new Map<number, number>();
  const latencies: number[] = [];
  let writing = true;
  const writer = write(shop.admin, 1, (id) => sent.set(id, performance.now())).finally(() => {
    writing = false;
  });
  writer.catch(() => {});
  let polls = 0;
  for (const deadline = performance.now() + (seconds + 60) * 1000; writing || sent.size; polls++) {
    if (performance.now() > deadline) throw new Error(`${sent.size} rows never came to ClickHouse`);
    await delay(50);
    const [oldest = Number.MAX_SAFE_INTEGER] = sent.keys();
    for (const id of await visible(oldest - 1)) {
      const at = sent.get(id);
      if (at !== undefined && sent.delete(id)) latencies.push((performance.now() - at) / 1000);
    }
  }
  await writer;
  child.kill("SIGTERM");
  await ended;
  const at = (share: number): string => percentile(latencies, share).toFixed(2);
  process.stdout.write(
    `\nfrom commit at the source to the queryable row, ${rowsPerSecond} rows/s for ${seconds} s, seconds (target: median under 2)\n${table([
      {
        rows: thousands(latencies.length),
        median: at(0.5),
        p95: at(0.95),
        max: at(1),
        "looked every": `${((seconds / polls) * 1000).toFixed(0)} ms`,
      },
    ])}\n`,
  );
}

if (parts.includes("throughput")) await throughput();
if (parts.includes("latency")) await latency();
