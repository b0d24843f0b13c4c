/**
 * make bench: what the sensors pipeline does, and what it costs its source. MESSAGES= (default 2,000,000) envelopes from Kafka into
 * ClickHouse against kcat | split | curl into the same insert, RUNS= (default 3) of each, interleaved; then for SECONDS= (default
 * 60) each at 139 rows/s: the time from a commit to its queryable row, and the source's CPU for replication and for polling a table
 * of SOURCE_ROWS= (default 5,000,000). PARTS= (throughput,latency,source) does some of it. Absolute figures are this machine's.
 */
import { spawn } from "node:child_process";
import { randomBytes } from "node:crypto";
import { once } from "node:events";
import { globSync } from "node:fs";
import { Readable } from "node:stream";
import { pipeline } from "node:stream/promises";
import { setTimeout as delay } from "node:timers/promises";
import type { ClickHouseClient } from "@clickhouse/client";
import postgres, { type Sql } from "postgres";
import {
  awaitRunning,
  checkReplication,
  connectorConfig,
  createReadingsTopic,
  putConnector,
} from "../../scripts/ops/lib/kafka-connect.ts";
import { thousands } from "../../shared/log.ts";
import { namesOf } from "../../shared/sensors/connector.ts";
import { connectKafka, withAdmin } from "../../shared/sensors/kafka.ts";
import { table } from "../../shared/table.ts";
import { createSource } from "../data/source.ts";
import { createSensors } from "../lib/sensors.ts";
import { until } from "../lib/shop.ts";
import { debianPath } from "../stack/debian.ts";
import { localEnv } from "../stack/env.ts";
import { kcat } from "../stack/kcat.ts";
import { running } from "../stack/process.ts";
import { say } from "../stack/stack.ts";
import { cpuOf, median, percentile, record, sourceCpu, spread, treeCpu } from "./measure.ts";
import { startServer } from "./server.ts";

const messages = Number(process.env.MESSAGES ?? 2_000_000);
const runs = Number(process.env.RUNS ?? 3);
const seconds = Number(process.env.SECONDS ?? 60);
const sourceRows = Number(process.env.SOURCE_ROWS ?? 5_000_000);
const parts = (process.env.PARTS ?? "throughput,latency,source").split(",");
/** 500,000 an hour. */
const rowsPerSecond = 139;

// 1. Throughput

