/**
 * Kafka Connect's REST interface, for Debezium's connector of schemas/debezium, and what the connector needs of the source and of Kafka.
 * Source: https://kafka.apache.org/documentation/#connect_rest
 */
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { setTimeout as delay } from "node:timers/promises";
import { type Env, like, optional, root, UsageError } from "../../../shared/env.ts";
import { thousands } from "../../../shared/log.ts";
import type { kafkaVariables } from "../../../shared/sensors/broker.ts";
import { canaryVariables } from "../../../shared/sensors/canary.ts";
import {
  allRunning,
  askConnect,
  type ConnectorStatus,
  connectorStatus,
  connectVariables,
  namesOf,
  sourceTable,
} from "../../../shared/sensors/connector.ts";
import { type Admin, ConfigResourceTypes, ConfigSource, connectKafka, createTopic, withAdmin } from "../../../shared/sensors/kafka.ts";
import { checkSession, openSession } from "../../../shared/session.ts";
import { waitUntil } from "./answer.ts";

export const connectorVariables = {
  ...connectVariables,
  ...canaryVariables,
  REPLICATION_PASSWORD_REFERENCE: optional(like(/^\$\{\w+:.+\}$/, "must be PROVIDER:PATH:KEY in braces, behind a $")),
};
export type ConnectorEnv = Env<typeof connectorVariables> & { SENSORS_TOPIC: string };

const file = "schemas/debezium/sensor_readings.json";
const readConfig = (): Record<string, string> => JSON.parse(readFileSync(join(root, file), "utf8"));

/** schemas/debezium/sensor_readings.json, and what differs per installation. */
export function connectorConfig(env: ConnectorEnv): Record<string, string> {
  const { hostname, port, pathname, username, password, searchParams } = new URL(env.REPLICATION_DATABASE_URL);
  const { prefix, slot } = namesOf(env);
  return {
    ...readConfig(),
    "topic.prefix": prefix,
    "slot.name": slot,
    "database.hostname": hostname.replaceAll(/[[\]]/g, ""),
    "database.port": port || "5432",
    "database.dbname": decodeURIComponent(pathname.slice(1)),
    "database.user": decodeURIComponent(username),
    "database.password": env.REPLICATION_PASSWORD_REFERENCE ?? decodeURIComponent(password),
    "database.sslmode": searchParams.get("sslmode") ?? "prefer",
  };
}

/**
 * Asks the source what the connector needs of it and has not.
 * @throws UsageError that lists it.
 */
export async function checkReplication(env: ConnectorEnv): Promise<void> {
  await using source = openSession(env.REPLICATION_DATABASE_URL, { application: "etl:connector", timeoutSeconds: 30 });
  await checkSession("REPLICATION_DATABASE_URL", source);
  const faults = await source.unsafe(readFileSync(join(root, "sql/replication_checks.sql"), "utf8"));
  if (faults.length)
    throw new UsageError(
      `the source is not ready for Debezium:\n${faults.map(({ fault }) => `  ${fault}`).join("\n")}\nRun ` +
        "sql/replication.sql in that database as an administrator, then: make connector",
    );
}

/**
 * Whether the connector can resume where it was: its slot still has what it has not read.
 * @throws UsageError where that is gone, which no restart brings back.
 */
export async function checkSlot(env: ConnectorEnv): Promise<void> {
  const stored = await askConnect<{ offsets: unknown[] }>(env, "GET", "/offsets");
  if (!stored?.offsets.length) return; // it begins with a snapshot
  await using source = openSession(env.REPLICATION_DATABASE_URL, { application: "etl:connector", timeoutSeconds: 30 });
  const { slot } = namesOf(env);
  const [found] = await source<{ wal: string }[]>`select wal_status as wal from pg_replication_slots where slot_name = ${slot}`;
  if (found && found.wal !== "lost") return;
  throw new UsageError(
    `slot ${slot} ${found ? "has lost WAL that the connector has not read" : "is gone from the source"}, and with it the changes ` +
      `since. Stop all consumers (systemctl stop etl-sensors), then run: make resnapshot`,
  );
}

