/**
 * A shop with sensors: its topic, its connector, its consumers, on the local stack's Kafka, Connect and ClickHouse.
 */
import assert from "node:assert/strict";
import { Readable } from "node:stream";
import { pipeline } from "node:stream/promises";
import { setTimeout as delay } from "node:timers/promises";
import { isDeepStrictEqual } from "node:util";
import type { Message, Producer } from "kafkajs";
import type { Sql, TransactionSql } from "postgres";
import { type PartitionState, topicState } from "../../shared/sensors/epoch.ts";
import { connectKafka, createTopic, type Kafka } from "../../shared/sensors/kafka.ts";
import type { Env } from "../stack/env.ts";
import { ending } from "./faults.ts";
import { random } from "./random.ts";
import { connectClickHouse, createReadings, createShop, type Process, type ShopOptions, until } from "./shop.ts";

const withoutLogin = { KAFKA_TLS: false, KAFKA_SASL_MECHANISM: undefined, KAFKA_USERNAME: undefined, KAFKA_PASSWORD: undefined };
/** The broker at host:port. */
export const kafkaAt = (broker: string): Kafka => connectKafka({ KAFKA_BROKERS: [broker], ...withoutLogin }, "test");

/** Messages of inserts of the rows with the ids first..first+count-1, about `width` bytes each. */
export const created = (first: number, count: number, width = 0): Message[] =>
  Array.from({ length: count }, (_, index) => {
    const id = first + index;
    const after = { id, sensor_id: "w".repeat(width), metric: "temp", value: id, recorded_at: "2024-01-01T00:00:00.000000Z" };
    const value = JSON.stringify({ before: null, after, source: { ts_ms: Date.now() }, op: "c" });
    return { key: JSON.stringify({ id }), value };
  });

/** A process that has to end with `code`, having said all of `says`, for people. @returns all that it said. */
export async function endsWith(run: Process, code: number, says: (string | RegExp)[]): Promise<string> {
  const { code: found, stderr } = await ending(run, 120);
  for (const part of says) assert.ok(typeof part === "string" ? stderr.includes(part) : part.test(stderr), `no "${part}" in:\n${stderr}`);
  assert.equal(found, code, stderr);
  assert.doesNotMatch(stderr, /^\s+at /m, "a stack trace is for programmers");
  assert.doesNotMatch(stderr, /is a negative number/, "a connection that has nothing to send does not look for it");
  return stderr;
}

export const succeeds = async (work: Promise<unknown>): Promise<boolean> => {
  const [{ status }] = await Promise.allSettled([work]);
  return status === "fulfilled";
};

/** A row of sensor_readings in one comparable form: numbers and times as text. */
export type Reading = Record<"id" | "sensor_id" | "metric" | "value" | "recorded_at", string | null>;

export interface Consumer extends Process {
  /** Where it serves /metrics and /healthz; once it does. */
  url: Promise<string>;
  /** Its metrics: name, with labels if it has any, → value. And the lag of all partitions, of which it has been told by then. */
  metrics(): Promise<Record<string, number>>;
  lag(): Promise<number | undefined>;
}

export type Sensors = Awaited<ReturnType<typeof createSensors>>;

const number = (text: string | null): string | null => {
  if (text === null) return null;
  const value = Number(text.replace(/^([-+]?)inf$/i, "$1Infinity").replace(/^nan$/i, "NaN"));
  return Object.is(value, -0) ? "-0" : String(value);
};

/** Shows only the rows that differ, and the beginning of their texts: node's comparison of thousands of rows takes a minute. */
export function assertSame(actual: Reading[], expected: Reading[]): void {
  const [there, wanted] = [actual, expected].map((rows) => new Set(rows.map((row) => JSON.stringify(row))));
  const only = (rows?: Set<string>, others?: Set<string>): string[] =>
    [...(rows ?? [])].filter((row) => !others?.has(row)).map((row) => row.slice(0, 300));
  const [extra, missing] = [only(there, wanted), only(wanted, there)];
  assert.deepEqual(
    { rows: actual.length, extra: extra.slice(0, 20), missing: missing.slice(0, 20) },
    { rows: expected.length, extra: [], missing: [] },
  );
}

