/**
 * Kafka Connect's REST interface, for Debezium's connector of schemas/debezium, and what the connector needs of the source and of Kafka.
 * Source: https://kafka.apache.org/documentation/#connect_rest
 */
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { setTimeout as delay } from "node:timers/promises";
import { type Env, like, optional, parsePostgresUrl, root, UsageError } from "../../../shared/env.ts";
import { log, progress, thousands } from "../../../shared/log.ts";
import type { kafkaVariables } from "../../../shared/sensors/broker.ts";
import { canaryVariables } from "../../../shared/sensors/canary.ts";
import * as connect from "../../../shared/sensors/connector.ts";
import { type Admin, ConfigResourceTypes, connectKafka, createTopic, withAdmin } from "../../../shared/sensors/kafka.ts";
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
function connectorConfig({ REPLICATION_DATABASE_URL: url, ...env }: ConnectorEnv): Record<string, string> {
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

/** Creates the topic as the file's topic.creation.default… say. @throws Error where it exists and is not as the connector needs it. */
export async function createReadingsTopic(env: Env<typeof kafkaVariables>): Promise<void> {
  const { SENSORS_TOPIC: topic } = env;
  const [config, prefix] = [readConfig(), "topic.creation.default."];
  const settings = Object.entries(config).filter(([name]) => name.startsWith(prefix) && !/partitions$|factor$/.test(name));
  const configEntries = settings.map(([name, value]) => ({ name: name.slice(prefix.length), value }));
  await withAdmin(connectKafka(env, "etl-connector"), env, async (admin) => {
    if ((await admin.listTopics()).includes(topic)) return await checkTopicSettings(admin, env);
    const [numPartitions = 0, replicationFactor = 0] = ["partitions", "replication.factor"].map((name) => Number(config[prefix + name]));
    if (await createTopic(admin, { topic, numPartitions, replicationFactor, configEntries })) log({ step: "created", topic });
  });
}

/** @throws Error where Kafka would delete changes before they are read, or the topic refuses what the connector may send. */
export async function checkTopicSettings(admin: Admin, env: Env<typeof kafkaVariables>): Promise<void> {
  const { SENSORS_TOPIC: name, KAFKA_BROKERS } = env;
  const resource = { type: ConfigResourceTypes.TOPIC, name, configNames: ["cleanup.policy", "max.message.bytes"] };
  const { resources } = await admin.describeConfigs({ includeSynonyms: false, resources: [resource] });
  const set = new Map(resources[0]?.configEntries.map(({ configName, configValue }) => [configName, configValue]));
  const [policy, bytes] = [set.get("cleanup.policy"), Number(set.get("max.message.bytes"))];
  const sent = Number(readConfig()["producer.override.max.request.size"]);
  if (policy === "delete" && bytes >= sent) return;
  const add = `--entity-name ${name} --add-config cleanup.policy=delete,max.message.bytes=${sent}`;
  throw new Error(
    `topic ${name} has cleanup.policy=${policy} and max.message.bytes=${bytes}: it would lose changes that are not read yet, or refuse ` +
      `large ones. Run: kafka-configs.sh --bootstrap-server ${KAFKA_BROKERS} --alter --entity-type topics ${add}; ` +
      `where the service does not allow it, lower the sizes in ${file}. Then: make connector`,
  );
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
export async function startConnector(env: ConnectorEnv): Promise<void> {
  await connect.askConnect(env, "PUT", "/config", connectorConfig(env)).catch((error: Error) => {
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
export async function stopConnector(env: ConnectorEnv): Promise<void> {
  if (!(await connect.askConnect(env, "GET", ""))) await connect.askConnect(env, "PUT", "/config", connectorConfig(env));
  await connect.askConnect(env, "PUT", "/stop");
  await awaitState(env, "STOPPED", async () => {
    const status = await connect.connectorStatus(env);
    return status?.connector.state === "STOPPED" && status.tasks.length === 0;
  });
}

/** Waits until the snapshot is in Kafka as a whole: the connector's offsets are then no longer a snapshot's. */
export async function awaitSnapshot(env: ConnectorEnv): Promise<void> {
  for (let seconds = 0; ; seconds++, await delay(1000)) {
    await awaitState(env, "RUNNING", () => runs(env));
    const answer = await connect.askConnect<{ offsets: { offset: Record<string, unknown> }[] }>(env, "GET", "/offsets");
    const offset = answer?.offsets[0]?.offset;
    const isDone = offset && !offset.snapshot && !("snapshot_completed" in offset && !offset.snapshot_completed);
    progress(isDone ? "" : `the snapshot goes to Kafka: ${seconds} s`);
    if (isDone) return;
  }
}

/** Forgets how far the stopped connector was, in Connect and at the source, whose slot is dropped: it begins again with a snapshot. */
export async function forgetProgress(env: ConnectorEnv): Promise<void> {
  await connect.askConnect(env, "DELETE", "/offsets");
  const { slot } = connect.namesOf(env);
  await using source = openSession(env.REPLICATION_DATABASE_URL, { application: "etl:resnapshot", timeoutSeconds: 30 });
  // A task that was stopped while it started may hold the slot for seconds.
  await source`select pg_terminate_backend(active_pid, 20000) from pg_replication_slots where slot_name = ${slot} and active`;
  await source`select pg_drop_replication_slot(slot_name) from pg_replication_slots where slot_name = ${slot}`;
}
