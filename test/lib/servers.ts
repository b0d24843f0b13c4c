/** Servers of a test's own, for what must not be done to the shared ones. */
import { randomBytes } from "node:crypto";
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { type Env, endpoint, localEnv } from "../stack/env.ts";
import { parts } from "../stack/parts.ts";
import { awaitReady, type Command, recordPath, running, startPart, startProcess, stopProcess } from "../stack/process.ts";
import { logPath, type Part } from "../stack/stack.ts";
import { freePort } from "./shop.ts";

const newName = (kind: string): string => `test-${kind}-${randomBytes(4).toString("hex")}`;

/** The kernel ends it with this process, however that ends. (Not Postgres, where root has it run as another user.) */
const mortal = ({ command, args, ...rest }: Command): Command => ({
  ...rest,
  command: "setpriv",
  args: ["--pdeathsig=KILL", command, ...args],
});

function forget(name: string): void {
  for (const file of [recordPath(name), logPath(name), `${logPath(name)}.1`]) rmSync(file, { force: true });
}

async function remove(name: string): Promise<void> {
  await stopProcess(name, "SIGKILL");
  forget(name);
}

/** Starts a server that is no part of the stack, and waits until `ready` resolves. Disposed of, it is killed. */
export async function startServer(kind: string, command: Command, ready: () => Promise<void>): Promise<AsyncDisposable> {
  const name = newName(kind);
  await startProcess(name, mortal(command));
  await awaitReady(name, ready).catch((error: Error) => remove(name).finally(() => Promise.reject(error)));
  return { [Symbol.asyncDispose]: () => remove(name) };
}

export interface Servers<Name extends string> extends AsyncDisposable {
  /** Where they are: the variables that hold their addresses. */
  env: Env;
  /** Starts one that does not run; resolves once it serves. `as` changes how it is started. */
  start(name: Name, as?: (command: Command) => Command): Promise<void>;
  /** SIGKILL; resolves once it is gone. */
  kill(name: Name): Promise<void>;
  /** SIGSTOP: it answers nothing, until SIGCONT. */
  signal(name: Name, signal: NodeJS.Signals): void;
  /** Removes what is remembered and logged of them, which are killed. */
  forget(): void;
}

/** Parts of the stack at free ports, with their data below `folder`. None of them runs yet. */
export async function describeServers<Name extends string>(names: readonly Name[], folder: string): Promise<Servers<Name>> {
  const base = localEnv();
  const env: Env = {};
  const described = {} as Record<Name, { part: Part; recorded: string }>;
  for (const name of names) {
    const part = parts.find((one) => one.name === name) as Part;
    described[name] = { part, recorded: newName(name) };
    const [before, after] = [`127.0.0.1:${endpoint(base[part.variable] ?? "").port}`, `127.0.0.1:${await freePort()}`];
    for (const [key, value] of Object.entries(base)) // Postgres has several users' URLs
      if (value?.includes(before)) env[key] = value.replace(before, after);
  }
  return {
    env,
    start: (name, as = (command) => command) => {
      const { part, recorded } = described[name];
      return startPart(part, { ...base, ...env }, { name: recorded, folder: join(folder, name), as: (command) => mortal(as(command)) });
    },
    kill: async (name) => void (await stopProcess(described[name].recorded, "SIGKILL")),
    signal: (name, signal) => {
      const { pid } = running(described[name].recorded) ?? {};
      if (pid) process.kill(pid, signal);
    },
    forget: () => {
      for (const name of names) forget(described[name].recorded);
    },
    [Symbol.asyncDispose]: async () => void (await Promise.all(names.map((name) => remove(described[name].recorded)))),
  };
}

const ofSensors = ["kafka", "connect", "clickhouse"] as const;
export type SensorsServer = (typeof ofSensors)[number];

/** Servers that run, with a folder of their own; by default those of sensors, of which Connect needs Kafka. */
export async function createServers<Name extends string = SensorsServer>(
  names: readonly Name[] = ofSensors as readonly string[] as readonly Name[],
): Promise<Servers<Name>> {
  const folder = mkdtempSync(join(tmpdir(), "etl-servers-"));
  const servers = await describeServers(names, folder);
  const dispose = async (): Promise<void> => {
    await servers[Symbol.asyncDispose]();
    rmSync(folder, { recursive: true, force: true });
  };
  for (const name of names) await servers.start(name).catch((error: Error) => dispose().finally(() => Promise.reject(error)));
  return { ...servers, [Symbol.asyncDispose]: dispose };
}
