/** The variables that lead to a Kafka broker. */
import { type Env, flag, like, name, optional, required, secret, text } from "../env.ts";

const broker = like(/^([\w.-]+|\[[\da-fA-F:]+\]):\d+$/, "must be host:port, with commas between several");
const mechanisms = /^(plain|scram-sha-(256|512))$/;
const brokerVariables = {
  KAFKA_BROKERS: required((value) => value.split(",").map((one) => broker(one.trim()))),
  KAFKA_TLS: optional(flag, false),
  KAFKA_SASL_MECHANISM: optional(like(mechanisms, "must be plain, scram-sha-256 or scram-sha-512")),
  KAFKA_USERNAME: optional(text),
  KAFKA_PASSWORD: optional(secret),
};
/** What is needed to reach a broker. */
export type KafkaEnv = Env<typeof brokerVariables>;

export const kafkaVariables = {
  ...brokerVariables,
  SENSORS_TOPIC: required(like(/^[\w-]+(\.[\w-]+)+$/, "must look like PREFIX.SCHEMA.TABLE")),
  SENSORS_GROUP: required(name),
};

/** Brokers, TLS and login, as kafkajs takes them. */
export function brokerConfig(env: KafkaEnv) {
  const { KAFKA_SASL_MECHANISM: mechanism, KAFKA_USERNAME: username, KAFKA_PASSWORD: password } = env;
  return { brokers: env.KAFKA_BROKERS, ssl: env.KAFKA_TLS, ...(mechanism && { sasl: { mechanism, username, password } }) };
}
