/** Debezium's connector: its names, and whether it runs. */
import { httpUrl, redact, required, UsageError } from "../env.ts";

export const connectVariables = { CONNECT_URL: required(httpUrl) };
export type ConnectEnv = { CONNECT_URL: string; SENSORS_TOPIC: string };

/** What the connector reads. */
export const sourceTable = "public.sensor_readings";

/** What the topic's name decides: Debezium's prefix, the connector's name, the slot at the source. */
export function namesOf(env: { SENSORS_TOPIC: string }): Record<"prefix" | "connector" | "slot", string> {
  const { SENSORS_TOPIC: topic } = env;
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

/** What Kafka Connect answers to GET …/status. Source: https://kafka.apache.org/documentation/#connect_rest */
export interface ConnectorStatus {
  connector: { state: string; trace?: string };
  tasks: { id: number; state: string; trace?: string }[];
}

export const allRunning = ({ connector, tasks }: ConnectorStatus): boolean =>
  tasks.length > 0 && [connector, ...tasks].every(({ state }) => state === "RUNNING");

/** A request to /connectors/NAME/… @throws Error where Connect does not answer. */
export async function askConnect(env: ConnectEnv, method: string, path: string, body?: object): Promise<Response> {
  return await fetch(new URL(`/connectors/${namesOf(env).connector}${path}`, env.CONNECT_URL), {
    method,
    headers: { "content-type": "application/json" },
    ...(body && { body: JSON.stringify(body) }),
    signal: AbortSignal.timeout(60_000),
  }).catch((error: Error) => {
    const { code, message } = (error.cause ?? error) as { code?: string; message: string };
    const away = `Kafka Connect at ${env.CONNECT_URL} (CONNECT_URL) does not answer: ${message || code}`;
    throw new Error(redact(`${away}. For the local stack: make up`));
  });
}

/** Whether the connector and its task run. @throws Error where Connect does not answer. */
export async function isRunning(env: ConnectEnv): Promise<boolean> {
  const answer = await askConnect(env, "GET", "/status");
  return answer.ok && allRunning((await answer.json()) as ConnectorStatus);
}
