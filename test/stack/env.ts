// The environment that the stack, the demo and the tests give to what they start.
import { existsSync, readFileSync } from "node:fs";
import { join, resolve } from "node:path";
import { parseEnv } from "node:util";

export type Env = Record<string, string | undefined>;

export const root = resolve(import.meta.dirname, "../..");

/**
 * The variables of `file`, and of the caller's environment only those that .env.example does not name (set or commented
 * out): a developer's exported production variables never reach the local stack, the demo or a test.
 */
export function localEnv(file = ".env.example"): Env {
  const path = resolve(root, file);
  if (!existsSync(path)) throw new Error(`${path}: no such file; ENV_FILE must name a copy of .env.example`);
  const example = readFileSync(join(root, ".env.example"), "utf8");
  const named = new Set([...example.matchAll(/^(?:#\s*)?([A-Z][A-Z0-9_]*)=/gm)].map((match) => match[1]));
  const inherited = Object.entries(process.env).filter(([name]) => !named.has(name));
  return { ...Object.fromEntries(inherited), ...parseEnv(readFileSync(path, "utf8")), ENV_FILE: path };
}

const loopback = /^(localhost|127(\.\d{1,3}){3}|\[::1\])$/;

/** Host and port of a URL or of a plain host:port, the first of several; IPv6 hosts in brackets, as in the URL. */
export function endpoint(value: string): { host: string; port: number } {
  const first = value.includes("://") ? value : `tcp://${value.split(",")[0]}`;
  const url = URL.parse(first);
  if (!url?.hostname) throw new Error(`"${value.replace(/\/\/.*@/, "//…@")}" is neither a URL nor host:port`);
  return { host: url.hostname, port: Number(url.port || (url.protocol === "https:" ? 443 : 80)) };
}

/** Why the part at `variable` is none of this stack's business, or undefined where it is to run here. */
export function notOurs(variable: string, env: Env): string | undefined {
  const value = env[variable];
  if (!value) return `${variable} is empty`;
  try {
    const { host } = endpoint(value);
    return loopback.test(host) ? undefined : `${variable} is at ${host}`;
  } catch (error) {
    throw new Error(`${variable}: ${(error as Error).message}; set it in ${env.ENV_FILE}`);
  }
}
