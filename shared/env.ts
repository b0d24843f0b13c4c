/**
 * Environment variables. Each module declares those that it reads beside its code; here are the readers. They come from the environment
 * and from the file named by ENV_FILE (default .env in the project's root); the environment wins. What a variable is for is said in
 * .env.example. Every fault is reported at once, and no value is echoed: any of them may hold a secret.
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
const atStart = process.env.NODE_EXTRA_CA_CERTS;
const content = existsSync(file) ? readFileSync(file, "utf8").replace(/^\uFEFF/, "") : "";
const values = parse(content);
/** The values whole: dotenv takes each # outside of quotes for a comment, here only one after a blank is. The environment wins. */
const whole = Object.entries(parse(content.replaceAll(/(?<=\S)#/g, "\0")));
const cut = whole.filter(([name, value]) => value.replaceAll("\0", "#") !== values[name] && !(name in process.env)).map(([name]) => name);
populate(process.env as Record<string, string>, values); // Google's and Amazon's clients see it too

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
export const optional = <T, F extends T | undefined = undefined>(read: Reader<T>, fallback?: F): Variable<T | F> => ({
  read,
  fallback: { value: fallback as F },
});

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
      if (cut.includes(name)) throw new Error(`has a # in ${file}, which begins a comment: put the value into quotes`);
      if (isSet(name)) env[name] = read(process.env[name] ?? "");
      else if (fallback) env[name] = fallback.value;
      else throw new Error("is missing");
    } catch (error) {
      faults.push(`${name} ${(error as Error).message}${documented(name)}`);
    }
  }
  const { FROM, TO } = env as { FROM?: string; TO?: string };
  if ("FROM" in variables && !faults.length && (!FROM !== !TO || (FROM ?? "") > (TO ?? ""))) {
    const why = FROM && TO ? `FROM ${FROM} is after TO ${TO}` : `${FROM ? "FROM" : "TO"} was given without the other`;
    faults.push(`${why}: a re-run needs both, FROM inclusive, TO exclusive. Example: FROM=2017-01-01 TO=2017-02-01`);
  }
  if (!faults.length) return env as Env<V>;
  throw new UsageError(
    `wrong environment or arguments, nothing was done:\n  ${faults.join("\n  ")}\nSet them in ${file}, in the environment ` +
      `or behind make (.env.example has them all).`,
  );
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

/** A URL; its password is a secret from here on. @param what it may be: a server's address, one with login and path, or any. */
function url(what: "server" | "base" | "any"): Reader<string> {
  return (value) => {
    const parsed = URL.parse(value);
    // Of u:12/34@host the password would be a port and a path.
    if (!parsed || (what !== "any" && parsed.pathname.includes("@")))
      throw new Error("is not a URL (is a special character in it percent-encoded?)");
    const { protocol, username, password, pathname, search, hash } = parsed;
    if (!/^https?:$/.test(protocol)) throw new Error("must start with http://");
    const [, typed = password] = /^[^:]+:\/\/[^:/?#]*:([^/?#]*)@/.exec(value) ?? [];
    if (password) for (const form of [password, typed, decodeURIComponent(typed)]) secret(form);
    if (what === "server" && (username || password || pathname !== "/"))
      throw new Error("must be protocol, host and port only: a login, a database or a path has no effect here");
    if (what !== "any" && (search || hash)) throw new Error("must have nothing behind its path");
    return value;
  };
}
/** The server of a client that takes an address only. */
export const serverUrl = url("server");
/** A server that may want a login, or be below a path: see shared/http.ts. */
export const baseUrl = url("base");
export const httpUrl = url("any");

/**
 * The parts of postgres://USER:PASSWORD@HOST:PORT/DATABASE?sslmode=…, decoded. HOST is a name, an address ([::1]), or with ?host= the
 * folder of a socket. A password with a character that is not encoded matches nothing, so that no piece of it is taken for a host.
 */
export function parsePostgresUrl(value: string) {
  const form =
    /^postgres(?:ql)?:\/\/(?:([^:/?#@]*)(?::([^/?#@]*))?@)?(\[[^\]/?#@]+\]|[^:/?#@[\]]*)(?::(\d+))?(?:\/([^/?#@]*))?(?:\?([^#@]*))?$/;
  if (!/^postgres(ql)?:\/\//.test(value)) throw new Error("must start with postgres://");
  const [match, typedUser = "", typed = "", inUrl = "", port = "5432", name = "", query] = form.exec(value) ?? [];
  if (!match || /%(?![\da-f]{2})/i.test(value))
    throw new Error("is not postgres://USER:PASSWORD@HOST:PORT/DATABASE (is a special character in it percent-encoded?)");
  const [user, password, database] = [typedUser, typed, name].map(decodeURIComponent) as [string, string, string];
  if (password) for (const secretForm of [typed, password]) secret(secretForm);
  const { host = inUrl.replaceAll(/[[\]]/g, ""), sslmode = "disable", ...others } = Object.fromEntries(new URLSearchParams(query));
  if (host === "" || host.includes(",")) throw new Error("must name one host (of a pair, the primary)");
  if (!name) throw new Error("must name the database: …/NAME");
  // Ignoring either would silently weaken TLS.
  if (!/^(disable|allow|prefer|require|verify-ca|verify-full)$/.test(sslmode))
    throw new Error("has an unknown sslmode: it must be disable, require or verify-full");
  if ("sslrootcert" in others) throw new Error("has sslrootcert: name the file of your own authority in NODE_EXTRA_CA_CERTS instead");
  const [unknown] = Object.keys(others);
  if (unknown) throw new Error(`has the parameter ${unknown}, which does nothing here. Leave it out`);
  return { user, password, host, port: Number(port), database, sslmode };
}
export function postgresUrl(value: string): string {
  parsePostgresUrl(value);
  return value;
}

/** What every command heeds. */
const everywhere = {
  LOG_FORMAT: optional(like(/^(text|json)$/, "must be text or json"), "text"),
  NODE_EXTRA_CA_CERTS: optional(trust),
};

/**
 * A point in time as a person types it: a date, or a date with a time to the microsecond, in UTC unless it says otherwise. As text in UTC
 * with six decimals, so that two of them compare as text. A Date would hold milliseconds, and turn 30 February into 2 March.
 */
export function timestamp(value: string): string {
  const time = /(?:[T ]((?:[01]\d|2[0-3]):\d\d(?::\d\d(?:\.(\d{1,6}))?)?)(?:Z|([+-](?:0\d|1[0-5])):?(\d\d)?)?)?/;
  const form = new RegExp(`^(\\d{4}-\\d\\d-\\d\\d)${time.source}$`);
  const [, day, clock = "00:00", micros = "", hours = "+00", minutes = "00"] = form.exec(value.trim()) ?? [];
  const calendar = new Date(`${day}T00:00:00Z`);
  const utc = new Date(`${day}T${clock.replace(/\..*/, "")}${hours}:${minutes}`);
  const iso = [calendar, utc].map((date) => (Number.isNaN(date.getTime()) ? "" : date.toISOString()));
  if (iso[0]?.slice(0, 10) !== day || !/^(?!0000)\d{4}-/.test(iso[1] ?? ""))
    throw new Error("must be a time of the years 0001 to 9999, such as 2017-01-31 or 2017-01-31T23:59:59.123456Z");
  return `${iso[1]?.slice(0, 19)}.${micros.padEnd(6, "0")}+00`;
}