/** All that was committed has arrived, nothing is a dead letter, and both sides are the same now: not only sooner or later. */
export async function assertExact(sensors: Sensors, seconds?: number): Promise<void> {
  await sensors.drained(seconds);
  assert.deepEqual(await sensors.deadLetters(), []);
  assertSame(await sensors.readings(), await sensors.source());
}

export interface SensorsOptions extends ShopOptions {
  /** false: no connector, only the topic: the test writes its messages itself. */
  connector?: boolean;
  partitions?: number;
  /** Where Kafka, Connect and ClickHouse are, if they are not the local stack's. */
  servers?: Env;
}

export async function createSensors(options: SensorsOptions = {}) {
  const { connector = true, partitions = 3, servers } = options;
  const plain = await createShop({ ...options, clickhouse: !options.servers });
  // What the shop starts gets this same object.
  const clickhouse = servers ? connectClickHouse(Object.assign(plain.env, servers)) : plain.clickhouse;
  const select = async <T>(query: string): Promise<T[]> => await (await clickhouse.query({ query, format: "JSONEachRow" })).json<T>();
  const shop = { ...plain, clickhouse, select };
  if (servers) await createReadings(shop.env);
  const { SENSORS_TOPIC: topic = "", SENSORS_GROUP: group = "", CONNECT_URL = "", KAFKA_BROKERS = "" } = shop.env;
  const database = shop.env.CLICKHOUSE_DATABASE ?? "";
  const kafka = kafkaAt(KAFKA_BROKERS);
  const admin = kafka.admin();
  await admin.connect();
  let producer: Producer | undefined;
  let slot = "";
  const put = async (): Promise<void> => {
    const { stderr } = await shop.succeed("scripts/ops/connector.ts");
    slot = /slot=(\S+)/.exec(stderr)?.[1] ?? "";
  };
  try {
    if (connector) await put();
    else
      await createTopic(admin, {
        topic,
        numPartitions: partitions,
        replicationFactor: 1,
        configEntries: [{ name: "max.message.bytes", value: "67108864" }],
      });
  } catch (error) {
    await admin.disconnect(); // it would keep the test's process
    await shop[Symbol.asyncDispose]();
    throw error;
  }

  /** ClickHouse's readings (with FINAL), and the source's, by id. */
  const readings = async (of = database): Promise<Reading[]> => {
    const rows = await select<Reading>(
      `SELECT toString(id) AS id, sensor_id, metric, toString(value) AS value, toString(recorded_at) AS recorded_at FROM ${of}.sensor_readings FINAL ORDER BY sensor_readings.id`,
    );
    return rows.map((row) => ({ ...row, value: number(row.value) }));
  };
  const source = async (): Promise<Reading[]> => {
    const rows = await shop.admin<Reading[]>`
      select id::text, sensor_id, metric, value::text, to_char(recorded_at at time zone 'UTC', 'YYYY-MM-DD HH24:MI:SS.US') as recorded_at
      from public.sensor_readings r order by r.id`;
    return rows.map((row) => ({ ...row, value: number(row.value) }));
  };

  /** Where the topic and the group are, by partition. */
  const state = (): Promise<PartitionState[]> => topicState(admin, topic, group);

  return {
    shop,
    topic,
    admin,
    state,
    /** What the group has committed, over all partitions. */
    committed: async () => (await state()).reduce((sum, { committed }) => sum + Math.max(0, Number(committed)), 0),
    readings,
    source,
    /** Runs `make connector`, and requires exit code 0. */
    connector: put,
    /** Starts `make sensors`, and waits until the group gave it its partitions. */
    consumer: async (variables: Env = {}): Promise<Consumer> => {
      const process = shop.start("scripts/sensors.ts", variables);
      const url = process.line(/step=serving/).then((line) => new URL(/metrics=(\S+)/.exec(line)?.[1] ?? "").origin);
      url.catch(() => {});
      await process.line(/step=assigned/);
      const metrics = async (): Promise<Record<string, number>> => {
        const text = await (await fetch(`${await url}/metrics`)).text();
        return Object.fromEntries([...text.matchAll(/^(\w+(?:\{.*\})?) (\S+)$/gm)].map(([, name, value]) => [name, Number(value)]));
      };
      const lag = async (): Promise<number | undefined> => {
        const lags = Object.entries(await metrics()).filter(([name]) => name.startsWith("etl_sensors_lag{"));
        return lags.length ? lags.reduce((sum, [, value]) => sum + value, 0) : undefined;
      };
      return { ...process, url, metrics, lag };
    },
    /** Runs `make sensors UNTIL=caught-up` to its end and requires exit code 0. */
    catchUp: async (variables: Env = {}): Promise<void> =>
      void (await shop.succeed("scripts/sensors.ts", { ...variables, UNTIL: "caught-up" })),
    /** Writes messages to the topic as they are, in their order. */
    produce: async (messages: Message[]): Promise<void> => {
      if (!producer) {
        producer = kafka.producer({ allowAutoTopicCreation: false, maxInFlightRequests: 1 });
        await producer.connect();
      }
      await producer.send({ topic, messages, acks: -1 });
    },
    /** Waits until source and ClickHouse are the same, and shows the difference where they do not become it. */
    equal: async (seconds = 60): Promise<void> => {
      const same = async (): Promise<boolean> => isDeepStrictEqual(await readings(), await source());
      await until("source and ClickHouse are the same", same, seconds).catch(async () => {
        assertSame(await readings(), await source());
      });
    },
    /** Waits until all that the source has committed by now is inserted and its offsets are committed, by consumers that run. */
    drained: async (seconds = 60): Promise<void> => {
      // Debezium writes in the order of commits: once this row is there, all before it is in the topic.
      const marker = `marker ${performance.now()}`;
      await shop.admin`
        insert into public.sensor_readings (id, sensor_id, metric, recorded_at)
        values ((extract(epoch from clock_timestamp()) * 1000000)::bigint, 'marker', ${marker}, '2000-01-01Z')`;
      const query = `SELECT count() AS count FROM sensor_readings WHERE metric = '${marker}'`;
      const there = async (): Promise<boolean> => Number((await select<{ count: string }>(query))[0]?.count) > 0;
      await until("the last row is in ClickHouse", there, seconds);
      const ends = await state();
      const committed = async (): Promise<boolean> =>
        (await state()).every(({ committed }, at) => !ends[at]?.end || committed >= ends[at].end);
      await until("its offsets are committed", committed, seconds);
    },
    /** By partition and offset. */
    deadLetters: () =>
      select<{ epoch: number; partition: number; offset: string; reason: string; key: string | null; value: string }>(
        "SELECT epoch, partition, toString(offset) AS offset, reason, key, value FROM sensor_dead_letters FINAL ORDER BY epoch, partition, sensor_dead_letters.offset",
      ),
    [Symbol.asyncDispose]: async (): Promise<void> => {
      if (slot) {
        const url = new URL(`/connectors/etl-${database}-sensor_readings`, CONNECT_URL);
        await fetch(url, { method: "DELETE" }).catch(() => {}); // one that a test has killed
        // A database cannot be dropped while it has a slot, nor a slot while it is used.
        await until("the connector's slot is dropped", async () => {
          const drop = shop.admin`select pg_drop_replication_slot(slot_name) from pg_replication_slots where slot_name = ${slot}`;
          return await succeeds(drop);
        });
      }
      // kafkajs may wait for ever for a broker that a failed test has left dead.
      const within = (work: Promise<unknown> | undefined): Promise<unknown> =>
        Promise.race([work?.catch(() => {}), delay(10_000, undefined, { ref: false })]);
      await within(producer?.disconnect());
      await within(admin.deleteTopics({ topics: [topic] }));
      if (slot) await within(admin.deleteTopics({ topics: [`__debezium-heartbeat.${database}`] }));
      await shop[Symbol.asyncDispose](); // with its consumers, the group's members
      await within(admin.deleteGroups([group]));
      await within(admin.disconnect());
    },
  };
}

