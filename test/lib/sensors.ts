/**
 * A shop with sensors: its topic, its connector, its consumers, on the local stack's Kafka, Connect and ClickHouse.
 */
import assert from "node:assert/strict";
import { isDeepStrictEqual } from "node:util";
import type { Admin, Message, Producer } from "kafkajs";
import { connectKafka } from "../../shared/kafka.ts";
import type { Env } from "../stack/env.ts";
import { createShop, type Process, type Shop, type ShopOptions, until } from "./shop.ts";

/** A row of sensor_readings in one comparable form: numbers and times as text. */
export type Reading = Record<"id" | "sensor_id" | "metric" | "value" | "recorded_at", string | null>;

export interface Consumer extends Process {
  /** Where it serves /metrics and /healthz; once it does. */
  url: Promise<string>;
  /** Its metrics: name, with labels if it has any, → value. */
  metrics(): Promise<Record<string, number>>;
}

export interface Sensors extends AsyncDisposable {
  shop: Shop;
  topic: string;
  admin: Admin;
  /** Starts `make sensors`, and waits until the group gave it its partitions. */
  consumer(variables?: Env): Promise<Consumer>;
  /** Runs `make sensors UNTIL=caught-up` to its end and requires exit code 0. */
  catchUp(variables?: Env): Promise<void>;
  /** Runs `make connector`, and requires exit code 0. */
  connector(): Promise<void>;
  /** Writes messages to the topic as they are, in their order. */
  produce(messages: Message[]): Promise<void>;
  /** The source's readings, and ClickHouse's (with FINAL), by id. */
  source(): Promise<Reading[]>;
  readings(database?: string): Promise<Reading[]>;
  /** Waits until both are the same, and shows the difference where they do not become it. */
  equal(seconds?: number): Promise<void>;
  /** Dead letters by partition and offset. */
  deadLetters(): Promise<
    { epoch: number; partition: number; offset: string; reason: string; key: string | null; value: string }[]
  >;
}

const number = (text: string | null): string | null => {
  if (text === null) return null;
  const value = Number(text.replace(/^([-+]?)inf$/i, "$1Infinity").replace(/^nan$/i, "NaN"));
  return Object.is(value, -0) ? "-0" : String(value);
};

export interface SensorsOptions extends ShopOptions {
  /** false: no connector, only the topic: the test writes its messages itself. */
  connector?: boolean;
  partitions?: number;
}

export async function createSensors(options: SensorsOptions = {}): Promise<Sensors> {
  const { connector = true, partitions = 3 } = options;
  const shop = await createShop(options);
  const { SENSORS_TOPIC: topic = "", SENSORS_GROUP: group = "", CONNECT_URL = "", KAFKA_BROKERS = "" } = shop.env;
  const database = shop.env.CLICKHOUSE_DATABASE ?? "";
  const kafka = connectKafka(
    {
      KAFKA_BROKERS: [KAFKA_BROKERS],
      KAFKA_TLS: false,
      KAFKA_SASL_MECHANISM: undefined,
      KAFKA_USERNAME: undefined,
      KAFKA_PASSWORD: undefined,
    },
    "test",
  );
  const admin = kafka.admin();
  await admin.connect();
  let producer: Producer | undefined;
  let slot = "";
  const put = async (): Promise<void> => {
    const { stderr } = await shop.succeed("scripts/ops/connector.ts");
    slot = /slot=(\S+)/.exec(stderr)?.[1] ?? "";
  };
  if (connector) await put();
  else
    await admin.createTopics({
      topics: [
        {
          topic,
          numPartitions: partitions,
          replicationFactor: 1,
          configEntries: [{ name: "max.message.bytes", value: "10485760" }],
        },
      ],
      waitForLeaders: true,
    });

  const readings = async (of = database): Promise<Reading[]> => {
    const answer = await shop.clickhouse.query({
      query: `SELECT toString(id) AS id, sensor_id, metric, toString(value) AS value, toString(recorded_at) AS recorded_at FROM ${of}.sensor_readings FINAL ORDER BY sensor_readings.id`,
      format: "JSONEachRow",
    });
    return (await answer.json<Reading>()).map((row) => ({ ...row, value: number(row.value) }));
  };
  const source = async (): Promise<Reading[]> => {
    const rows = await shop.admin<Reading[]>`
      select id::text, sensor_id, metric, value::text, to_char(recorded_at at time zone 'UTC', 'YYYY-MM-DD HH24:MI:SS.US') as recorded_at
      from public.sensor_readings r order by r.id`;
    return rows.map((row) => ({ ...row, value: number(row.value) }));
  };

  return {
    shop,
    topic,
    admin,
    readings,
    source,
    connector: put,
    consumer: async (variables = {}) => {
      const process = shop.start("scripts/sensors.ts", variables);
      const url = process.line(/step=serving/).then((line) => new URL(/metrics=(\S+)/.exec(line)?.[1] ?? "").origin);
      url.catch(() => {});
      await process.line(/step=assigned/);
      return {
        ...process,
        url,
        metrics: async () => {
          const text = await (await fetch(`${await url}/metrics`)).text();
          return Object.fromEntries(
            [...text.matchAll(/^(\w+(?:\{.*\})?) (\S+)$/gm)].map(([, name, value]) => [name, Number(value)]),
          );
        },
      };
    },
    catchUp: async (variables = {}) =>
      void (await shop.succeed("scripts/sensors.ts", { ...variables, UNTIL: "caught-up" })),
    produce: async (messages) => {
      if (!producer) {
        producer = kafka.producer({ allowAutoTopicCreation: false, maxInFlightRequests: 1 });
        await producer.connect();
      }
      await producer.send({ topic, messages, acks: -1 });
    },
    equal: async (seconds = 60) => {
      const same = async (): Promise<boolean> => isDeepStrictEqual(await readings(), await source());
      await until("source and ClickHouse are the same", same, seconds).catch(async () => {
        assert.deepEqual(await readings(), await source());
      });
    },
    deadLetters: async () => {
      const answer = await shop.clickhouse.query({
        query:
          "SELECT epoch, partition, toString(offset) AS offset, reason, key, value FROM sensor_dead_letters FINAL ORDER BY epoch, partition, sensor_dead_letters.offset",
        format: "JSONEachRow",
      });
      return await answer.json();
    },
    [Symbol.asyncDispose]: async () => {
      if (slot) {
        await fetch(new URL(`/connectors/etl-${database}-sensor_readings`, CONNECT_URL), { method: "DELETE" });
        // A database cannot be dropped while it has a slot, nor a slot while it is used.
        await until("the connector's slot is dropped", async () => {
          const drop = shop.admin`select pg_drop_replication_slot(slot_name) from pg_replication_slots where slot_name = ${slot}`;
          return await drop.then(
            () => true,
            () => false,
          );
        });
      }
      await producer?.disconnect();
      await admin.deleteTopics({ topics: [topic] }).catch(() => {});
      await admin.disconnect();
      await shop[Symbol.asyncDispose]();
      const left = kafka.admin();
      await left.connect();
      await left.deleteGroups([group]).catch(() => {});
      await left.disconnect();
    },
  };
}