/** Creates the topic as the file's topic.creation.default… say; of one that exists raises max.message.bytes, and it is not compacted. */
export async function createReadingsTopic(
  env: Env<typeof kafkaVariables>,
  config: Record<string, string>,
): Promise<"created" | "changed" | undefined> {
  const { SENSORS_TOPIC: topic } = env;
  const settings = Object.entries(config).map(([name, value]) => [name.split("topic.creation.default.")[1], value]);
  const { undefined: _, partitions, "replication.factor": replicas, ...wanted } = Object.fromEntries(settings);
  const entries = (values: Record<string, string>) => Object.entries(values).map(([name, value]) => ({ name, value }));
  return await withAdmin(connectKafka(env, "etl-connector"), env, async (admin) => {
    if (!(await admin.listTopics()).includes(topic)) {
      const numbers = { numPartitions: Number(partitions), replicationFactor: Number(replicas) };
      return (await createTopic(admin, { topic, ...numbers, configEntries: entries(wanted) })) ? "created" : undefined;
    }
    const { own, messageBytes, policy } = await readTopicSettings(admin, topic);
    const bytes = Math.max(messageBytes, Number(wanted["max.message.bytes"]));
    if (messageBytes === bytes && policy === "delete") return undefined;
    // kafkajs writes a topic's settings as a whole: those that are its own are written again as they are.
    const configEntries = entries({ ...own, "max.message.bytes": String(bytes), "cleanup.policy": "delete" });
    const resources = [{ type: ConfigResourceTypes.TOPIC, name: topic, configEntries }];
    await admin.alterConfigs({ validateOnly: false, resources });
    return "changed";
  });
}

/** @throws Error where Kafka would delete changes before they are read, or the topic refuses what the connector may send. */
export async function checkTopicSettings(admin: Admin, topic: string): Promise<void> {
  const { messageBytes, policy } = await readTopicSettings(admin, topic);
  if (policy !== "delete")
    throw new Error(
      `the topic's cleanup.policy is ${policy}: changes are lost that no consumer has read yet. Run: make connector (it sets delete)`,
    );
  const sent = Number(readConfig()["producer.override.max.request.size"]);
  if (messageBytes < sent)
    throw new Error(
      `the topic takes messages of ${thousands(messageBytes)} bytes, and the connector may send ${thousands(sent)}. Run: make connector ` +
        `(it raises max.message.bytes; where the service does not allow that, lower the sizes in ${file} before)`,
    );
}

/** The settings that are the topic's own, how large a message of it may be, in bytes, and its cleanup.policy. */
async function readTopicSettings(admin: Admin, topic: string) {
  const resources = [{ type: ConfigResourceTypes.TOPIC, name: topic }];
  const described = await admin.describeConfigs({ includeSynonyms: false, resources });
  const settings = described.resources[0]?.configEntries ?? [];
  const settingOf = (name: string) => settings.find(({ configName }) => configName === name)?.configValue;
  const own = settings.filter(({ configSource }) => configSource === ConfigSource.TOPIC_CONFIG);
  return {
    own: Object.fromEntries(own.map(({ configName, configValue }) => [configName, configValue])),
    messageBytes: Number(settingOf("max.message.bytes")),
    policy: settingOf("cleanup.policy"),
  };
}