interface Read {
  seconds: number;
  cpu: { reader: number; clickhouse: number; kafka: number };
  megabytes?: number;
}

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
  const began = performance.now();
  await produce(topic, envelopes(templates, expected));
  const ends = await admin.fetchTopicOffsets(topic);
  say(
    `bench: written in ${((performance.now() - began) / 1000).toFixed(1)} s; ${Math.round(expected.bytes / messages)} bytes each; partitions ${ends.map(({ high }) => high).join(", ")}`,
  );

  const reset = async (database: string): Promise<void> => {
    await shop.clickhouse.command({ query: `TRUNCATE TABLE ${database}.sensor_readings` });
    await shop.admin`delete from etl.topic_offsets where topic = ${topic}`;
    await shop.admin`delete from etl.topics where topic = ${topic}`;
    await admin.deleteGroups([shop.env.SENSORS_GROUP ?? ""]).catch(() => {}); // there is none yet
  };
  let rowsPerInsert = 0;
  const consumer = async (): Promise<Read> => {
    const { child, ended } = shop.start("scripts/sensors.ts", { UNTIL: "caught-up" });
    const read = await measure(child.pid ?? 0, ended);
    const { code, signal, stderr } = await ended;
    if (code !== 0) throw new Error(`make sensors exited ${code ?? signal}:\n${stderr}`);
    const last = (name: string): number => Number(new RegExp(`step=done .*\\b${name}=(\\S+)`).exec(stderr)?.[1]);
    rowsPerInsert = Math.round(last("rows") / last("batches"));
    return { ...read, megabytes: last("peak_rss_mb") };
  };
  const pipes = async (...partitions: string[]): Promise<Read> => {
    const env = floorEnv(topic, floor.name, rowsPerInsert);
    const child = spawn("bash", ["-c", floorScript, "bash", ...partitions], {
      env,
      stdio: ["ignore", "ignore", "pipe"],
    });
    let errors = "";
    child.stderr.setEncoding("utf8").on("data", (text) => (errors = (errors + text).slice(-2000)));
    const ended = once(child, "close");
    const read = await measure(child.pid ?? 0, ended);
    const [code] = await ended;
    if (code !== 0) throw new Error(`kcat | split | curl exited ${code}:\n${errors}`);
    return read;
  };
  const contenders = [
    { name: "make sensors (this project)", database: ours, run: consumer },
    { name: "kcat | split | curl", database: floor.name, run: () => pipes("-1") },
    { name: "kcat | split | curl, one for each partition", database: floor.name, run: () => pipes("0", "1", "2") },
  ].map((contender) => ({ ...contender, reads: [] as Read[] }));
  for (let run = 1; run <= runs; run++) {
    for (const { name, database, run: once, reads } of contenders) {
      say(`bench: run ${run} of ${runs}: ${name}`);
      reads.push(await once());
      await check(shop.clickhouse, database, expected);
      await reset(database);
    }
    const [own = 0, , least = 0] = contenders.map(({ reads }) => reads.at(-1)?.seconds ?? 0);
    const megabytes = contenders[0]?.reads.at(-1)?.megabytes;
    record({ job: "sensors", rows: messages, by: "ours", seconds: own, times: own / least, megabytes });
  }

  const ourSeconds = contenders[0]?.reads.map((read) => read.seconds) ?? [];
  const report = contenders.map(({ name, reads }, index) => {
    const time = reads.map((read) => read.seconds);
    const cpu = (of: keyof Read["cpu"]): string => median(reads.map((read) => read.cpu[of])).toFixed(1);
    return {
      reads: name,
      seconds: spread(time, 1),
      "rows/s": thousands(messages / median(time)),
      "ours / this, in rows/s": index ? spread(time.map((value, run) => value / (ourSeconds[run] ?? 0))) : "",
      "CPU s: reader": cpu("reader"),
      clickhouse: cpu("clickhouse"),
      kafka: cpu("kafka"),
      "peak RSS, MB": index ? "" : Math.max(...reads.map(({ megabytes = 0 }) => megabytes)),
    };
  });
  process.stdout.write(
    `\n${thousands(messages)} envelopes from Kafka into ClickHouse, ${thousands(rowsPerInsert)} an insert, from start to exit (targets: 60,000 rows/s, at least 0.50 of kcat | split | curl, under 400 MB)\n${table(report)}\n`,
  );
}

const dropDatabase = async (client: ClickHouseClient, name: string): Promise<void> =>
  void (await client.command({ query: `DROP DATABASE IF EXISTS ${name}` }));

/** Wall time, and the CPU meanwhile of what was started and of the servers (where they run here). */
async function measure(pid: number, ended: Promise<unknown>): Promise<Pick<Read, "seconds" | "cpu">> {
  const servers = (): { clickhouse: number; kafka: number } => {
    const [clickhouse, kafka] = ["clickhouse", "kafka"].map((name) => cpuOf(running(name)?.pid ?? 0).own);
    return { clickhouse: clickhouse ?? 0, kafka: kafka ?? 0 };
  };
  const [started, before] = [performance.now(), servers()];
  let reader = 0;
  const sampler = setInterval(() => (reader = Math.max(reader, treeCpu(pid))), 100);
  await ended.finally(() => clearInterval(sampler));
  const elapsed = (performance.now() - started) / 1000;
  const after = servers();
  return {
    seconds: elapsed,
    cpu: { reader, clickhouse: after.clickhouse - before.clickhouse, kafka: after.kafka - before.kafka },
  };
}