export interface Writers {
  /** Transactions that they have committed. */
  committed(): number;
  stop(): Promise<void>;
}

/**
 * Applications that change the same forty readings at once, in transactions of one to five statements, until they are stopped:
 * inserts, updates, deletes, moves of the sorting key and back, changes of the primary key, updates that change nothing,
 * savepoints, rollbacks, deadlocks, COPY.
 */
export function startWriters({ shop }: Sensors, seed: number, count = 3): Writers {
  let [committed, stopped] = [0, false];
  // A COPY that meets a key which is taken leaves postgres.js hanging.
  const ready = shop.admin`select setval(pg_get_serial_sequence('sensor_readings', 'id'), 10000000)`;
  const write = async (below: (n: number) => number): Promise<void> => {
    await ready;
    const sql = shop.connect("writer");
    await sql`set deadlock_timeout = '20ms'`;
    while (!stopped) {
      try {
        await sql.begin(async (tx) => {
          for (let left = 1 + below(5); left > 0; left--) await changeAtRandom(tx, below);
          if (below(8) === 0) throw rollback;
        });
        committed += 1;
      } catch (error) {
        // A deadlock's victim, or an id that is taken.
        if (error !== rollback && !["40P01", "23505"].includes((error as { code?: string }).code ?? "")) throw error;
      }
      await delay(below(10));
    }
  };
  const work = Promise.all(Array.from({ length: count }, (_, n) => write(random(seed + n))));
  work.catch(() => {}); // stop() tells
  return {
    committed: () => committed,
    stop: async () => {
      stopped = true;
      await work;
    },
  };
}