/** Whether Connect shows the database's password to everybody. @throws Error where another setting is not what make connector puts. */
export async function checkConfig(env: ConnectorEnv): Promise<boolean> {
  const wanted: Record<string, string> = { name: namesOf(env).connector, ...connectorConfig(env) };
  const config = (await askConnect<Record<string, string>>(env, "GET", "/config")) ?? wanted;
  const others = Object.keys({ ...wanted, ...config }).filter((name) => name !== "database.password" && config[name] !== wanted[name]);
  if (others.length) throw new Error(`its ${others.join(", ")} is not what ${file} and .env say. Run: make connector`);
  return !/^\$\{/.test(config["database.password"] ?? "${");
}

const failureOf = ({ connector, tasks }: ConnectorStatus) => [connector, ...tasks].find(({ state }) => state === "FAILED");

/** A change carries the old row and the new: which rows are the largest at the source, and what lets them pass. */
async function nextOfLargeRow(env: ConnectorEnv): Promise<string> {
  const statement = `select id::text, octet_length(r::text) as bytes from ${sourceTable} r order by bytes desc limit 3`;
  await using source = openSession(env.REPLICATION_DATABASE_URL, { application: "etl:connector", timeoutSeconds: 60 });
  const rows = await source.unsafe<{ id: string; bytes: number }[]>(statement).catch(() => []); // of a large table it takes too long
  const largest = rows.map(({ id, bytes }) => `id=${id} of ${thousands(bytes)} bytes`).join(", ");
  return (
    `The largest rows of ${sourceTable}: ${largest || `ask the source: ${statement};`}. Raise max.message.bytes, max.request.size and ` +
    `buffer.memory in ${file}, then: make connector. Deleting the row is not enough: its change is in the WAL (make resnapshot)`
  );
}

/** Whether the connector and its task run. @param patient a failure is not the last word yet. @throws Error with a failure's trace. */
async function runs(env: ConnectorEnv, patient: boolean): Promise<boolean> {
  const status = await connectorStatus(env);
  const failed = status && failureOf(status);
  if (!status || !failed || patient) return status !== undefined && allRunning(status);
  const words = failed.trace?.trim().replaceAll(/\n\tat .*/g, "") ?? "";
  let next = "Fix it, then: make connector";
  if (/replication slot/i.test(words)) next = "Where the slot is gone, so are the changes since: make resnapshot";
  if (words.includes("RecordTooLargeException")) next = await nextOfLargeRow(env);
  throw new Error(`connector ${namesOf(env).connector} failed:\n${words}\n${next}`);
}

/**
 * Creates or changes the connector and waits until it and its task run. What has failed is restarted, which an unchanged configuration
 * does not do; Connect says FAILED for a moment after that.
 * @throws Error with the trace of what failed, or its status after 90 s.
 */
export async function startConnector(env: ConnectorEnv, config: Record<string, string>): Promise<void> {
  await askConnect(env, "PUT", "/config", config).catch((error: Error) => {
    // Of a reference that it cannot resolve, Connect says nothing useful.
    const resolve = 'Can its worker resolve REPLICATION_PASSWORD_REFERENCE? ops/README.md, "Kafka and ClickHouse"';
    throw env.REPLICATION_PASSWORD_REFERENCE ? new Error(`${error.message}. ${resolve}`) : error;
  });
  const before = await connectorStatus(env);
  await askConnect(env, "PUT", "/resume");
  await askConnect(env, "POST", "/restart?includeTasks=true&onlyFailed=true");
  const started = performance.now();
  await awaitState(env, "RUNNING", () => runs(env, performance.now() - started < 5000));
  // What a task has failed of may come again a moment after it runs.
  if (!before || !failureOf(before)) return;
  for (let seconds = 0; seconds < 30; seconds++, await delay(1000)) await runs(env, false);
}

const awaitState = (env: ConnectorEnv, wanted: string, done: () => Promise<boolean>): Promise<void> =>
  waitUntil(done, 90, `connector ${namesOf(env).connector} is not ${wanted} after 90 s. Read its worker's log, then: make connector`);

/** Stops the connector. One that does not exist is put first: Connect keeps the offsets even of one that was deleted. */
export async function stopConnector(env: ConnectorEnv, config: Record<string, string>): Promise<void> {
  if (!(await askConnect(env, "GET", ""))) await askConnect(env, "PUT", "/config", config);
  await askConnect(env, "PUT", "/stop");
  await awaitState(env, "STOPPED", async () => {
    const status = await connectorStatus(env);
    return status?.connector.state === "STOPPED" && status.tasks.length === 0;
  });
}

/** Waits until the snapshot is in Kafka as a whole: the connector's offsets are then no longer a snapshot's. */
export async function awaitSnapshot(env: ConnectorEnv, progress: () => void): Promise<void> {
  for (;;) {
    await awaitState(env, "RUNNING", () => runs(env, false));
    const answer = await askConnect<{ offsets: { offset: Record<string, unknown> }[] }>(env, "GET", "/offsets");
    const offset = answer?.offsets[0]?.offset;
    if (offset && !offset.snapshot && !("snapshot_completed" in offset && !offset.snapshot_completed)) return;
    progress();
    await delay(500);
  }
}

/**
 * Forgets how far the stopped connector was, in Connect and at the source, whose slot is dropped: started again, it begins with a
 * snapshot. A task that was stopped while it started may hold the slot for seconds after Connect says STOPPED: its session is ended.
 * @throws Error where the slot is still held after 60 s.
 */
export async function forgetProgress(env: ConnectorEnv): Promise<void> {
  await askConnect(env, "DELETE", "/offsets");
  const { slot } = namesOf(env);
  await using source = openSession(env.REPLICATION_DATABASE_URL, { application: "etl:resnapshot", timeoutSeconds: 30 });
  await checkSession("REPLICATION_DATABASE_URL", source);
  const drop = async (): Promise<boolean> => {
    await source`select pg_terminate_backend(active_pid) from pg_replication_slots where slot_name = ${slot} and active_pid is not null`;
    await source`select pg_drop_replication_slot(slot_name) from pg_replication_slots where slot_name = ${slot} and not active`;
    return (await source`select from pg_replication_slots where slot_name = ${slot}`).count === 0;
  };
  const next = "End the session that holds it (pg_replication_slots.active_pid), then: make resnapshot";
  await waitUntil(drop, 60, `slot ${slot} is still held after 60 s. ${next}`);
}