/** Every message became what it says: as many rows with FINAL as are left, and no dead letter. */
async function check(
  client: ClickHouseClient,
  database: string,
  expected: { rows: number; ids: number },
): Promise<void> {
  const answer = await client.query({
    query: `SELECT toFloat64(count()) AS rows, toFloat64(sum(id)) AS ids, (SELECT toFloat64(count()) FROM ${database}.sensor_dead_letters) AS dead FROM ${database}.sensor_readings FINAL`,
    format: "JSONEachRow",
  });
  const [found] = await answer.json<{ rows: number; ids: number; dead: number }>();
  if (found?.rows !== expected.rows || found.ids !== expected.ids || found.dead !== 0)
    throw new Error(`${database} has ${JSON.stringify(found)}, not ${JSON.stringify(expected)} and no dead letter`);
}

/**
 * The floor. JSON has neither raw tabs nor raw newlines, so what kcat prints is TabSeparatedRaw as it is: no program between the
 * broker and ClickHouse looks at a message. split starts one curl for as many lines as `make sensors` had in an insert (measured
 * just before), and kcat fetches ahead meanwhile. One pipe reads all partitions and does one insert at a time; a pipe for each
 * partition, as many inserts as there are partitions. Arguments: a pipe's partition each, -1 for all.
 */
const floorScript = `set -o pipefail
read_into() {
  LD_LIBRARY_PATH="$KCAT_LIBRARIES" "$KCAT" -q -C -e -b "$BROKER" -t "$TOPIC" -p "$1" -o beginning -f "$TOPIC\\t1\\t%p\\t%o\\t0\\t%k\\t%s\\n" |
    split --lines="$ROWS" --filter='curl -sSf --user "$LOGIN" -H "content-type: text/plain" --data-binary @- "$URL"'
}
pids=()
for partition in "$@"; do read_into "$partition" & pids+=($!); done
for pid in "\${pids[@]}"; do wait "$pid" || exit 1; done`;

const kcatEnv = (): NodeJS.ProcessEnv => ({
  PATH: process.env.PATH,
  KCAT: debianPath("kcat", "usr/bin/kcat"),
  KCAT_LIBRARIES: globSync(debianPath("kcat", "usr/lib/*-linux-gnu"))[0],
  BROKER: localEnv().KAFKA_BROKERS,
});

