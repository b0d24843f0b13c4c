/**
 * Environment variables. Each module declares those that it reads beside its code; here are the readers. They come from the environment
 * and from the file named by ENV_FILE (default .env in the project's root); the environment wins. What a variable is for is said in
 * .env.example. Every fault is reported at once, and no value is echoed: any of them may hold a secret.
 */
import { existsSync, readFileSync } from "node:fs";
import { join, resolve } from "node:path";
import { getCACertificates, setDefaultCACertificates } from "node:tls";
import { config } from "dotenv";

/** The project's root folder: sql/ and schemas/ are found from here, whatever the working directory. */
export const root: string = resolve(import.meta.dirname, "..");

/** Wrong arguments, environment or schema: nothing was moved, a person has to change something. Exit code 2. */
export class UsageError extends Error {
  override name = "UsageError";
}

const file = resolve(root, process.env.ENV_FILE || ".env");
const atStart = process.env.NODE_EXTRA_CA_CERTS;
config({ path: file, quiet: true }); // never overrides what is set; Google's and Amazon's clients see it too

/** Reads a variable's text. Its error says what is wrong with it: "must be a number from 1 to 9". */
type Reader<T> = (text: string) => T;

export interface Variable<T> {
  read: Reader<T>;
  /** What an absent variable stands for; without it the variable is required. */
  fallback?: { value: T };
}
export type Variables = Record<string, Variable<unknown>>;
export type Env<V extends Variables> = { [K in keyof V]: V[K] extends Variable<infer T> ? T : never };

export const required = <T>(read: Reader<T>): Variable<T> => ({ read });
export function optional<T>(read: Reader<T>): Variable<T | undefined>;
export function optional<T>(read: Reader<T>, fallback: T): Variable<T>;
export function optional<T>(read: Reader<T>, fallback?: T): Variable<T | undefined> {
  return { read, fallback: { value: fallback } };
}

/** Whether it is set to anything. An empty variable counts as absent. */
export const isSet = (name: string): boolean => Boolean(process.env[name]);

/**
 * The variables, typed.
 * @throws UsageError that lists every missing or malformed one, with what it is for and an example.
 */
export function readEnv<V extends Variables>(variables: V): Env<V> {
  if (process.env.ENV_FILE && !existsSync(file))
    throw new UsageError(`ENV_FILE: there is no file ${file}. Copy .env.example there, or unset ENV_FILE.`);
  const faults: string[] = [];
  const env: Record<string, unknown> = {};
  for (const [name, { read, fallback }] of Object.entries({ ...variables, ...everywhere })) {
    try {
      const text = process.env[name];
      if (text) env[name] = read(text);
      else if (fallback) env[name] = fallback.value;
      else throw new Error("is missing");
    } catch (error) {
      faults.push(`  ${name} ${(error as Error).message}${documented(name)}`);
    }
  }
  if ("FROM" in variables && !faults.length) {
    const { FROM, TO } = env as { FROM?: string; TO?: string };
    const example = "Example: FROM=2017-01-01 TO=2017-02-01";
    if (!FROM !== !TO)
      faults.push(`  ${FROM ? "FROM" : "TO"} was given without the other: a re-run needs both. ${example}`);
    else if (FROM && TO && FROM > TO)
      faults.push(`  FROM ${FROM} is after TO ${TO}: FROM is inclusive, TO exclusive. ${example}`);
  }
  if (faults.length)
    throw new UsageError(
      `wrong environment or arguments, nothing was done:\n${faults.join("\n")}\nSet them in ${file} or in the ` +
        `environment (.env.example has them all).`,
    );
  return env as Env<V>;
}

/** What .env.example says of a variable: the comment above it, and its value. */
function documented(name: string): string {
  const example = readFileSync(join(root, ".env.example"), "utf8");
  const [, comment, value] = new RegExp(`((?:^# .*\\n)+)(?:# )?${name}=(.*)$`, "m").exec(example) ?? [];
  return comment ? `. ${comment.replaceAll(/^# /gm, "").trim().replaceAll("\n", " ")} Example: ${name}=${value}` : "";
}

/** Node itself reads NODE_EXTRA_CA_CERTS from the environment, when it starts; here the one of the file is added. */
function trust(path: string): void {
  if (path !== atStart) setDefaultCACertificates([...getCACertificates("default"), readFileSync(path, "utf8")]);
}

/** What every command heeds. */
const everywhere = {
  LOG_FORMAT: optional((value) => like(/^(text|json)$/, "must be text or json")(value), "text"),
  NODE_EXTRA_CA_CERTS: optional(trust),
};

