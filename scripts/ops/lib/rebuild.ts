/** The rebuild of sensor_readings beside the table that readers see: what make resnapshot and make swap-readings share. */
import { setTimeout as delay } from "node:timers/promises";
import { postgresUrl, readEnv, required, UsageError } from "../../../shared/env.ts";
import { kafkaVariables } from "../../../shared/sensors/broker.ts";
import { clickhouseVariables } from "../../../shared/sensors/clickhouse.ts";
import { topicState } from "../../../shared/sensors/epoch.ts";
import { type Admin, connectKafka, withAdmin } from "../../../shared/sensors/kafka.ts";
import { checkSession, connect } from "../../../shared/session.ts";
import { connectorVariables } from "./kafka-connect.ts";

/** What a rebuild fills, and a swap exchanges. */
export const tables = ["sensor_readings", "sensor_dead_letters"];

/** The servers and names of a rebuild. @throws UsageError while the group has consumers. */
export async function openRebuild(application: string) {
  const variables = { ETL_DATABASE_URL: required(postgresUrl), ...clickhouseVariables, ...kafkaVariables };
  const env = readEnv({ ...variables, ...connectorVariables });
  const { SENSORS_TOPIC: topic, SENSORS_GROUP: groupId, CLICKHOUSE_DATABASE: database } = env;
  const etl = connect(env.ETL_DATABASE_URL, { application: `etl:${application}`, timeoutSeconds: 30 });
  await checkSession("ETL_DATABASE_URL", etl);
  const broker = connectKafka(env, "etl-resnapshot");
  const ask = <T>(question: (admin: Admin) => Promise<T>): Promise<T> => withAdmin(broker, env, question);
  await ask((admin) => checkGroupIsEmpty(admin, groupId));
  const where = () => ask((admin) => topicState(admin, topic, groupId));
  const lag = async (): Promise<number> => (await where()).reduce((sum, partition) => sum + partition.lag, 0);
  return { env, topic, groupId, database, rebuild: `${database}_rebuild`, etl, ask, where, lag };
}

/** @throws UsageError while the group has members, which a change of its offsets would not reach. */
async function checkGroupIsEmpty(admin: Admin, groupId: string): Promise<void> {
  for (let tries = 0; ; tries++) {
    const { groups } = await admin.describeGroups([groupId]);
    const members = groups[0]?.members ?? [];
    if (!members.length) return;
    const who = members.map(({ clientId, clientHost }) => `${clientId} at ${clientHost}`).join(", ");
    // kafkajs sets offsets as a member for a moment: a resnapshot that was killed then is one for the 30 s of its session.
    if (tries === 80 || !members.some(({ clientId }) => clientId === "etl-resnapshot"))
      throw new UsageError(
        `the group ${groupId} has ${members.length} consumers (${who}). Stop them first: systemctl stop etl-sensors`,
      );
    await delay(500);
  }
}
