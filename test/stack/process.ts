// The stack's processes: started, awaited, stopped. They are detached (a Ctrl-C in `make up` must not kill what already runs)
// and remembered in .stack/run/NAME.json.
import { spawn } from "node:child_process";
import { once } from "node:events";
import {
  closeSync,
  existsSync,
  globSync,
  mkdirSync,
  openSync,
  readdirSync,
  readFileSync,
  readlinkSync,
  renameSync,
  rmSync,
  writeFileSync,
} from "node:fs";
import { connect, createServer } from "node:net";
import { basename } from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import { type Env, endpoint } from "./env.ts";
import { type Install, installKey } from "./install.ts";
import { digest, logPath, type Part, stackDir, stackPath } from "./stack.ts";

/** How a process is started. A changed command line, or a changed install, restarts it. */
export type Command = {
  command: string;
  args: string[];
  env?: Env;
  stopSignal?: NodeJS.Signals;
  /** Seconds between stopSignal and SIGKILL. */
  grace?: number;
};

type Record = { pid: number; bootTicks: string; startedAt: number; key: string; stopSignal: NodeJS.Signals; grace: number };

export const recordPath = (name: string): string => stackPath("run", `${name}.json`);

/**
 * When a process was started; undefined where it has ended. Pids are reused: only pid and start time together name a process.
 * A zombie whose other threads still end, as a killed JVM's do, has its ports and files still.
 */
function bootTicks(pid: number): string | undefined {
  try {
    const stat = readFileSync(`/proc/${pid}/stat`, "utf8");
    const fields = stat.replace(/^.*\) /s, "").split(" ");
    return fields[0] === "Z" && Number(fields[17]) <= 1 ? undefined : fields[19];
  } catch {
    return undefined;
  }
}

/** What runs under this name and was started by this stack. */
export function running(name: string): Record | undefined {
  try {
    const record = JSON.parse(readFileSync(recordPath(name), "utf8")) as Record;
    return bootTicks(record.pid) === record.bootTicks ? record : undefined;
  } catch {
    return undefined; // no record, or one cut short by a kill
  }
}

export const recordedNames = (): string[] => globSync(stackPath("run", "*.json")).map((path) => basename(path, ".json"));

/** Servers get this and what their part adds: no variable of the caller, such as PGOPTIONS or PYTHONPATH, changes them. */
const serverEnv = (): Env => ({
  PATH: process.env.PATH,
  HOME: stackDir,
  TMPDIR: process.env.TMPDIR,
  LANG: "C.UTF-8",
  TZ: "UTC",
});

export const commandKey = (command: Command, installs: Install[] = []): string =>
  digest(JSON.stringify([command, installs.map(installKey)]));

/** Starts a detached process with its own log. Throws where it cannot be executed; being ready is `awaitReady`'s. */
export async function startProcess(name: string, command: Command, installs: Install[] = []): Promise<void> {
  mkdirSync(stackPath("log"), { recursive: true });
  mkdirSync(stackPath("run"), { recursive: true });
  if (existsSync(logPath(name))) renameSync(logPath(name), `${logPath(name)}.1`);
  const log = openSync(logPath(name), "a");
  const child = spawn(command.command, command.args, {
    cwd: stackDir,
    env: { ...serverEnv(), ...command.env },
    stdio: ["ignore", log, log],
    detached: true,
  });
  closeSync(log);
  await once(child, "spawn");
  child.unref();
  const { pid = 0 } = child;
  const { stopSignal = "SIGTERM", grace = 10 } = command;
  const started = { pid, bootTicks: bootTicks(pid) ?? "", startedAt: Date.now() };
  const record: Record = { ...started, key: commandKey(command, installs), stopSignal, grace };
  writeFileSync(`${recordPath(name)}.tmp`, JSON.stringify(record));
  renameSync(`${recordPath(name)}.tmp`, recordPath(name));
}

const lastLines = (name: string): string =>
  `${existsSync(logPath(name)) ? readFileSync(logPath(name), "utf8").trim().split("\n").slice(-12).join("\n") : ""}\n(log: ${logPath(name)})`;

const SECONDS = 90;

