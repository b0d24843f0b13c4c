/**
 * make bench: what the sensors pipeline does. MESSAGES= (default 1,000,000) changes that Debezium wrote, from Kafka into ClickHouse, beside
 * kcat | split | curl into the same insert, RUNS= (default 3) of each, interleaved; then for SECONDS= (default 60) at 139 rows/s the
 * time from a commit to its queryable row. Absolute figures are this machine's.
 */
import { globSync } from "node:fs";
import { setTimeout as delay } from "node:timers/promises";
import { thousands } from "../../shared/log.ts";
import { table } from "../../shared/table.ts";
import { createSensors } from "../lib/sensors.ts";
import { until } from "../lib/shop.ts";
import { debianPackage, debianPath } from "../stack/debian.ts";
import { ensureInstalled } from "../stack/install.ts";
import { say } from "../stack/stack.ts";
import { compare, type Measured, measure, percentile, script } from "./measure.ts";

const messages = Number(process.env.MESSAGES ?? 1_000_000);
const seconds = Number(process.env.SECONDS ?? 60);
/** 500,000 an hour. */
const rowsPerSecond = 139;

/**
 * The floor. JSON has neither raw tabs nor raw newlines, so what kcat prints is TabSeparatedRaw as it is: no program between the broker and
 * ClickHouse looks at a message. split starts one curl for as many lines as `make sensors` has in an insert, and kcat fetches ahead.
 */
const floorScript = `set -o pipefail
LD_LIBRARY_PATH="$LIBRARIES" "$KCAT" -q -C -e -b "$BROKER" -t "$TOPIC" -o beginning -f "$TOPIC\\t1\\t%p\\t%o\\t0\\t%k\\t%s\\n" |
  split --lines=10000 --filter='curl -sSf --user "$LOGIN" -H "content-type: text/plain" --data-binary @- "$URL"'`;

async function throughput(): Promise<void> {
  await using bench = await createSensors();
  const { shop, topic, admin } = bench;
  const { env, clickhouse } = shop;
  const floor = `${env.CLICKHOUSE_DATABASE}_rebuild`; // which goes with the shop
  await shop.succeed("scripts/ops/migrate.ts", { CLICKHOUSE_DATABASE: floor });
  say(`bench: ${thousands(messages)} changes at the source, and by Debezium into the topic`);
  // Of each 20 changes 17 insert, two update and one deletes.
  await shop.admin`
    insert into sensor_readings (id, sensor_id, metric, value, recorded_at)
    select i, (array['JFK', 'LGA', 'EWR'])[1 + i % 3], 'metric ' || i % 9, i % 9999 / 100.0, timestamptz '2024-01-01Z' + i * interval '7 ms'
    from generate_series(1, ${Math.floor((messages / 20) * 17)}::int) i`;
  await shop.admin`update sensor_readings set value = value + 1 where id % 17 < 2`;
  await shop.admin`delete from sensor_readings where id % 17 = 2`;
  const written = async () => (await bench.state()).reduce((sum, { end }) => sum + Number(end), 0) >= messages;
  await until("all changes are in the topic", written, 900);
  const [expected] = await shop.admin`select count(*)::int as rows, sum(id)::float8 as ids, 0 as dead from sensor_readings`;

  /** Runs it, proves that it read everything, and makes it forget. */
  const checked = async (database: string, run: Promise<Measured>): Promise<Measured> => {
    const measured = await run;
    // The consumer leaves out the canaries, the floor does not.
    const dead = `(SELECT toFloat64(countIf(value NOT LIKE '%etl_heartbeat%')) FROM ${database}.sensor_dead_letters) AS dead`;
    const [found] = await shop.select(
      `SELECT toFloat64(count()) AS rows, toFloat64(sum(id)) AS ids, ${dead} FROM ${database}.sensor_readings FINAL`,
    );
    if (JSON.stringify(found) !== JSON.stringify(expected))
      throw new Error(`${database} has ${JSON.stringify(found)}, not ${JSON.stringify(expected)}`);
    await clickhouse.command({ query: `TRUNCATE TABLE ${database}.sensor_readings` });
    await shop.admin`delete from etl.topic_offsets`;
    await shop.admin`delete from etl.topics`;
    await admin.deleteGroups([env.SENSORS_GROUP ?? ""]).catch(() => {}); // there is none yet
    return measured;
  };
  const url = new URL(env.CLICKHOUSE_URL ?? "");
  url.search = String(new URLSearchParams({ database: floor, query: "INSERT INTO sensor_landing FORMAT TabSeparatedRaw" }));
  await ensureInstalled(debianPackage("kcat", "librdkafka1", "libyajl2"));
  const [LIBRARIES] = globSync(debianPath("kcat", "usr/lib/*-linux-gnu"));
  const LOGIN = `${env.CLICKHOUSE_USER}:${env.CLICKHOUSE_PASSWORD}`;
  const floorEnv = { LIBRARIES, KCAT: debianPath("kcat", "usr/bin/kcat"), BROKER: env.KAFKA_BROKERS, TOPIC: topic, URL: url.href, LOGIN };
  const ours = script("scripts/sensors.ts", { ...env, UNTIL: "caught-up" });
  await compare("sensors", messages, [
    {
      by: "kcat | split | curl",
      run: () => checked(floor, measure({ command: "bash", args: ["-c", floorScript], env: floorEnv })),
    },
    { by: "ours", run: () => checked(env.CLICKHOUSE_DATABASE ?? "", measure(ours)) },
  ]);
}

async function latency(): Promise<void> {
  await using sensors = await createSensors();
  const { shop } = sensors;
  await sensors.consumer();
  const sent = new Map<number, number>();
  const latencies: number[] = [];
  const insert = async (id: number): Promise<void> => {
    sent.set(id, performance.now());
    await shop.admin`insert into sensor_readings (id, sensor_id, metric, value) values (${id}, 'JFK', 'temp', 1)`;
  };
  /** Looks which of those that were sent are there. @returns whether all are. */
  const look = async (): Promise<boolean> => {
    const [oldest = 0] = sent.keys();
    for (const { id } of await shop.select<{ id: number }>(`SELECT toFloat64(id) AS id FROM sensor_readings WHERE id >= ${oldest}`)) {
      const at = sent.get(id);
      if (at !== undefined && sent.delete(id)) latencies.push((performance.now() - at) / 1000);
    }
    return !sent.size;
  };
  await insert(0);
  await until("the first row is in ClickHouse", look);
  say(`bench: latency, ${seconds} s at ${rowsPerSecond} rows/s`);
  const begun = performance.now();
  const write = async (): Promise<void> => {
    for (let id = 1; id <= seconds * rowsPerSecond; id++) {
      await delay(begun + (id * 1000) / rowsPerSecond - performance.now());
      await insert(id);
    }
  };
  latencies.length = 0;
  const writing = write();
  const all = async (): Promise<boolean> => (await look()) && latencies.length === seconds * rowsPerSecond;
  await Promise.all([writing, until("every row is in ClickHouse", all, seconds + 60)]);
  const at = (share: number): string => percentile(latencies, share).toFixed(2);
  process.stdout.write(
    `\nfrom commit at the source to the queryable row, ${rowsPerSecond} rows/s for ${seconds} s, seconds\n` +
      `${table([{ rows: thousands(latencies.length), median: at(0.5), p95: at(0.95), max: at(1) }])}\n`,
  );
}

await throughput();
await latency();
