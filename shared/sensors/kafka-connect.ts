/**
 * Kafka Connect's REST interface, for Debezium's connector of schemas/debezium. Source:
 * https://kafka.apache.org/documentation/#connect_rest
 */
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { setTimeout as delay } from "node:timers/promises";
import { type Env, httpUrl, postgresUrl, redact, required, root, UsageError } from "../env.ts";
import { checkSession, connect } from "../session.ts";
import { connectKafka, createTopic, type KafkaEnv, withAdmin } from "./kafka.ts";

export const connectorVariables = {
  CONNECT_URL: required(httpUrl),
  REPLICATION_DATABASE_URL: required(postgresUrl),
};
type RequestEnv = { CONNECT_URL: string; SENSORS_TOPIC: string };
type ConnectEnv = Env<typeof connectorVariables> & { SENSORS_TOPIC: string };

const file = "schemas/debezium/sensor_readings.json";
/** What the connector reads. */
export const sourceTable = "public.sensor_readings";

/** What the topic's name decides: Debezium's prefix, the connector's name, the slot at the source. */
export function namesOf({
  SENSORS_TOPIC: topic,
}: {
  SENSORS_TOPIC: string;
}): Record<"prefix" | "connector" | "slot", string> {
  if (!topic.endsWith(`.${sourceTable}`))
    throw new UsageError(
      `SENSORS_TOPIC ${topic} must end with .${sourceTable}: Debezium names a topic PREFIX.SCHEMA.TABLE`,
    );
  const prefix = topic.slice(0, -sourceTable.length - 1);
  return {
    prefix,
    connector: `etl-${prefix}-sensor_readings`,
    slot: `etl_${prefix.toLowerCase().replaceAll(/\W/g, "_")}`,
  };
}