/** Waits until `ready` resolves. Throws with the end of the log when the process ends first, or after 90 s. */
export async function awaitReady(name: string, ready: () => Promise<void>): Promise<void> {
  const deadline = Date.now() + SECONDS * 1000;
  for (;;) {
    const failure = await ready().then(
      () => undefined,
      (error: Error) => error,
    );
    if (!failure) return;
    if (!running(name)) throw new Error(`${name} died at its start:\n${lastLines(name)}`);
    if (Date.now() > deadline) {
      throw new Error(`${name} is not ready after ${SECONDS} s (${failure.message}); its log ends:\n${lastLines(name)}`);
    }
    await sleep(50);
  }
}

/** @throws Error where what answers at a URL is no OK. */
export async function answers(url: string): Promise<void> {
  const answer = await fetch(url, { signal: AbortSignal.timeout(10_000) });
  if (!answer.ok) throw new Error(`${url}: HTTP ${answer.status} ${await answer.text()}`);
}

/** @throws Error where nobody listens at a port. */
export async function listens(port: number): Promise<void> {
  const socket = connect(port, "127.0.0.1");
  await once(socket, "connect");
  socket.destroy();
}

/**
 * Starts a part, or another one of its kind under its own name and in its own folder, and waits until it serves.
 * @param as changes how it is started.
 */
export async function startPart(
  part: Part,
  env: Env,
  { name = part.name, folder = stackPath(part.name), as = (command: Command): Command => command } = {},
): Promise<void> {
  mkdirSync(folder, { recursive: true });
  await part.prepare?.(env, folder);
  await startProcess(name, as(part.command(env, folder)), part.installs);
  await awaitReady(name, () => part.ready(env));
}

function signal(pid: number, name: NodeJS.Signals): void {
  try {
    process.kill(pid, name);
  } catch {
    // it ended this instant
  }
}

/** Stops what runs under this name: by its own signal or this one, then SIGKILL for its whole group. Answers whether anything ran. */
export async function stopProcess(name: string, by?: NodeJS.Signals): Promise<boolean> {
  const record = running(name);
  if (record) {
    signal(record.pid, by ?? record.stopSignal);
    const deadline = Date.now() + record.grace * 1000;
    while (running(name) && Date.now() < deadline) await sleep(20);
    signal(-record.pid, "SIGKILL");
    while (running(name)) await sleep(20);
  }
  rmSync(recordPath(name), { force: true });
  return record !== undefined;
}

/** Throws where another process listens at this address, and says which; `remedy` ends the message. */
export async function checkPort(name: string, url: string, remedy = "Stop that process or choose another port"): Promise<void> {
  const { host, port } = endpoint(url);
  const server = createServer();
  const taken = await new Promise<boolean>((resolve, reject) => {
    server.once("error", (error: NodeJS.ErrnoException) => (error.code === "EADDRINUSE" ? resolve(true) : reject(error)));
    server.listen(port, host.replace(/[[\]]/g, ""), () => server.close(() => resolve(false)));
  });
  if (taken) throw new Error(`${name}: port ${port} is taken by ${portHolder(port) ?? "another process"}. ${remedy}`);
}

/** The process that listens on a TCP port, from /proc; undefined where it belongs to a user that we may not look at. */
export function portHolder(port: number): string | undefined {
  const hex = `:${port.toString(16).toUpperCase().padStart(4, "0")}`;
  const inodes = ["/proc/net/tcp", "/proc/net/tcp6"]
    .flatMap((file) => (existsSync(file) ? readFileSync(file, "utf8").split("\n") : []))
    .map((line) => line.trim().split(/\s+/))
    .filter((fields) => fields[1]?.endsWith(hex) && fields[3] === "0A") // 0A is LISTEN
    .map((fields) => `socket:[${fields[9]}]`);
  for (const pid of readdirSync("/proc").filter((entry) => /^\d+$/.test(entry))) {
    try {
      if (readdirSync(`/proc/${pid}/fd`).some((fd) => inodes.includes(readlinkSync(`/proc/${pid}/fd/${fd}`)))) {
        return `pid ${pid} (${readFileSync(`/proc/${pid}/cmdline`, "utf8").replaceAll("\0", " ").trim().slice(0, 120)})`;
      }
    } catch {
      /* gone meanwhile, or another user's */
    }
  }
  return undefined;
}