function floorEnv(topic: string, database: string, rows: number): NodeJS.ProcessEnv {
  const { CLICKHOUSE_URL = "", CLICKHOUSE_USER, CLICKHOUSE_PASSWORD } = localEnv();
  const url = new URL(CLICKHOUSE_URL);
  url.searchParams.set("database", database);
  url.searchParams.set("query", "INSERT INTO sensor_landing FORMAT TabSeparatedRaw");
  return {
    ...kcatEnv(),
    TOPIC: topic,
    ROWS: String(rows),
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
function* envelopes(
  templates: Record<"c" | "u" | "d", string>,
  sum: { rows: number; ids: number; bytes: number },
): Generator<string> {
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
    const line = fill[op](
      n,
      op === "c" ? "null" : row(id, value),
      op === "d" ? "null" : row(id, op === "u" ? value + 1 : value),
    );
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
  const pieces = JSON.stringify({ ...envelope, before: "@before@", after: "@after@", source, ...moment }).split(
    /"@(\w+)@"/,
  );
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
  const before = sourceCpu();
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
  const whole = { job: "latency", rows: latencies.length, sourceCpu: ((sourceCpu() - before) / seconds) * 60 };
  for (const share of [0.5, 0.95, 1]) record({ ...whole, by: `${share}`, seconds: percentile(latencies, share) });
  process.stdout.write(
    `\nfrom commit at the source to the queryable row, ${rowsPerSecond} rows/s for ${seconds} s, seconds (target: median under 2)\n${table(
      [
        {
          rows: thousands(latencies.length),
          median: at(0.5),
          p95: at(0.95),
          max: at(1),
          "looked every": `${((seconds / polls) * 1000).toFixed(0)} ms`,
        },
      ],
    )}\n`,
  );
}

// 3. The source's CPU

/** Checkpoints and autovacuum, which come now and then, are put off: they would count to whichever measurement they fell into. */
async function startSource() {
  const server = await startServer({ checkpoint_timeout: "1h", max_wal_size: "20GB", autovacuum: "off" });
  const at = (variable: string): string => {
    const { host, pathname } = new URL(server.url);
    return Object.assign(new URL(localEnv()[variable] ?? ""), { host, pathname }).href;
  };
  const variables = {
    SOURCE_DATABASE_URL: at("SOURCE_DATABASE_URL"),
    REPLICATION_DATABASE_URL: at("REPLICATION_DATABASE_URL"),
  };
  await createSource(server.url, Object.values(variables)).catch(async (error) => {
    await server[Symbol.asyncDispose]();
    throw error;
  });
  return { ...server, variables };
}

/** Debezium on that server from now on, without a snapshot of what is there; until it is disposed of. */
async function replicate({ variables }: Awaited<ReturnType<typeof startSource>>, admin: Sql) {
  const { KAFKA_BROKERS = "", CONNECT_URL = "" } = localEnv();
  const env = {
    ...{ ...variables, CONNECT_URL, KAFKA_BROKERS: [KAFKA_BROKERS], KAFKA_TLS: false },
    ...{ KAFKA_SASL_MECHANISM: undefined, KAFKA_USERNAME: undefined, KAFKA_PASSWORD: undefined },
    SENSORS_TOPIC: `bench_${randomBytes(5).toString("hex")}.public.sensor_readings`,
    SENSORS_GROUP: "bench",
  };
  const { prefix, connector, slot } = namesOf(env);
  const kafka = connectKafka(env, "bench");
  const topics = [env.SENSORS_TOPIC, `__debezium-heartbeat.${prefix}`];
  const replication = {
    /** Messages that came to the topic. */
    messages: () =>
      withAdmin(kafka, env, async (client) =>
        (await client.fetchTopicOffsets(env.SENSORS_TOPIC)).reduce((sum, { high }) => sum + Number(high), 0),
      ),
    [Symbol.asyncDispose]: async () => {
      await fetch(new URL(`/connectors/${connector}`, CONNECT_URL), { method: "DELETE" });
      await until("the connector's slot is dropped", () =>
        admin`select pg_drop_replication_slot(slot_name) from pg_replication_slots where slot_name = ${slot}`.then(
          () => true,
          () => false,
        ),
      );
      await withAdmin(kafka, env, (client) => client.deleteTopics({ topics })).catch(() => {});
    },
  };
  try {
    await checkReplication(env);
    const config = connectorConfig(env);
    await createReadingsTopic(env, config);
    await putConnector(env, { ...config, "snapshot.mode": "no_data" });
    await awaitRunning(env);
    await until("the slot is read", async () => {
      const [row] =
        await admin`select from pg_replication_slots where slot_name = ${slot} and active and confirmed_flush_lsn is not null`;
      return row;
    });
    return replication;
  } catch (error) {
    await replication[Symbol.asyncDispose]();
    throw error;
  }
}

/**
 * Asks each second for the rows after the last one that it has, until it is disposed of: over one connection, as the read-only
 * role. `back` is how far before that it looks each time, for rows that commit late; such rows come again and again.
 */
async function poll(
  { variables }: Awaited<ReturnType<typeof startSource>>,
  cursor: "recorded_at" | "id",
  { back = "0 s", settings = {} }: { back?: string; settings?: Record<string, string> } = {},
) {
  const sql = postgres(variables.SOURCE_DATABASE_URL, { max: 1, fetch_types: false, connection: settings });
  const [top] = await sql`select max(${sql(cursor)})::text as last from sensor_readings`;
  let last: string = top?.last;
  let [stopped, rows] = [false, 0];
  const loop = (async () => {
    for (let next = performance.now(); !stopped; await delay(Math.max(0, next - performance.now()))) {
      const from =
        cursor === "id" ? sql`${last}::text::bigint` : sql`${last}::text::timestamptz - ${back}::text::interval`;
      const found = await sql`
        select id, sensor_id, metric, value, recorded_at, ${sql(cursor)}::text as last
        from sensor_readings where ${sql(cursor)} > ${from} order by ${sql(cursor)}`;
      last = found.at(-1)?.last ?? last;
      rows += found.length;
      next += 1000;
    }
  })();
  loop.catch(() => {});
  return {
    messages: async () => rows,
    [Symbol.asyncDispose]: async () => {
      stopped = true;
      await loop.finally(() => sql.end({ timeout: 1 }));
    },
  };
}

async function source(): Promise<void> {
  await using server = await startSource();
  const admin = postgres(server.url, { max: 1, fetch_types: false, onnotice: () => {} });
  await using _ = { [Symbol.asyncDispose]: () => admin.end({ timeout: 1 }) };
  say(`bench: a source of ${thousands(sourceRows)} readings`);
  await admin`
    insert into sensor_readings (id, sensor_id, metric, value, recorded_at)
    select i, 'S' || i % 1000, 'temp', i % 100, now() - (${sourceRows} + 3600 - i) * interval '1 ms' - interval '1 hour'
    from generate_series(1, ${sourceRows}::int) i`;
  await admin`vacuum analyze sensor_readings`;
  await admin`checkpoint`;
  let first = sourceRows + 1;
  const nothing = async () => ({ messages: async () => 0, [Symbol.asyncDispose]: async () => {} });
  const noIndex = { settings: { enable_indexscan: "off", enable_bitmapscan: "off" } };
  // The writer alone before and after, as a measure of the noise.
  const phases = [
    { name: "the writer alone, before", reader: nothing },
    { name: "replication (slot and connector)", reader: () => replicate(server, admin) },
    { name: "polling, recorded_at > last, by its index", reader: () => poll(server, "recorded_at") },
    { name: "polling, id > last, by the primary key", reader: () => poll(server, "id") },
    { name: "polling, recorded_at > last - 60 s", reader: () => poll(server, "recorded_at", { back: "60 s" }) },
    { name: "polling, recorded_at > last, had it no index", reader: () => poll(server, "recorded_at", noIndex) },
    { name: "the writer alone, after", reader: nothing },
  ];
  const measured: { name: string; perMinute: number; alone: boolean }[] = [];
  for (const { name, reader } of phases) {
    say(`bench: the source's CPU, ${seconds} s: ${name}`);
    await using reading = await reader();
    await delay(3000); // what its start cost is over
    const [cpu, started, before] = [server.cpu(), performance.now(), await reading.messages()];
    await write(admin, first);
    const came = async (): Promise<number> => (await reading.messages()) - before;
    if (reader !== nothing)
      await until(`${name}: all rows came`, async () => (await came()) >= seconds * rowsPerSecond, 120);
    await delay(1000);
    const elapsed = (performance.now() - started) / 1000;
    const perMinute = ((server.cpu() - cpu) / elapsed) * 60;
    measured.push({ name, perMinute, alone: reader === nothing });
    first += Math.ceil(seconds * rowsPerSecond);
  }
  const alone = measured.filter((phase) => phase.alone).map(({ perMinute }) => perMinute);
  const writer = alone.reduce((sum, value) => sum + value, 0) / alone.length;
  const beyond = (index: number): number => (measured[index]?.perMinute ?? 0) - writer;
  process.stdout.write(
    `\nCPU of the source's server at ${rowsPerSecond} rows/s, ${thousands(sourceRows)} rows in the table, polled each second, ${seconds} s each\n${table(
      measured.map(({ name, perMinute, alone: nobody }, index) => ({
        source: name,
        "CPU s a minute": perMinute.toFixed(2),
        "beyond the writer": nobody ? "" : beyond(index).toFixed(2),
        "more than the writer": nobody ? "" : `${Math.round((beyond(index) / writer) * 100)} %`,
        "replication / this": nobody || index === 1 ? "" : (beyond(1) / beyond(index)).toFixed(2),
      })),
    )}\n`,
  );
}

if (parts.includes("throughput")) await throughput();
if (parts.includes("latency")) await latency();
if (parts.includes("source")) await source();
