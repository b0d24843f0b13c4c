/** Debezium's connector: its names, Kafka Connect's REST interface, and whether it runs. */
import { setTimeout as delay } from "node:timers/promises";
import { baseUrl, required, UsageError } from "../env.ts";
import { ask, below } from "../http.ts";

export const connectVariables = { CONNECT_URL: required(baseUrl) };
export type ConnectEnv = { CONNECT_URL: string; SENSORS_TOPIC: string };

/** What the connector reads. */
export const sourceTable = "public.sensor_readings";

/** What the topic's name decides: Debezium's prefix, the connector's name, the slot at the source. */
export function namesOf(env: { SENSORS_TOPIC: string }): Record<"prefix" | "connector" | "slot", string> {
  const { SENSORS_TOPIC: topic } = env;
  if (!topic.endsWith(`.${sourceTable}`))
    throw new UsageError(`SENSORS_TOPIC ${topic} must end with .${sourceTable}: Debezium names a topic PREFIX.SCHEMA.TABLE`);
  const prefix = topic.slice(0, -sourceTable.length - 1);
  return {
    prefix,
    connector: `etl-${prefix}-sensor_readings`,
    slot: `etl_${prefix.toLowerCase().replaceAll(/\W/g, "_")}`,
  };
}

/** What Kafka Connect answers to GET …/status. */
export interface ConnectorStatus {
  connector: { state: string; trace?: string };
  tasks: { id: number; state: string; trace?: string }[];
}

/** Whether there is a connector, and it and its task run. */
export function allRunning(status?: ConnectorStatus): boolean {
  const parts = status ? [status.connector, ...status.tasks] : [];
  return parts.length > 1 && parts.every(({ state }) => state === "RUNNING");
}

/**
 * A request to /connectors/NAME/…, repeated while Connect is rebalancing. https://kafka.apache.org/documentation/#connect_rest
 * @returns the answer, or undefined where there is no such connector.
 * @throws Error where Connect does not answer, or with its own words.
 */
export async function askConnect<T>(env: ConnectEnv, method: string, path: string, body?: object): Promise<T | undefined> {
  const url = below(env.CONNECT_URL, `connectors/${namesOf(env).connector}${path}`);
  const init = { method, headers: { "content-type": "application/json" }, ...(body && { body: JSON.stringify(body) }) };
  for (let attempt = 1; ; attempt++) {
    const answer = await ask("CONNECT_URL", url, init, 60);
    const text = await answer.text();
    if (answer.status === 404) return undefined;
    if (answer.ok) return (text ? JSON.parse(text) : {}) as T;
    // 409, or 500 for reads (Kafka 4, HerderRequestHandler.completeRequest).
    const rebalancing = answer.status === 409 || text.includes("a rebalance is expected");
    if (!rebalancing || attempt === 60)
      throw new Error(`Kafka Connect refused ${method} ${url.pathname}: HTTP ${answer.status} ${text.slice(0, 2000)}`);
    await delay(500);
  }
}

/** The oldest that was tested. Rows of a COPY need the trigger of sql/replication.sql, with this one too. */
const LEAST_DEBEZIUM = "3.6.1";

/** @throws UsageError where Connect has no Debezium for Postgres, or an older one; Error where it does not answer within 10 s. */
export async function checkDebezium(env: ConnectEnv): Promise<string> {
  const answer = await ask("CONNECT_URL", below(env.CONNECT_URL, "connector-plugins"), {}, 10);
  if (!answer.ok) throw new Error(`Kafka Connect refused GET /connector-plugins: HTTP ${answer.status}`);
  const plugins = (await answer.json()) as { class: string; version: string }[];
  const plugin = plugins.find(({ class: name }) => name === "io.debezium.connector.postgresql.PostgresConnector");
  if (plugin && plugin.version.localeCompare(LEAST_DEBEZIUM, "en", { numeric: true }) >= 0) return plugin.version;
  throw new UsageError(
    `Kafka Connect (CONNECT_URL) has Debezium ${plugin?.version ?? "not at all"} for Postgres; the least is ${LEAST_DEBEZIUM}. Install ` +
      `it at each worker (ops/README.md, "Kafka and ClickHouse"), restart them, then run: make connector`,
  );
}

export const connectorStatus = (env: ConnectEnv) => askConnect<ConnectorStatus>(env, "GET", "/status");

/** @throws Error where Connect does not answer. */
export const isRunning = async (env: ConnectEnv): Promise<boolean> => allRunning(await connectorStatus(env));
