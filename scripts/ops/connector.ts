#!/usr/bin/env -S npx tsx
/**
 * connector: puts schemas/debezium/sensor_readings.json to Kafka Connect, and waits until it runs.
 *
 *   the source       is looked at first (sql/doctor.sql); sql/replication.sql makes what is missing
 *   the topic        SENSORS_TOPIC, created as the file's topic.creation.default… say; one that exists must take what the connector sends
 *   the connector    named after the topic, as its slot, etl_PREFIX; the source's address and role are added to the file's settings
 *   safe to re-run   yes: a connector that is as the file says stays as it was
 */
import { readEnv } from "../../shared/env.ts";
import { log } from "../../shared/log.ts";
import { main } from "../../shared/main.ts";
import { kafkaVariables } from "../../shared/sensors/broker.ts";
import { checkDebezium, namesOf } from "../../shared/sensors/connector.ts";
import * as kafkaConnect from "./lib/kafka-connect.ts";

await main(import.meta, async () => {
  const env = readEnv({ ...kafkaConnect.connectorVariables, ...kafkaVariables });
  const debezium = await checkDebezium(env);
  await kafkaConnect.checkReplication(env);
  await kafkaConnect.createReadingsTopic(env);
  await kafkaConnect.startConnector(env);
  const { connector, slot } = namesOf(env);
  log({ step: "done", connector, slot, topic: env.SENSORS_TOPIC, state: "RUNNING", debezium });
});
