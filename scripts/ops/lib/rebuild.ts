/** The rebuild of sensor_readings beside the table that readers see: what make resnapshot and make swap-readings share. */
import { postgresUrl, readEnv, required, UsageError } from "../../../shared/env.ts";
import { kafkaVariables } from "../../../shared/sensors/broker.ts";
import { clickhouseVariables } from "../../../shared/sensors/clickhouse.ts";
import { readEpoch, topicState } from "../../../shared/sensors/epoch.ts";
import { type Admin, connectKafka, withAdmin } from "../../../shared/sensors/kafka.ts";
import { checkSession, openSession } from "../../../shared/session.ts";
import { connectorVariables } from "./kafka-connect.ts";

/** The servers and names of a rebuild. @throws UsageError while the group has consumers, which a change of its offsets would not reach. */
export async function openRebuild(application: string) {
  const variables = { ETL_DATABASE_URL: required(postgresUrl), ...clickhouseVariables, ...kafkaVariables };
  const env = readEnv({ ...variables, ...connectorVariables });
  const { SENSORS_TOPIC: topic, SENSORS_GROUP: groupId, CLICKHOUSE_DATABASE: database } = env;
  const etl = openSession(env.ETL_DATABASE_URL, { application: `etl:${application}`, timeoutSeconds: 30 });
  await checkSession("ETL_DATABASE_URL", etl);
  await etl`select pg_advisory_lock(hashtextextended('etl:rebuild', 0))`; // two swaps at once could exchange the tables twice
  const broker = connectKafka(env, "etl-resnapshot");
  const ask = <T>(question: (admin: Admin) => Promise<T>): Promise<T> => withAdmin(broker, env, question);
  const checkIsEmpty = () =>
    ask(async (admin) => {
      const { groups } = await admin.describeGroups([groupId]);
      const members = groups[0]?.members ?? [];
      const who = members.map(({ clientId, clientHost }) => `${clientId} at ${clientHost}`).join(", ");
      const next = "Stop them first: systemctl stop etl-sensors (one that was killed is gone after 30 s)";
      if (members.length) throw new UsageError(`the group ${groupId} has ${members.length} consumers (${who}). ${next}`);
    });
  await checkIsEmpty();
  const where = () => ask((admin) => topicState(admin, topic, groupId));
  const epoch = await readEpoch(etl, topic);
  return { env, topic, groupId, database, rebuild: `${database}_rebuild`, etl, ask, where, checkIsEmpty, epoch };
}