/** The committed file, and what differs per installation. */
export function connectorConfig(env: ConnectEnv): Record<string, string> {
  const config = JSON.parse(readFileSync(join(root, file), "utf8")) as Record<string, string>;
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
export async function checkReplication(env: ConnectEnv): Promise<void> {
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
  if (found?.full !== true) faults.push(`table ${sourceTable} is not there, or not REPLICA IDENTITY FULL`);
  for (const needed of [sourceTable, "public.etl_heartbeat"])
    if (!found?.tables.includes(needed)) faults.push(`publication etl_sensors is not there, or lacks ${needed}`);
  if (faults.length)
    throw new UsageError(
      `the source is not ready for Debezium:\n${faults.map((fault) => `  ${fault}`).join("\n")}\nRun sql/replication.sql in that database as a superuser, then: make connector`,
    );
}

/** Creates the topic as the file's topic.creation.default… say. @returns whether it was missing. */
export async function createReadingsTopic(
  env: KafkaEnv & ConnectEnv,
  config: Record<string, string>,
): Promise<boolean> {
  const settings = Object.entries(config)
    .filter(([name]) => name.startsWith("topic.creation.default."))
    .map(([name, value]) => ({ name: name.slice("topic.creation.default.".length), value }));
  const number = (name: string): number => Number(settings.find((one) => one.name === name)?.value);
  return await withAdmin(connectKafka(env, "etl-connector"), env, async (admin) => {
    if ((await admin.listTopics()).includes(env.SENSORS_TOPIC)) return false;
    return await createTopic(admin, {
      topic: env.SENSORS_TOPIC,
      numPartitions: number("partitions"),
      replicationFactor: number("replication.factor"),
      configEntries: settings.filter(({ name }) => !["partitions", "replication.factor"].includes(name)),
    });
  });
}

interface Status {
  connector: { state: string; trace?: string };
  tasks: { id: number; state: string; trace?: string }[];
}

/**
 * A request to /connectors/NAME/…
 * @returns the answer, or undefined where there is no such connector.
 * @throws Error with Connect's own words.
 */
async function request<T>(env: RequestEnv, method: string, path: string, body?: object): Promise<T | undefined> {
  const { connector } = namesOf(env);
  const url = new URL(`/connectors/${connector}${path}`, env.CONNECT_URL);
  for (let attempt = 1; ; attempt++) {
    const answer = await fetch(url, {
      method,
      headers: { "content-type": "application/json" },
      ...(body ? { body: JSON.stringify(body) } : {}),
      signal: AbortSignal.timeout(60_000),
    }).catch((error: Error) => {
      const { code, message } = (error.cause ?? error) as { code?: string; message: string };
      throw new Error(
        redact(
          `Kafka Connect at ${env.CONNECT_URL} (CONNECT_URL) does not answer: ${message || code}. For the local stack: make up`,
        ),
      );
    });
    const text = await answer.text();
    if (answer.status === 404) return undefined;
    if (answer.ok) return (text ? JSON.parse(text) : {}) as T;
    // The workers are sharing out the work anew: 409, or, of what is only read, 500 (Kafka 4, HerderRequestHandler.completeRequest).
    const rebalancing = answer.status === 409 || text.includes("a rebalance is expected");
    if (!rebalancing || attempt === 60)
      throw new Error(`Kafka Connect refused ${method} ${url.pathname}: HTTP ${answer.status} ${text.slice(0, 2000)}`);
    await delay(500);
  }
}

/** Creates or changes the connector and lets it run. What has failed is started again: a configuration that is the same does not do that. */
export async function putConnector(env: ConnectEnv, config: Record<string, string>): Promise<void> {
  await request(env, "PUT", "/config", config);
  await request(env, "PUT", "/resume");
  await request(env, "POST", "/restart?includeTasks=true&onlyFailed=true");
  // Connect says so a moment later. Where it still says FAILED after that, it has failed again.
  for (const deadline = performance.now() + 5000; performance.now() < deadline; await delay(100))
    if (!failedOf(await request<Status>(env, "GET", "/status"))) return;
}

const failedOf = (status?: Status) =>
  status && [status.connector, ...status.tasks].find(({ state }) => state === "FAILED");

const allRunning = ({ connector, tasks }: Status): boolean =>
  tasks.length > 0 && [connector, ...tasks].every(({ state }) => state === "RUNNING");

/** Whether the connector and its task run. @throws Error where Connect does not answer. */
export async function isRunning(env: RequestEnv): Promise<boolean> {
  const status = await request<Status>(env, "GET", "/status");
  return status !== undefined && allRunning(status);
}

/**
 * Waits until the connector and its task run.
 * @throws Error with the trace of what failed, or where it stands after 90 s.
 */
export async function awaitRunning(env: ConnectEnv): Promise<void> {
  const { connector } = namesOf(env);
  await awaitStatus(env, "RUNNING", (status) => {
    const failed = failedOf(status);
    if (failed) {
      const words =
        failed.trace
          ?.trim()
          .split("\n")
          .filter((line) => !line.startsWith("\tat ")) ?? [];
      const next = /replication slot/i.test(words.join())
        ? "Where the slot is gone, so are the changes since: make resnapshot"
        : "Mend what it says, then: make connector";
      throw new Error(`connector ${connector} failed:\n${words.join("\n")}\n${next}`);
    }
    return allRunning(status);
  });
}

async function awaitStatus(env: ConnectEnv, wanted: string, done: (status: Status) => boolean): Promise<void> {
  let status: Status | undefined;
  for (const deadline = performance.now() + 90_000; performance.now() < deadline; await delay(200)) {
    status = await request<Status>(env, "GET", "/status");
    if (status && done(status)) return;
  }
  throw new Error(
    `connector ${namesOf(env).connector} is not ${wanted} after 90 s: ${JSON.stringify(status)}. Its worker's log says more`,
  );
}

/** Stops the connector. One that is not there is put first: Connect keeps the offsets even of one that was deleted. */
export async function stopConnector(env: ConnectEnv, config: Record<string, string>): Promise<void> {
  if (!(await request(env, "GET", ""))) await request(env, "PUT", "/config", config);
  await request(env, "PUT", "/stop");
  await awaitStatus(env, "STOPPED", ({ connector, tasks }) => connector.state === "STOPPED" && tasks.length === 0);
}

/** Forgets how far the stopped connector was: started again, it begins with a snapshot. */
export async function forgetConnector(env: ConnectEnv): Promise<void> {
  await request(env, "DELETE", "/offsets");
}

/** Waits until the snapshot is in Kafka as a whole: the connector's offsets are then no longer a snapshot's. */
export async function awaitSnapshot(env: ConnectEnv, progress: () => void): Promise<void> {
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
 * Drops the stopped connector's slot at the source, if there is one: a new one begins where the next snapshot does. A task that was
 * stopped while it started may hold the slot for some seconds after Connect says STOPPED: its session is ended.
 * @throws Error where the slot is still held after 60 s.
 */
export async function dropSlot(env: ConnectEnv): Promise<void> {
  const { slot } = namesOf(env);
  await using source = connect(env.REPLICATION_DATABASE_URL, { application: "etl:resnapshot", timeoutSeconds: 30 });
  await checkSession("REPLICATION_DATABASE_URL", source);
  for (const deadline = performance.now() + 60_000; ; await delay(200)) {
    try {
      await source`select pg_terminate_backend(active_pid) from pg_replication_slots where slot_name = ${slot} and active_pid is not null`;
      await source`select pg_drop_replication_slot(slot_name) from pg_replication_slots where slot_name = ${slot}`;
      return;
    } catch (error) {
      const held = (error as { code?: string }).code === "55006"; // object_in_use
      if (!held || performance.now() > deadline) throw error;
    }
  }
}
