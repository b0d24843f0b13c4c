/** The variables that lead to a Kafka broker, and errors that name them. */
import { type Env, flag, like, name, optional, required, secret, text, UsageError } from "../env.ts";

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

/** Brokers, TLS and login, as kafkajs takes them. @throws UsageError for a mechanism without a login. */
export function brokerConfig(env: KafkaEnv) {
  const { KAFKA_SASL_MECHANISM: mechanism, KAFKA_USERNAME: username, KAFKA_PASSWORD: password } = env;
  if (mechanism && !(username && password))
    throw new UsageError(`KAFKA_SASL_MECHANISM ${mechanism} needs KAFKA_USERNAME and KAFKA_PASSWORD.`);
  return {
    brokers: env.KAFKA_BROKERS,
    ssl: env.KAFKA_TLS,
    ...(mechanism && { sasl: { mechanism, username, password } }),
  };
}

/** Whether the error is about the server's certificate (https://nodejs.org/api/tls.html#x509-certificate-error-codes). */
export const isCertificate = ({ code, cause }: { code?: string; cause?: unknown }): boolean =>
  /^(CERT_|ERR_TLS_CERT|UNABLE_TO_|SELF_SIGNED|DEPTH_ZERO|HOSTNAME_MISMATCH|INVALID_(CA|PURPOSE)|PATH_LENGTH)/.test(code ?? "") ||
  (cause instanceof Error && isCertificate(cause));

/** An error that a variable causes names it; any other stays as it is. */
export function namedFault(error: Error): Error {
  const { name, message } = error;
  if (isCertificate(error))
    return new Error(
      `cannot connect to KAFKA_BROKERS with KAFKA_TLS: ${message}. Use a host name that the certificate holds; ` +
        `name the file of your own authority in NODE_EXTRA_CA_CERTS.`,
    );
  if (!name.includes("SASL")) return error;
  return new Error(`KAFKA_BROKERS refused the login: ${message}. Check KAFKA_SASL_MECHANISM, KAFKA_USERNAME and KAFKA_PASSWORD`);
}
