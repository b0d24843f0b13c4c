/**
 * Kafka Connect's REST interface, for Debezium's connector of schemas/debezium, and what the connector needs of the source and of Kafka.
 * Source: https://kafka.apache.org/documentation/#connect_rest
 */
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { setTimeout as delay } from "node:timers/promises";
import { type Env, like, optional, parsePostgresUrl, root, UsageError } from "../../../shared/env.ts";
import { log, thousands } from "../../../shared/log.ts";
import type { kafkaVariables } from "../../../shared/sensors/broker.ts";
import { canaryVariables } from "../../../shared/sensors/canary.ts";
import * as connect from "../../../shared/sensors/connector.ts";
import { type Admin, ConfigResourceTypes, ConfigSource, connectKafka, createTopic, withAdmin } from "../../../shared/sensors/kafka.ts";
import { checkSession, openSession } from "../../../shared/session.ts";
import { waitUntil } from "./answer.ts";
import { askCatalogue, type CatalogueCheck } from "./catalogue.ts";

export const connectorVariables = {
  ...connect.connectVariables,
  ...canaryVariables,
  REPLICATION_PASSWORD_REFERENCE: optional(like(/^\$\{\w+:.+\}$/, "must be PROVIDER:PATH:KEY in braces, behind a $")),
};
export type ConnectorEnv = Env<typeof connectorVariables> & { SENSORS_TOPIC: string };

const file = "schemas/debezium/sensor_readings.json";
const readConfig = (): Record<string, string> => JSON.parse(readFileSync(join(root, file), "utf8"));

/** schemas/debezium/sensor_readings.json, and what differs per installation. */
export function connectorConfig({ REPLICATION_DATABASE_URL: url, ...env }: ConnectorEnv): Record<string, string> {
  const { host, port, database, user, password, ...parsed } = parsePostgresUrl(url);
  const { prefix, slot } = connect.namesOf(env);
  const sslmode = url.includes("sslmode=") ? parsed.sslmode : "prefer"; // Debezium encrypts where it can
  const login = { "database.user": user, "database.password": env.REPLICATION_PASSWORD_REFERENCE ?? password };
  const server = { "database.hostname": host, "database.port": String(port), "database.dbname": database, "database.sslmode": sslmode };
  return { ...readConfig(), "topic.prefix": prefix, "slot.name": slot, ...server, ...login };
}

/** What the connector needs of the source, and whether its slot still has what it has not read, as sql/doctor.sql checks it. */
export async function askReplication(env: ConnectorEnv): Promise<CatalogueCheck[]> {
  // Where Connect is away, that is said elsewhere.
  const stored = await connect.askConnect<{ offsets: unknown[] }>(env, "GET", "/offsets").catch(() => undefined);
  await using source = openSession(env.REPLICATION_DATABASE_URL, { application: "etl:connector", timeoutSeconds: 30 });
  await checkSession("REPLICATION_DATABASE_URL", source);
  const settings = { "etl.slot": connect.namesOf(env).slot, "etl.resumes": stored?.offsets.length ? "1" : "" };
  return await askCatalogue(source, "replication", settings);
}

/** @param slot false where it is to be made again. @throws UsageError with what is missing, and what to do. */
export async function checkReplication(env: ConnectorEnv, slot = true): Promise<void> {
  const faults = (await askReplication(env)).filter(({ check, ok }) => !ok && (slot || !check.startsWith("slot ")));
  if (faults.length) throw new UsageError(faults.map(({ check, remedy }) => `${check}: ${remedy}`).join("\n"));
}

