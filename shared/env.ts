/**
 * Environment variables and arguments, read once, from the environment and from the file named by ENV_FILE
 * (default: .env in the project's root). The environment wins. Every fault is reported at once; no value is echoed,
 * because any of them may hold a secret.
 */
import { existsSync, readFileSync } from "node:fs";
import { resolve } from "node:path";
import { parseEnv } from "node:util";
import { trustAuthorities } from "./tls.ts";

/** The project's root folder: sql/ and schemas/ are found from here, whatever the working directory. */
export const root: string = resolve(import.meta.dirname, "..");

/** Wrong arguments, environment or schema: nothing was moved, a person has to change something. Exit code 2. */
export class UsageError extends Error {
  override name = "UsageError";
}

type Reader<T> = (text: string) => T;
interface Variable<T> {
  about: string;
  example: string;
  read: Reader<T>;
  /** Absent: the variable is required. */
  fallback?: T;
}

function variable<T>(about: string, example: string, read: Reader<T>, ...fallback: T[]): Variable<T> {
  return fallback.length ? { about, example, read, fallback: fallback[0] as T } : { about, example, read };
}

function url(...protocols: string[]): Reader<string> {
  return (value) => {
    if (!URL.canParse(value)) throw new Error("is not a URL (is a special character in it percent-encoded?)");
    const { protocol, password, hostname, searchParams } = new URL(value);
    if (!protocols.includes(protocol)) throw new Error(`must start with ${protocols[0]}//`);
    if (password) {
      const [, typed = password] = /^[^:]+:\/\/[^:/?#]*:([^/?#]*)@/.exec(value) ?? [];
      for (const form of [password, typed, decodeURIComponent(typed)]) secret(form);
    }
    if (hostname.includes(",")) throw new Error("must name one host (of a pair, the primary)");
    if (!protocol.startsWith("postgres")) return value;
    // A mistyped mode must not become one that checks less, nor a file that nobody reads look like one that is.
    if (!/^(disable|allow|prefer|require|verify-ca|verify-full)$/.test(searchParams.get("sslmode") ?? "prefer"))
      throw new Error("has an unknown sslmode: it must be disable, require or verify-full");
    if (searchParams.has("sslrootcert"))
      throw new Error("has sslrootcert: name the file of your own authority in NODE_EXTRA_CA_CERTS instead");
    return value;
  };
}

const secrets = new Set<string>();

/** The text without any password that was read from the environment, whatever library wrote it into a message. */
export function redact(message: string): string {
  let result = message;
  // The longest first: one may begin as another does.
  for (const secret of [...secrets].sort((a, b) => b.length - a.length)) result = result.replaceAll(secret, "***");
  // Of a file that a client could not read as JSON, V8's message quotes the beginning: of Google's credentials, a key.
  return result.replaceAll(/(, )?(\.\.\.)?"[^\n]*"(\.\.\.)? is not valid JSON/g, ": it is not valid JSON");
}

function number(least: number, most: number, whole = true): Reader<number> {
  return (value) => {
    const form = whole ? /^\d+$/ : /^\d+(\.\d+)?$/;
    if (!form.test(value) || Number(value) < least || Number(value) > most) {
      throw new Error(`must be a ${whole ? "whole " : ""}number from ${least} to ${most}`);
    }
    return Number(value);
  };
}

/** Remembers it as messages may hold it: as it is, as text in JSON, and as a part of a URL. */
function secret(value: string): string {
  secrets.add(value).add(JSON.stringify(value).slice(1, -1)).add(encodeURIComponent(value.toWellFormed()));
  return value;
}

/** A text of that form. */
function like(form: RegExp, otherwise: string): Reader<string> {
  return (value) => {
    if (!form.test(value)) throw new Error(otherwise);
    return value;
  };
}

const name = like(/^[A-Za-z0-9_-]+$/, "may hold letters, digits, _ and - only");
const word = like(/^[A-Za-z_]\w*$/, "may hold letters, digits and _ only");
const bucket = like(/^[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]$/, "may hold 3 to 63 lower-case letters, digits, . and - only");
const topic = like(/^[\w-]+(\.[\w-]+)+$/, "must look like PREFIX.SCHEMA.TABLE");
const sasl = like(/^(plain|scram-sha-(256|512))$/, "must be plain, scram-sha-256 or scram-sha-512");
const http = url("http:", "https:");
const postgres = url("postgres:", "postgresql:");

function brokers(value: string): string[] {
  const list = value.split(",").map((broker) => broker.trim());
  if (!list.every((broker) => /^([\w.-]+|\[[\da-fA-F:]+\]):\d+$/.test(broker)))
    throw new Error("must be host:port, with commas between several");
  return list;
}

const flag: Reader<boolean> = (value) => value !== "0";

/**
 * A point in time as typed by a person: a date, or a date with a time to the microsecond, in UTC unless it says otherwise.
 * Returns it as text in UTC with six decimals, the form in which two of them compare as text.
 * A JS Date would do for neither: it holds milliseconds and turns 30 February into 2 March.
 */
export function readTimestamp(value: string): string {
  const form = /^(\d{4}-\d\d-\d\d)(?:[T ](\d\d):(\d\d)(?::(\d\d)(?:\.(\d{1,6}))?)?(?:Z|([+-])(\d\d)(?::?(\d\d))?)?)?$/;
  const match = form.exec(value.trim());
  if (!match) throw new Error("must look like 2017-01-31 or 2017-01-31T23:59:59.123456Z");
  const [, day, hour = "00", minute = "00", second = "00", micros = "", sign = "+", ahead = "00", more = "00"] = match;
  const utc = new Date(`${day}T00:00:00Z`);
  if (Number.isNaN(utc.getTime()) || utc.toISOString().slice(0, 10) !== day)
    throw new Error("is not a date of the calendar");
  if (hour > "23" || minute > "59" || second > "59") throw new Error("is not a time of the day");
  if (ahead > "15" || more > "59") throw new Error("is not a time zone's offset");
  utc.setUTCHours(Number(hour) - Number(sign + ahead), Number(minute) - Number(sign + more), Number(second));
  if (utc.getUTCFullYear() < 1 || utc.getUTCFullYear() > 9999) throw new Error("is not in the years 0001 to 9999");
  return `${utc.toISOString().slice(0, 19)}.${micros.padEnd(6, "0")}+00`;
}

const variables = {
  SOURCE_DATABASE_URL: variable(
    "the Postgres to read from, as the read-only role of sql/roles.sql",
    "postgres://etl_reader:…@db.example.com:5432/shop",
    postgres,
  ),
  ETL_DATABASE_URL: variable(
    "the Postgres that holds schema etl, as the metadata role of sql/roles.sql, not through a transaction pooler",
    "postgres://etl_metadata:…@db.example.com:5432/shop",
    postgres,
  ),
  BIGQUERY_PROJECT: variable("the Google Cloud project", "my-shop", name),
  BIGQUERY_DATASET: variable("the dataset of the raw tables", "raw", name),
  BIGQUERY_VIEWS_DATASET: variable("the dataset of the models", "warehouse", name),
  BIGQUERY_LOCATION: variable("where the datasets are", "US", name),
  BIGQUERY_ENDPOINT: variable(
    "a local BigQuery server; leave it out for Google's",
    "http://127.0.0.1:19050",
    http,
    undefined,
  ),
  CLICKHOUSE_URL: variable("the ClickHouse to insert into", "https://clickhouse.example.com:8443", http),
  CLICKHOUSE_DATABASE: variable("its database", "shop", word),
  CLICKHOUSE_USER: variable("its user", "etl", name),
  CLICKHOUSE_PASSWORD: variable("the user's password; may be empty", "…", secret, ""),
  KAFKA_BROKERS: variable("the brokers to ask first", "kafka-1.example.com:9092,kafka-2.example.com:9092", brokers),
  KAFKA_TLS: variable("speak TLS to the brokers", "1", flag, false),
  KAFKA_SASL_MECHANISM: variable("how to log in", "scram-sha-512", sasl, undefined),
  KAFKA_USERNAME: variable("the brokers' user", "etl", (value) => value, undefined),
  KAFKA_PASSWORD: variable("the user's password", "…", secret, undefined),
  SENSORS_TOPIC: variable("Debezium's topic of the table", "shop.public.sensor_readings", topic),
  SENSORS_GROUP: variable("the consumers' group", "etl-sensors", name),
  SENSORS_POISON_SHARE: variable(
    "the consumer stops where more than this share of the last 1,000 messages is no valid change",
    "0.1",
    number(0, 1, false),
    0.1,
  ),
  CONNECT_URL: variable("Kafka Connect's REST interface", "http://connect.example.com:8083", url("http:", "https:")),
  REPLICATION_DATABASE_URL: variable(
    "the source as Kafka Connect reaches it, as the role of sql/replication.sql",
    "postgres://etl_replicator:…@db.example.com:5432/shop",
    postgres,
  ),
  METRICS_PORT: variable(
    "where the consumer serves /metrics and /healthz; 0 is any free one",
    "9464",
    number(0, 65_535),
    9464,
  ),
  UNTIL: variable(
    "caught-up: end once the lag is zero",
    "caught-up",
    like(/^caught-up$/, "can only be caught-up"),
    undefined,
  ),
  REPLAY: variable("set by make replay-dead-letters", "1", flag, false),
  SWAP: variable("resnapshot: let readers see the rebuilt table", "1", flag, false),
  LIMIT: variable("rows to print", "20", number(1, 100_000), 20),
  S3_ENDPOINT: variable("a local S3 server; leave it out for Amazon's", "http://127.0.0.1:17070", http, undefined),
  S3_BUCKET: variable("the bucket of the archive", "my-shop-archive", bucket),
  S3_PREFIX: variable(
    "stands before every key",
    "backup/",
    (value) => value.replace(/^\/+|\/*$/g, "").replace(/.$/u, "$&/"),
    "",
  ),
  AWS_REGION: variable("the bucket's region", "eu-central-1", name),
  AWS_ACCESS_KEY_ID: variable(
    "the SDK's own; leave both out where the machine has a role",
    "AKIA…",
    (value) => value,
    undefined,
  ),
  AWS_SECRET_ACCESS_KEY: variable("the key's secret", "…", secret, undefined),
  AWS_SESSION_TOKEN: variable("the token of a key that expires", "…", secret, undefined),
  PUSHGATEWAY_URL: variable(
    "where the metrics go: without them nobody is told of a failure",
    "http://pushgateway.example.com:9091",
    http,
  ),
  WATERMARK_LAG_SECONDS: variable("rows younger than this are left for the next run", "5", number(0, 86_400, false), 5),
  CHUNK_ROWS: variable("rows a chunk", "250000", number(1, 100_000_000), 250_000),
  RUN_TIMEOUT_SECONDS: variable("the deadline of a run", "1800", number(1, 604_800, false), 1800),
  RETENTION_DAYS: variable(
    "how long schema etl keeps runs, and days that were archived",
    "400",
    number(1, 36_500),
    400,
  ),
  LOG_FORMAT: variable(
    "how log lines are written: text (key=value) or json",
    "json",
    like(/^(text|json)$/, "must be text or json"),
    "text",
  ),
  FROM: variable("re-run: start, inclusive", "2017-01-01", readTimestamp, undefined),
  TO: variable("the end, exclusive", "2017-02-01T12:00:00Z", readTimestamp, undefined),
  PIPELINE: variable("the pipeline's name", "orders", name),
  REPAIR: variable("verify: repair what differs", "1", flag, false),
  CONFIRM: variable("sweep: remove more than SWEEP_MAX_SHARE of the rows", "1", flag, false),
  SWEEP_MAX_SHARE: variable(
    "make sweep refuses to remove more than this share of a table's rows",
    "0.05",
    number(0, 1, false),
    0.05,
  ),
  JSON: variable("print JSON, for programs", "1", flag, false),
  DRY_RUN: variable("say what would be done, and do nothing", "1", flag, false),
  FORCE: variable("archive days again that are done", "1", flag, false),
  ALLOW_SHRINK: variable("let a day, or a model, have far fewer rows than before", "1", flag, false),
  ALLOW_STALE: variable("let models be built of rows that are older than they should be", "1", flag, false),
  ONLY: variable("a model of views/, with what it reads", "weekly_revenue", word, undefined),
  MAX_PARALLEL: variable("models at a time", "4", number(1, 32), 4),
  MAX_BYTES_BILLED: variable(
    "the most that one statement of views/ may be billed, in bytes",
    "100000000000",
    number(10 * 2 ** 20, 1e15),
    100e9,
  ),
  USD_PER_TIB: variable("what BigQuery charges for a TiB read, for estimates", "6.25", number(0, 1000, false), 6.25),
  CLEAN: variable("delete what killed runs left in the bucket, where it is older than a day", "1", flag, false),
  BACKFILL: variable("set by make backfill-events: FROM and TO are needed", "1", flag, false),
  RESTORE: variable("set by make restore-events", "1", flag, false),
  CONCURRENCY: variable("days at a time in a backfill", "2", number(1, 32), 1),
  MAX_ROWS_PER_SECOND: variable(
    "spares the source: at most so many rows are read a second",
    "20000",
    number(1, 1_000_000_000),
    undefined,
  ),
};

const everyRun = [
  "PUSHGATEWAY_URL",
  "WATERMARK_LAG_SECONDS",
  "CHUNK_ROWS",
  "RUN_TIMEOUT_SECONDS",
  "RETENTION_DAYS",
  "FROM",
  "TO",
] as const;

export const bigquery = ["BIGQUERY_PROJECT", "BIGQUERY_DATASET", "BIGQUERY_LOCATION", "BIGQUERY_ENDPOINT"] as const;

/** What a pipeline from Postgres to BigQuery reads. */
export const postgresToBigQuery = ["SOURCE_DATABASE_URL", "ETL_DATABASE_URL", ...bigquery, ...everyRun] as const;

export const bucketOfArchive = [
  "S3_ENDPOINT",
  "S3_BUCKET",
  "S3_PREFIX",
  "AWS_REGION",
  "AWS_ACCESS_KEY_ID",
  "AWS_SECRET_ACCESS_KEY",
  "AWS_SESSION_TOKEN",
] as const;

export const clickhouse = ["CLICKHOUSE_URL", "CLICKHOUSE_DATABASE", "CLICKHOUSE_USER", "CLICKHOUSE_PASSWORD"] as const;

export const kafka = [
  "KAFKA_BROKERS",
  "KAFKA_TLS",
  "KAFKA_SASL_MECHANISM",
  "KAFKA_USERNAME",
  "KAFKA_PASSWORD",
  "SENSORS_TOPIC",
  "SENSORS_GROUP",
] as const;

/** What the models read. */
export const bigQueryToBigQuery = [
  "ETL_DATABASE_URL",
  ...bigquery,
  "BIGQUERY_VIEWS_DATASET",
  "PUSHGATEWAY_URL",
  "RUN_TIMEOUT_SECONDS",
  "RETENTION_DAYS",
  "ONLY",
  "DRY_RUN",
  "ALLOW_STALE",
  "ALLOW_SHRINK",
  "MAX_PARALLEL",
  "MAX_BYTES_BILLED",
  "USD_PER_TIB",
] as const;

/** What the archive of events reads. */
export const postgresToS3 = [
  "SOURCE_DATABASE_URL",
  "ETL_DATABASE_URL",
  ...bucketOfArchive,
  ...everyRun,
  "FORCE",
  "ALLOW_SHRINK",
  "BACKFILL",
  "CONCURRENCY",
  "MAX_ROWS_PER_SECOND",
] as const;

type Variables = typeof variables;
export type Name = keyof Variables;
type Value<N extends keyof Variables> = Variables[N] extends Variable<infer T> ? T : never;
export type Env<N extends keyof Variables = never> = { [K in N]: Value<K> };

/** What the clients of Google and Amazon read themselves, from the environment only. */
const readByClients = ["GOOGLE_APPLICATION_CREDENTIALS", "AWS_PROFILE"];

function environment(): { values: NodeJS.Dict<string>; file: string } {
  const file = resolve(root, process.env.ENV_FILE ?? ".env");
  if (existsSync(file)) {
    const values = { ...parseEnv(readFileSync(file, "utf8")), ...process.env };
    for (const name of readByClients) if (values[name]) process.env[name] = values[name];
    return { values, file };
  }
  if (process.env.ENV_FILE === undefined) return { values: process.env, file };
  throw new UsageError(`ENV_FILE: there is no file ${file}. Copy .env.example there, or unset ENV_FILE.`);
}

/** LOG_FORMAT as it is set, for the errors that come before it was judged: a wrong value is readEnv's to refuse. */
export function logFormat(): string | undefined {
  try {
    return environment().values.LOG_FORMAT;
  } catch {
    return process.env.LOG_FORMAT;
  }
}

/** Whether a variable is set at all, for what may be left unconfigured. */
export const isSet = (name: keyof Variables): boolean => Boolean(environment().values[name]);

/**
 * The named variables, typed, and LOG_FORMAT, which every command heeds. An empty one counts as absent.
 * @throws UsageError that lists every missing or malformed one with what it is for and an example.
 */
export function readEnv<N extends keyof Variables>(...names: N[]): Env<N> {
  const { values, file } = environment();
  const faults: string[] = [];
  const result: Partial<Record<N, unknown>> = {};
  for (const key of [...names, "LOG_FORMAT" as N]) {
    const { about, example, read, ...rest } = variables[key] as Variable<unknown>;
    const value = values[key];
    try {
      if (value) result[key] = read(value);
      else if ("fallback" in rest) result[key] = rest.fallback;
      else throw new Error("is missing");
    } catch (error) {
      faults.push(`  ${key} ${(error as Error).message}: ${about}. Example: ${key}=${example}`);
    }
  }
  try {
    trustAuthorities(values.NODE_EXTRA_CA_CERTS);
  } catch (error) {
    const { code, message } = error as { code?: string; message: string };
    faults.push(`  NODE_EXTRA_CA_CERTS is no file of certificates in PEM form (${code ?? message})`);
  }
  const { FROM, TO } = result as { FROM?: string; TO?: string };
  if (!faults.length && names.includes("FROM" as N)) {
    if (FROM && !TO)
      faults.push("  FROM was given without TO: a re-run needs both. Example: FROM=2017-01-01 TO=2017-02-01");
    if (TO && !FROM)
      faults.push("  TO was given without FROM: a re-run needs both. Example: FROM=2017-01-01 TO=2017-02-01");
    if (FROM && TO && FROM > TO)
      faults.push(`  FROM ${FROM} is after TO ${TO}: swap them. FROM is inclusive, TO exclusive.`);
  }
  if (faults.length) {
    throw new UsageError(
      `wrong environment or arguments, nothing was done:\n${faults.join("\n")}\nSet them in ${file} or in the environment (.env.example has them all).`,
    );
  }
  return result as Env<N>;
}
