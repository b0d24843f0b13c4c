/**
 * Environment variables: the readers; each module declares those that it reads. They come from the environment, which wins, and from the
 * file named by ENV_FILE (default .env in the project's root). Every fault is reported at once, and no value is echoed: it may be a secret.
 */
import { existsSync, readFileSync } from "node:fs";
import { join, resolve } from "node:path";
import { getCACertificates, setDefaultCACertificates } from "node:tls";
import { parse, populate } from "dotenv";

/** The project's root folder: sql/ and schemas/ are found from here, whatever the working directory. */
export const root: string = resolve(import.meta.dirname, "..");

/** Wrong arguments, environment or schema: nothing was moved, a person has to change something. Exit code 2. */
export class UsageError extends Error {
  override name = "UsageError";
}

const file = resolve(root, process.env.ENV_FILE || ".env");
const content = existsSync(file) ? readFileSync(file, "utf8").replace(/^\uFEFF/, "") : "";
const values = parse(content);
populate(process.env as Record<string, string>, values); // the environment wins; Google's and Amazon's clients see it too
/** The values whole: dotenv takes each # outside of quotes for a comment, here only one after a blank is. */
const whole = parse(content.replaceAll(/(?<=\S)#/g, "\0"));

/** Reads a variable's text. Its error says what is wrong with it: "must be a number from 1 to 9". */
type Reader<T> = (text: string) => T;
/** Reads a variable that may be absent or, which is the same, empty. */
type Variable<T> = (text: string | undefined) => T;
export type Variables = Record<string, Variable<unknown>>;
export type Env<V extends Variables> = { [K in keyof V]: ReturnType<V[K]> };

export function required<T>(read: Reader<T>): Variable<T> {
  return (text) => {
    if (text) return read(text);
    throw new Error("is missing");
  };
}
export function optional<T, F extends T | undefined = undefined>(read: Reader<T>, fallback?: F): Variable<T | F> {
  return (text) => (text ? read(text) : (fallback as F));
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
  for (const [name, read] of Object.entries({ ...variables, LOG_FORMAT: optional(logFormat), NODE_EXTRA_CA_CERTS: optional(trust) })) {
    try {
      const text = process.env[name];
      if (text === values[name] && text !== whole[name]?.replaceAll("\0", "#"))
        throw new Error(`has a # in ${file}, which begins a comment: put the value into quotes`);
      env[name] = read(text);
    } catch (error) {
      faults.push(`${name} ${(error as Error).message}${documented(name)}`);
    }
  }
  const { FROM, TO } = env as { FROM?: string; TO?: string };
  if ("FROM" in variables && !faults.length && (!FROM !== !TO || (FROM ?? "") > (TO ?? "")))
    faults.push("FROM and TO: a re-run needs both, FROM (inclusive) before TO (exclusive). Example: FROM=2017-01-01 TO=2017-02-01");
  if (!faults.length) return env as Env<V>;
  const next = `Set them in ${file}, in the environment or behind make (.env.example has them all).`;
  throw new UsageError(`wrong environment or arguments, nothing was done:\n  ${faults.join("\n  ")}\n${next}`);
}

/** What .env.example says of a variable: the comment above it, and its value. */
function documented(name: string): string {
  const example = readFileSync(join(root, ".env.example"), "utf8");
  const [, comment, value] = new RegExp(`((?:^# .*\\n)+)(?:# )?${name}=(.*)$`, "m").exec(example) ?? [];
  return comment ? `. ${comment.replaceAll(/^# /gm, "").trim().replaceAll("\n", " ")} Example: ${name}=${value}` : "";
}

/** Node reads it when it starts, from the environment only. */
function trust(path: string): void {
  const certificates = readFileSync(path, "utf8");
  if (!getCACertificates("extra").length) setDefaultCACertificates([...getCACertificates("default"), certificates]);
}

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
const logFormat = like(/^(text|json)$/, "must be text or json");
export const name = like(/^[\w-]+$/, "may hold letters, digits, _ and - only");
/** One of these names. @param besides what to say of a name that is none of them, and has another command. */
export const oneOf = (names: string[], besides = ""): Reader<string> =>
  like(new RegExp(`^(${names.join("|")})$`), `must be one of ${names.join(", ")}${besides}`);

export function number(least: number, most: number, whole = true): Reader<number> {
  return (value) => {
    const form = whole ? /^\d+$/ : /^\d+(\.\d+)?$/;
    if (form.test(value) && Number(value) >= least && Number(value) <= most) return Number(value);
    throw new Error(`must be a ${whole ? "whole " : ""}number from ${least} to ${most}`);
  };
}

/** A URL; its password is a secret from here on. One that is not encoded would be a port and a path: of u:12/34@host. */
function parseUrl(value: string, protocol: RegExp, form: string): URL {
  const url = URL.parse(value);
  if (!url || url.hash || !protocol.test(value) || `${url.pathname}${url.search}`.includes("@") || /%(?![\da-f]{2})/i.test(value))
    throw new Error(`is not ${form} (is a special character in it percent-encoded?)`);
  if (url.password) secret(decodeURIComponent(url.password));
  return url;
}

/** Checks a text, and leaves it as it is. */
function checked(parse: (value: string) => unknown): Reader<string> {
  return (value) => {
    parse(value);
    return value;
  };
}
/** The server of a client that takes an address only, and would ignore the rest. */
export const serverUrl = checked((value) => parseUrl(value, /^https?:\/\/[^/@?]+\/?$/i, "http://HOST:PORT, and nothing else"));
/** A server that may want a login, or be below a path: see shared/http.ts. */
export const baseUrl = checked((value) => parseUrl(value, /^https?:[^?]+$/i, "http://HOST:PORT, and nothing behind its path"));
export const httpUrl = checked((value) => parseUrl(value, /^https?:/i, "http://HOST"));

/** The parts of postgres://USER:PASSWORD@HOST:PORT/DATABASE?sslmode=…, decoded. HOST is a name or an address: [::1]. */
export function parsePostgresUrl(value: string) {
  const url = parseUrl(value, /^postgres(ql)?:/, "postgres://USER:PASSWORD@HOST:PORT/DATABASE");
  const { sslmode = "disable", ...others } = Object.fromEntries(url.searchParams);
  const [host, database] = [url.hostname.replaceAll(/[[\]]/g, ""), decodeURIComponent(url.pathname.slice(1))];
  const [user, password] = [decodeURIComponent(url.username), decodeURIComponent(url.password)];
  if (!/^(disable|require|verify-ca|verify-full)$/.test(sslmode))
    throw new Error("has an unknown sslmode: it must be disable, require or verify-full");
  for (const other of Object.keys(others))
    throw new Error(`has ${other}, which does nothing here. Leave it out (an authority of your own: NODE_EXTRA_CA_CERTS)`);
  return { user, password, host, port: Number(url.port || 5432), database, sslmode };
}
export const postgresUrl = checked(parsePostgresUrl);

/**
 * A point in time of UTC as a person types it: a date, or a date with a time to the microsecond. As text with six decimals, so that two of
 * them compare as text. A Date would hold milliseconds, and turn 30 February into 2 March.
 */
export function timestamp(value: string): string {
  const form = /^(?!0000)(\d{4}-\d\d-\d\d)(?:[T ](\d\d:\d\d(?::\d\d)?)(?:\.(\d{1,6}))?(?:Z|\+00(?::?00)?)?)?$/;
  const [, day, clock = "00:00", micros = ""] = form.exec(value.trim()) ?? [];
  const date = new Date(`${day}T${clock}Z`);
  if (Number.isNaN(date.getTime()) || !date.toISOString().startsWith(`${day}T`))
    throw new Error("must be a time of the years 0001 to 9999 in UTC, such as 2017-01-31 or 2017-01-31T23:59:59.123456Z");
  return `${date.toISOString().slice(0, 19)}.${micros.padEnd(6, "0")}+00`;
}