const rollback = new Error("rolled back");

async function changeAtRandom(sql: Sql | TransactionSql, below: (n: number) => number): Promise<void> {
  const [id, other] = [1 + below(40), 1 + below(40)];
  const sensor = [null, "", "A", "B", "é"][below(5)] ?? null;
  const metric = below(100) ? `m${below(3)}` : "wide ".repeat(5000);
  const at = `2024-01-0${1 + below(3)} 00:00:00.00000${below(2)}Z`;
  const value = below(1000) / 7;
  const insert = () => sql`
    insert into sensor_readings (id, sensor_id, metric, value, recorded_at)
    values (${id}, ${sensor}, ${metric}, ${value}, ${at}::text::timestamptz) on conflict (id) do update set value = excluded.value`;
  const changes: (() => Promise<unknown>)[] = [
    () => sql`update sensor_readings set sensor_id = ${sensor} where id = ${id}`,
    () => sql`update sensor_readings set recorded_at = ${at}::text::timestamptz where id = ${id}`,
    () => sql`update sensor_readings set value = value + 1 where id % 5 = ${id % 5} and id <= 40`,
    () => sql`delete from sensor_readings where id = ${id}`,
    () => sql`update sensor_readings set id = ${other} where id = ${id}`,
    () => sql`update sensor_readings set value = value where id = ${id}`,
    async () => {
      await sql`savepoint one`;
      await sql`update sensor_readings set value = -1, sensor_id = 'never' where id = ${id}`;
      await sql`rollback to savepoint one`;
    },
    () => sql`update sensor_readings set value = ${value}, metric = ${metric} where id = ${id}`,
    async () => {
      // Rows of a COPY, and of one INSERT; their ids are the table's next.
      const copy = "copy sensor_readings (sensor_id, metric, value, recorded_at) from stdin";
      const lines = `${sensor ?? "\\N"}\tcopied\t${value}\t2024-01-09Z\n`.repeat(20);
      await pipeline(Readable.from([lines]), await sql.unsafe(copy).writable());
      await sql`
        insert into sensor_readings (sensor_id, metric, value, recorded_at)
        select ${sensor}, 'many', ${value}::float8 + i, '2024-01-10Z' from generate_series(1, 20) i`;
    },
    insert,
    insert,
  ];
  await changes[below(changes.length)]?.();
}