/** Creates the topic as the file's topic.creation.default… say; of one that exists raises max.message.bytes, and it is not compacted. */
export async function createReadingsTopic(env: Env<typeof kafkaVariables>, config: Record<string, string>): Promise<void> {
  const { SENSORS_TOPIC: topic } = env;
  const settings = Object.entries(config).map(([name, value]) => [name.split("topic.creation.default.")[1], value]);
  const { undefined: _, partitions, "replication.factor": replicas, ...wanted } = Object.fromEntries(settings);
  const { "max.message.bytes": max_message_bytes } = wanted;
  await withAdmin(connectKafka(env, "etl-connector"), env, async (admin) => {
    if (!(await admin.listTopics()).includes(topic)) {
      const numbers = { numPartitions: Number(partitions), replicationFactor: Number(replicas) };
      const configEntries = Object.entries<string>(wanted).map(([name, value]) => ({ name, value }));
      if (await createTopic(admin, { topic, ...numbers, configEntries })) log({ step: "created", topic, max_message_bytes });
      return;
    }
    const { own, messageBytes, policy } = await readTopicSettings(admin, topic);
    const bytes = String(Math.max(messageBytes, Number(max_message_bytes)));
    if (messageBytes === Number(bytes) && policy === "delete") return;
    // kafkajs writes a topic's settings as a whole: those that are its own are written again as they are.
    const changed = Object.entries({ "max.message.bytes": bytes, "cleanup.policy": "delete" }).map(([name, value]) => ({ name, value }));
    await admin.alterConfigs({ validateOnly: false, resources: [{ ...resourceOf(topic), configEntries: [...own, ...changed] }] });
    log({ step: "changed", topic, max_message_bytes: bytes });
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
  const fault = `the topic takes messages of ${thousands(messageBytes)} bytes, and the connector may send ${thousands(sent)}`;
  const next = `Run: make connector, which raises that; where the service does not allow it, lower the sizes in ${file} before`;
  if (messageBytes < sent) throw new Error(`${fault}. ${next}`);
}

const resourceOf = (name: string) => ({ type: ConfigResourceTypes.TOPIC, name });

/** How large a message of the topic may be, in bytes; its cleanup.policy; and what else is set for the topic itself. */
async function readTopicSettings(admin: Admin, topic: string) {
  const { resources } = await admin.describeConfigs({ includeSynonyms: false, resources: [resourceOf(topic)] });
  const settings = resources[0]?.configEntries ?? [];
  const [limit, policy] = ["max.message.bytes", "cleanup.policy"].map((name) => settings.find(({ configName }) => configName === name));
  const own = settings.filter((one) => one !== limit && one !== policy && one.configSource === ConfigSource.TOPIC_CONFIG);
  return {
    messageBytes: Number(limit?.configValue),
    policy: policy?.configValue,
    own: own.map(({ configName: name, configValue: value }) => ({ name, value })),
  };
}

/** Whether Connect shows the database's password to everybody. @throws Error where another setting is not what make connector puts. */
export async function checkConfig(env: ConnectorEnv): Promise<boolean> {
  const wanted: Record<string, string> = { name: connect.namesOf(env).connector, ...connectorConfig(env) };
  const config = (await connect.askConnect<Record<string, string>>(env, "GET", "/config")) ?? wanted;
  const others = Object.keys({ ...wanted, ...config }).filter((name) => name !== "database.password" && config[name] !== wanted[name]);
  if (others.length) throw new Error(`its ${others.join(", ")} is not what ${file} and .env say. Run: make connector`);
  return !/^\$\{/.test(config["database.password"] ?? "${");
}

const failureOf = ({ connector, tasks }: connect.ConnectorStatus) => [connector, ...tasks].find(({ state }) => state === "FAILED");

/** A change carries the old row and the new: which rows are the largest at the source, and what lets them pass. */
async function nextOfLargeRow(env: ConnectorEnv): Promise<string> {
  const statement = `select id::text, octet_length(r::text) as bytes from ${connect.sourceTable} r order by bytes desc limit 3`;
  await using source = openSession(env.REPLICATION_DATABASE_URL, { application: "etl:connector", timeoutSeconds: 60 });
  const rows = await source.unsafe<{ id: string; bytes: number }[]>(statement).catch(() => []); // of a large table it takes too long
  const largest = rows.map(({ id, bytes }) => `id=${id} of ${thousands(bytes)} bytes`).join(", ");
  const raise = `Raise max.message.bytes, max.request.size and buffer.memory in ${file}, then: make connector`;
  const not = "Deleting the row is not enough: its change is in the WAL (make resnapshot)";
  return `The largest rows of ${connect.sourceTable}: ${largest || `ask the source: ${statement};`}. ${raise}. ${not}`;
}

/** Whether the connector and its task run. @throws Error with a failure's trace. */
async function runs(env: ConnectorEnv): Promise<boolean> {
  const status = await connect.connectorStatus(env);
  const failed = status && failureOf(status);
  if (!failed) return connect.allRunning(status);
  const words = failed.trace?.trim().replaceAll(/\n\tat .*/g, "") ?? "";
  let next = "Fix it, then: make connector";
  if (/replication slot/i.test(words)) next = "Where the slot is gone, so are the changes since: make resnapshot";
  if (words.includes("RecordTooLargeException")) next = await nextOfLargeRow(env);
  throw new Error(`connector ${connect.namesOf(env).connector} failed:\n${words}\n${next}`);
}

/** Creates or changes the connector, restarts what has failed, and waits until all runs. @throws Error with the trace of what failed. */
export async function startConnector(env: ConnectorEnv, config: Record<string, string>): Promise<void> {
  await connect.askConnect(env, "PUT", "/config", config).catch((error: Error) => {
    // Of a reference that it cannot resolve, Connect says nothing useful.
    const resolve = 'Can its worker resolve REPLICATION_PASSWORD_REFERENCE? ops/README.md, "Kafka and ClickHouse"';
    throw env.REPLICATION_PASSWORD_REFERENCE ? new Error(`${error.message}. ${resolve}`) : error;
  });
  const before = await connect.connectorStatus(env);
  const restarts = before !== undefined && failureOf(before) !== undefined;
  await connect.askConnect(env, "PUT", "/resume");
  await connect.askConnect(env, "POST", "/restart?includeTasks=true&onlyFailed=true");
  if (restarts) await delay(5000); // Connect says FAILED for a moment more
  await awaitState(env, "RUNNING", () => runs(env));
  // What a task has failed of may come again a moment after it runs.
  for (let seconds = 0; restarts && seconds < 30; seconds++, await delay(1000)) await runs(env);
}

function awaitState(env: ConnectorEnv, wanted: string, done: () => Promise<boolean>): Promise<void> {
  const late = `connector ${connect.namesOf(env).connector} is not ${wanted} after 90 s`;
  return waitUntil(done, 90, `${late}. Read its worker's log, then: make connector`);
}

/** Stops the connector. One that does not exist is put first: Connect keeps the offsets even of one that was deleted. */
export async function stopConnector(env: ConnectorEnv, config: Record<string, string>): Promise<void> {
  if (!(await connect.askConnect(env, "GET", ""))) await connect.askConnect(env, "PUT", "/config", config);
  await connect.askConnect(env, "PUT", "/stop");
  await awaitState(env, "STOPPED", async () => {
    const status = await connect.connectorStatus(env);
    return status?.connector.state === "STOPPED" && status.tasks.length === 0;
  });
}

/** Waits until the snapshot is in Kafka as a whole: the connector's offsets are then no longer a snapshot's. */
export async function awaitSnapshot(env: ConnectorEnv, progress: () => void): Promise<void> {
  for (;;) {
    await awaitState(env, "RUNNING", () => runs(env));
    const answer = await connect.askConnect<{ offsets: { offset: Record<string, unknown> }[] }>(env, "GET", "/offsets");
    const offset = answer?.offsets[0]?.offset;
    if (offset && !offset.snapshot && !("snapshot_completed" in offset && !offset.snapshot_completed)) return;
    progress();
    await delay(500);
  }
}

/** Forgets how far the stopped connector was, in Connect and at the source, whose slot is dropped: it begins again with a snapshot. */
export async function forgetProgress(env: ConnectorEnv): Promise<void> {
  await connect.askConnect(env, "DELETE", "/offsets");
  const { slot } = connect.namesOf(env);
  await using source = openSession(env.REPLICATION_DATABASE_URL, { application: "etl:resnapshot", timeoutSeconds: 30 });
  await checkSession("REPLICATION_DATABASE_URL", source);
  const drop = async (): Promise<boolean> => {
    // A task that was stopped while it started may hold the slot for seconds.
    await source`select pg_terminate_backend(active_pid) from pg_replication_slots where slot_name = ${slot} and active_pid is not null`;
    await source`select pg_drop_replication_slot(slot_name) from pg_replication_slots where slot_name = ${slot} and not active`;
    return (await source`select from pg_replication_slots where slot_name = ${slot}`).count === 0;
  };
  const next = "End the session that holds it (pg_replication_slots.active_pid), then: make resnapshot";
  await waitUntil(drop, 60, `slot ${slot} is still held after 60 s. ${next}`);
}
