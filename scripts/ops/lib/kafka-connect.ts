/**
 * Kafka Connect's REST interface, for Debezium's connector of schemas/debezium, and what the connector needs of the source and of Kafka.
 * Source: https://kafka.apache.org/documentation/#connect_rest
 */
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { setTimeout as delay } from "node:timers/promises";
import { type Env, postgresUrl, required, root, UsageError } from "../../../shared/env.ts";
import type { kafkaVariables } from "../../../shared/sensors/broker.ts";
import {
  allRunning,
  askConnect,
  type ConnectorStatus,
  connectVariables,
  namesOf,
  sourceTable,
} from "../../../shared/sensors/connector.ts";
import { connectKafka, createTopic, withAdmin } from "../../../shared/sensors/kafka.ts";
import { checkSession, connect } from "../../../shared/session.ts";

export const connectorVariables = { ...connectVariables, REPLICATION_DATABASE_URL: required(postgresUrl) };
type ConnectorEnv = Env<typeof connectorVariables> & { SENSORS_TOPIC: string };

/** schemas/debezium/sensor_readings.json, and what differs per installation. */
export function connectorConfig(env: ConnectorEnv): Record<string, string> {
  const config = JSON.parse(readFileSync(join(root, "schemas/debezium/sensor_readings.json"), "utf8"));
  const { hostname, port, pathname, username, password, searchParams } = new URL(env.REPLICATION_DATABASE_URL);
  const { prefix, slot } = namesOf(env);
  return {
    ...config,
    "topic.prefix": prefix,
    "slot.name": slot,
    "database.hostname": hostname.replaceAll(/[[\]]/g, ""),
    "database.port": port || "5432",
    "database.dbname": decodeURIComponent(pathname.slice(1)),
    "database.user": decodeURIComponent(username),
    "database.password": decodeURIComponent(password),
    "database.sslmode": searchParams.get("sslmode") ?? "prefer",
  };
}

/**
 * Compares the source with what the connector needs of it.
 * @throws UsageError that lists what is missing, with the SQL.
 */
export async function checkReplication(env: ConnectorEnv): Promise<void> {
  await using source = connect(env.REPLICATION_DATABASE_URL, { application: "etl:connector", timeoutSeconds: 30 });
  await checkSession("REPLICATION_DATABASE_URL", source);
  const [found] = await source<{ level: string; replicates: boolean; full: boolean | null; tables: string[] }[]>`
    select current_setting('wal_level') as level, (select rolreplication or rolsuper from pg_roles where rolname = current_user) as replicates,
      (select relreplident = 'f' from pg_class where oid = to_regclass(${sourceTable})) as full,
      array(select schemaname || '.' || tablename from pg_publication_tables where pubname = 'etl_sensors') as tables`;
  const faults = [];
  if (found?.level !== "logical")
    faults.push(`wal_level is ${found?.level}: alter system set wal_level = logical; and restart the server`);
  if (!found?.replicates) faults.push("the role may not replicate");
  if (found?.full !== true) faults.push(`table ${sourceTable} does not exist, or is not REPLICA IDENTITY FULL`);
  for (const needed of [sourceTable, "public.etl_heartbeat"])
    if (!found?.tables.includes(needed)) faults.push(`publication etl_sensors does not exist, or lacks ${needed}`);
  if (faults.length)
    throw new UsageError(
      `the source is not ready for Debezium:\n${faults.map((fault) => `  ${fault}`).join("\n")}\nRun sql/replication.sql in that database as a superuser, then: make connector`,
    );
}

/** Creates the topic as the file's topic.creation.default… say. @returns whether it was missing. */
export async function createReadingsTopic(
  env: Env<typeof kafkaVariables>,
  config: Record<string, string>,
): Promise<boolean> {
  const settings = Object.entries(config).map(([name, value]) => [name.split("topic.creation.default.")[1], value]);
  const { undefined: _, partitions, "replication.factor": replicas, ...others } = Object.fromEntries(settings);
  return await withAdmin(connectKafka(env, "etl-connector"), env, async (admin) => {
    if ((await admin.listTopics()).includes(env.SENSORS_TOPIC)) return false;
    return await createTopic(admin, {
      topic: env.SENSORS_TOPIC,
      numPartitions: Number(partitions),
      replicationFactor: Number(replicas),
      configEntries: Object.entries<string>(others).map(([name, value]) => ({ name, value })),
    });
  });
}

/**
 * A request to /connectors/NAME/…, repeated while Connect is rebalancing.
 * @returns the answer, or undefined where there is no such connector.
 * @throws Error with Connect's own words.
 */
