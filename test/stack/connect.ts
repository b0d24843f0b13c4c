// Kafka Connect in distributed mode, one worker, with Debezium's Postgres connector: its jars are kafka.ts's.
import { writeFileSync } from "node:fs";
import { join } from "node:path";
import { type Env, endpoint } from "./env.ts";
import { java, kafkaInstall, properties } from "./kafka.ts";
import { answers } from "./process.ts";
import type { Part } from "./stack.ts";

const fileIn = (folder: string): string => join(folder, "worker.properties");

function settings(env: Env): string {
  const { host, port } = endpoint(env.CONNECT_URL ?? "");
  const json = "org.apache.kafka.connect.json.JsonConverter";
  return properties({
    "bootstrap.servers": env.KAFKA_BROKERS ?? "",
    listeners: `http://${host}:${port}`,
    "rest.advertised.host.name": host,
    "reconnect.backoff.max.ms": 250, // it starts beside the broker
    "group.id": "connect",
    "config.storage.topic": "connect-configs",
    "config.storage.replication.factor": 1,
    "offset.storage.topic": "connect-offsets",
    "offset.storage.replication.factor": 1,
    "offset.storage.partitions": 1,
    "status.storage.topic": "connect-status",
    "status.storage.replication.factor": 1,
    "status.storage.partitions": 1,
    "key.converter": json,
    "key.converter.schemas.enable": "false",
    "value.converter": json,
    "value.converter.schemas.enable": "false",
    // What a SIGKILL makes Debezium send again.
    "offset.flush.interval.ms": 1000,
    // The tasks of a killed worker are not kept for its return: there is no other.
    "scheduled.rebalance.max.delay.ms": 0,
    // A killed worker's successor waits for the end of its session (10 s by default, and no less than the broker allows, 6 s).
    "session.timeout.ms": 6000,
    "heartbeat.interval.ms": 2000,
    "producer.max.request.size": 10_485_760,
    "consumer.max.partition.fetch.bytes": 10_485_760,
    // Where a connector's configuration may refer to for a secret: ${file:PATH:KEY}.
    "config.providers": "file",
    "config.providers.file.class": "org.apache.kafka.common.config.provider.FileConfigProvider",
    // All is on the classpath and says what it is: no scan of every class.
    "plugin.discovery": "service_load",
  });
}

export const connect: Part = {
  name: "connect",
  variable: "CONNECT_URL",
  installs: [kafkaInstall],
  prepare: async (env, folder) => writeFileSync(fileIn(folder), settings(env)),
  // It waits for the broker itself, for a minute; so the two can start at the same time.
  command: (env, folder) => java("org.apache.kafka.connect.cli.ConnectDistributed", [fileIn(folder)], settings(env)),
  ready: (env) => answers(`${env.CONNECT_URL}/connectors`),
};