const secrets = new Set<string>();

/** Remembers a secret in the forms in which a message may hold it: as it is, as text in JSON, and as a part of a URL. */
export function secret(value: string): string {
  secrets.add(value).add(JSON.stringify(value).slice(1, -1)).add(encodeURIComponent(value.toWellFormed()));
  return value;
}

/** The text without any secret that was read, whatever library wrote it into a message. */
export function redact(message: string): string {
  const longestFirst = [...secrets].sort((a, b) => b.length - a.length); // one may begin as another does
  const result = longestFirst.reduce((text, one) => text.replaceAll(one, "***"), message);
  // Of a file that a client could not read as JSON, V8's message quotes the beginning: of Google's credentials, a key.
  return result.replaceAll(/(, )?(\.\.\.)?"[^\n]*"(\.\.\.)? is not valid JSON/g, ": it is not valid JSON");
}

export const text: Reader<string> = (value) => value;
export const flag: Reader<boolean> = (value) => value !== "0";

/** A text of that form. */
export function like(form: RegExp, otherwise: string): Reader<string> {
  return (value) => {
    if (!form.test(value)) throw new Error(otherwise);
    return value;
  };
}
export const name = like(/^[\w-]+$/, "may hold letters, digits, _ and - only");

export function number(least: number, most: number, whole = true): Reader<number> {
  return (value) => {
    const form = whole ? /^\d+$/ : /^\d+(\.\d+)?$/;
    if (!form.test(value) || Number(value) < least || Number(value) > most)
      throw new Error(`must be a ${whole ? "whole " : ""}number from ${least} to ${most}`);
    return Number(value);
  };
}

function url(...protocols: string[]): Reader<string> {
  return (value) => {
    if (!URL.canParse(value)) throw new Error("is not a URL (is a special character in it percent-encoded?)");
    const { protocol, password, hostname, searchParams } = new URL(value);
    if (!protocols.includes(protocol)) throw new Error(`must start with ${protocols[0]}//`);
    const [, typed = password] = /^[^:]+:\/\/[^:/?#]*:([^/?#]*)@/.exec(value) ?? [];
    if (password) for (const form of [password, typed, decodeURIComponent(typed)]) secret(form);
    if (hostname.includes(",")) throw new Error("must name one host (of a pair, the primary)");
    // Ignoring either would silently weaken TLS.
    if (!/^(disable|allow|prefer|require|verify-ca|verify-full)$/.test(searchParams.get("sslmode") ?? "prefer"))
      throw new Error("has an unknown sslmode: it must be disable, require or verify-full");
    if (searchParams.has("sslrootcert"))
      throw new Error("has sslrootcert: name the file of your own authority in NODE_EXTRA_CA_CERTS instead");
    return value;
  };
}
export const httpUrl = url("http:", "https:");
export const postgresUrl = url("postgres:", "postgresql:");

/**
 * A point in time as a person types it: a date, or a date with a time to the microsecond, in UTC unless it says otherwise.
 * As text in UTC with six decimals, so that two of them compare as text. A Date would hold milliseconds, and turn 30 February into 2 March.
 */
export function timestamp(value: string): string {
  const form = /^(\d{4}-\d\d-\d\d)(?:[T ](\d\d:\d\d)(?::(\d\d)(?:\.(\d{1,6}))?)?(?:Z|([+-]\d\d)(?::?(\d\d))?)?)?$/;
  const [match, day, time = "00:00", seconds = "00", micros = "", hours = "+00", minutes = "00"] =
    form.exec(value.trim()) ?? [];
  if (!match) throw new Error("must look like 2017-01-31 or 2017-01-31T23:59:59.123456Z");
  const calendar = new Date(`${day}T00:00:00Z`);
  if (Number.isNaN(calendar.getTime()) || calendar.toISOString().slice(0, 10) !== day)
    throw new Error("is not a date of the calendar");
  const utc = new Date(`${day}T${time}:${seconds}${hours}:${minutes}`);
  if (time > "23:59" || Number.isNaN(utc.getTime())) throw new Error("is not a time of the day");
  if (!/^[+-](0\d|1[0-5])$/.test(hours)) throw new Error("is not a time zone's offset");
  if (utc.getUTCFullYear() < 1 || utc.getUTCFullYear() > 9999) throw new Error("is not in the years 0001 to 9999");
  return `${utc.toISOString().slice(0, 19)}.${micros.padEnd(6, "0")}+00`;
}