async function request<T>(env: ConnectorEnv, method: string, path: string, body?: object): Promise<T | undefined> {
  for (let attempt = 1; ; attempt++) {
    const answer = await askConnect(env, method, path, body);
    const text = await answer.text();
    if (answer.status === 404) return undefined;
    if (answer.ok) return (text ? JSON.parse(text) : {}) as T;
    // 409, or 500 for reads (Kafka 4, HerderRequestHandler.completeRequest).
    const rebalancing = answer.status === 409 || text.includes("a rebalance is expected");
    if (!rebalancing || attempt === 60) {
      const { pathname } = new URL(answer.url);
      throw new Error(`Kafka Connect refused ${method} ${pathname}: HTTP ${answer.status} ${text.slice(0, 2000)}`);
    }
    await delay(500);
  }
}

const failedOf = (status?: ConnectorStatus) =>
  status && [status.connector, ...status.tasks].find(({ state }) => state === "FAILED");

/** Creates or changes the connector and lets it run. What has failed is restarted: an unchanged configuration does not do that. */
export async function putConnector(env: ConnectorEnv, config: Record<string, string>): Promise<void> {
  await request(env, "PUT", "/config", config);
  await request(env, "PUT", "/resume");
  await request(env, "POST", "/restart?includeTasks=true&onlyFailed=true");
  // Connect says so a moment later. Where it still says FAILED after that, it has failed again.
  for (const deadline = performance.now() + 5000; performance.now() < deadline; await delay(100))
    if (!failedOf(await request<ConnectorStatus>(env, "GET", "/status"))) return;
}

/**
 * Waits until the connector and its task run.
 * @throws Error with the trace of what failed, or its status after 90 s.
 */
export async function awaitRunning(env: ConnectorEnv): Promise<void> {
  await awaitStatus(env, "RUNNING", (status) => {
    const failed = failedOf(status);
    if (!failed) return allRunning(status);
    const words = failed.trace?.trim().replaceAll(/\n\tat .*/g, "") ?? "";
    const next = /replication slot/i.test(words)
      ? "Where the slot is gone, so are the changes since: make resnapshot"
      : "Fix it, then: make connector";
    throw new Error(`connector ${namesOf(env).connector} failed:\n${words}\n${next}`);
  });
}

async function awaitStatus(
  env: ConnectorEnv,
  wanted: string,
  done: (status: ConnectorStatus) => boolean,
): Promise<void> {
  let status: ConnectorStatus | undefined;
  for (const deadline = performance.now() + 90_000; performance.now() < deadline; await delay(200)) {
    status = await request<ConnectorStatus>(env, "GET", "/status");
    if (status && done(status)) return;
  }
  throw new Error(
    `connector ${namesOf(env).connector} is not ${wanted} after 90 s: ${JSON.stringify(status)}. Read its ` +
      `worker's log, then: make connector`,
  );
}

/** Stops the connector. One that does not exist is put first: Connect keeps the offsets even of one that was deleted. */
export async function stopConnector(env: ConnectorEnv, config: Record<string, string>): Promise<void> {
  if (!(await request(env, "GET", ""))) await request(env, "PUT", "/config", config);
  await request(env, "PUT", "/stop");
  await awaitStatus(env, "STOPPED", ({ connector, tasks }) => connector.state === "STOPPED" && tasks.length === 0);
}

/** Waits until the snapshot is in Kafka as a whole: the connector's offsets are then no longer a snapshot's. */
export async function awaitSnapshot(env: ConnectorEnv, progress: () => void): Promise<void> {
  for (;;) {
    await awaitRunning(env);
    const answer = await request<{ offsets: { offset: Record<string, unknown> }[] }>(env, "GET", "/offsets");
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
  await request(env, "DELETE", "/offsets");
  const { slot } = namesOf(env);
  await using source = connect(env.REPLICATION_DATABASE_URL, { application: "etl:resnapshot", timeoutSeconds: 30 });
  await checkSession("REPLICATION_DATABASE_URL", source);
  for (const deadline = performance.now() + 60_000; ; await delay(200))
    try {
      await source`select pg_terminate_backend(active_pid) from pg_replication_slots where slot_name = ${slot} and active_pid is not null`;
      await source`select pg_drop_replication_slot(slot_name) from pg_replication_slots where slot_name = ${slot}`;
      return;
    } catch (error) {
      const held = (error as { code?: string }).code === "55006"; // object_in_use
      if (!held || performance.now() > deadline) throw error;
    }
}
