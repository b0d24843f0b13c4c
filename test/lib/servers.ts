/**
 * Servers of a test's own, for what must not be done to the shared ones: a copy of the project has ports and data of its own; what is
 * installed is this checkout's.
 */
import { cpSync, mkdirSync, mkdtempSync, rmSync, symlinkSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { type Env, localEnv, root } from "../stack/env.ts";
import type { Command } from "../stack/process.ts";
import { type Part, stackPath } from "../stack/stack.ts";
import { freePort, until } from "./shop.ts";

export interface Servers<Name extends string> {
  /** Resolves once it serves. `as` changes how it is started. */
  start(name: Name, as?: (command: Command) => Command): Promise<void>;
  /** SIGKILL; resolves once it is gone. */
  kill(name: Name): Promise<void>;
  /** SIGSTOP: it answers nothing, until SIGCONT. */
  signal(name: Name, signal: NodeJS.Signals): void;
}

/** Puts links to what is installed into a copy of the project. */
export function linkInstalled(folder: string): void {
  mkdirSync(join(folder, ".stack/kafka"), { recursive: true });
  for (const name of ["bin", "python", "debian", "kafka/libs"]) symlinkSync(stackPath(name), join(folder, ".stack", name));
}

/** The servers of a copy of the project, at the addresses of `env`. */
export async function serversOf<Name extends string>(folder: string, env: Env): Promise<Servers<Name>> {
  const { parts }: { parts: Part[] } = await import(join(folder, "test/stack/parts.ts"));
  const processes: typeof import("../stack/process.ts") = await import(join(folder, "test/stack/process.ts"));
  const signal: Servers<Name>["signal"] = (name, what) => {
    const { pid } = processes.running(name) ?? {};
    if (pid) process.kill(pid, what);
  };
  return {
    signal,
    start: async (name, as = (command) => command) => {
      const part = parts.find((one) => one.name === name) as Part;
      await part.prepare?.(env);
      await processes.startProcess(name, as(part.command(env)));
      await processes.awaitReady(name, () => part.ready(env), 90);
    },
    kill: async (name) => {
      signal(name, "SIGKILL");
      await until(`${name} is gone`, () => !processes.running(name));
    },
  };
}

const ofSensors = { kafka: "KAFKA_BROKERS", connect: "CONNECT_URL", clickhouse: "CLICKHOUSE_URL" };
export type SensorsServer = keyof typeof ofSensors;

/** Kafka, Connect and ClickHouse. */
export async function createServers(): Promise<Servers<SensorsServer> & AsyncDisposable & { env: Env }> {
  const folder = mkdtempSync(join(tmpdir(), "etl-servers-"));
  for (const name of ["test/stack", "package.json"]) cpSync(join(root, name), join(folder, name), { recursive: true });
  symlinkSync(join(root, "node_modules"), join(folder, "node_modules"));
  linkInstalled(folder);
  const names = Object.keys(ofSensors) as SensorsServer[];
  const env: Env = {};
  for (const name of names) env[ofSensors[name]] = `${name === "kafka" ? "" : "http://"}127.0.0.1:${await freePort()}`;
  const servers = await serversOf<SensorsServer>(folder, { ...localEnv(), ...env });
  const dispose = async (): Promise<void> => {
    await Promise.all(names.map(servers.kill));
    rmSync(folder, { recursive: true, force: true });
  };
  try {
    await Promise.all(names.map((name) => servers.start(name)));
  } catch (error) {
    await dispose();
    throw error;
  }
  return { ...servers, env, [Symbol.asyncDispose]: dispose };
}
