/**
 * A stack of the campaign's own, so that every server of it may be killed, and a copy of the code, which may be changed. What is
 * installed is this checkout's. Every connection of its scripts goes through a Link.
 */
import { spawnSync } from "node:child_process";
import { readdirSync, readFileSync, rmSync } from "node:fs";
import { join } from "node:path";
import { createLink, type Link } from "../lib/link.ts";
import { type Scratch, scratchCopy } from "../lib/scratch.ts";
import { describeServers, type Servers } from "../lib/servers.ts";
import { freePort } from "../lib/shop.ts";
import { type Env, endpoint, localEnv } from "../stack/env.ts";
import { ensureInstalled } from "../stack/install.ts";
import { parts as installable } from "../stack/parts.ts";
import type { Command } from "../stack/process.ts";

export const servers = ["postgres", "bigquery", "clickhouse", "kafka", "connect", "s3", "pushgateway"] as const;
export type ServerName = (typeof servers)[number];

/** The variables of connections. */
export const linkNames = [
  ...(["SOURCE_DATABASE_URL", "ETL_DATABASE_URL", "REPLICATION_DATABASE_URL", "BIGQUERY_ENDPOINT", "CLICKHOUSE_URL"] as const),
  ...(["KAFKA_BROKERS", "CONNECT_URL", "S3_ENDPOINT", "PUSHGATEWAY_URL"] as const),
] as const;
export type LinkName = (typeof linkNames)[number];

export interface PrivateStack extends Servers<ServerName> {
  scratch: Scratch;
  links: Record<LinkName, Link>;
  /** What a script of the shop is given, so that its connections go through the links. */
  variables(env: Env): Env;
}

const installs = new Set(installable.filter(({ name }) => servers.includes(name as ServerName)).flatMap((part) => part.installs));

/**
 * However this process ends, but by SIGKILL, nothing of the stack is left.
 * @param change rewrites the copy before anything of it runs.
 */
export async function createStack(change: (scratch: Scratch) => void): Promise<PrivateStack> {
  for (const install of installs) await ensureInstalled(install);
  const scratch = scratchCopy(["views"]);
  const own = await describeServers(servers, join(scratch.folder, "servers"));
  process.on("exit", () => {
    remove(scratch.folder);
    own.forget();
  });
  change(scratch);
  const link = async (name: LinkName) => [name, await createLink(own.env[name], { port: await freePort() })];
  const links = Object.fromEntries(await Promise.all(linkNames.map(link))) as Record<LinkName, Link>;
  // Clients go where the broker tells them to.
  own.env.KAFKA_ADVERTISED = `127.0.0.1:${links.KAFKA_BROKERS.port}`;
  return {
    ...own,
    scratch,
    links,
    env: Object.assign(own.env, { ...localEnv(), ...own.env, PROMETHEUS_URL: "" }),
    variables: (shop) =>
      Object.fromEntries(linkNames.map((name) => [name, shop[name]?.replace(`:${endpoint(shop[name]).port}`, `:${links[name].port}`)])),
  };
}

/** Kills all that was started with a path in the folder, scripts and servers alike, and removes it. */
function remove(folder: string): void {
  const ofFolder = (pid: string): boolean => {
    try {
      return /^\d+$/.test(pid) && readFileSync(`/proc/${pid}/cmdline`, "utf8").includes(`${folder}/`);
    } catch {
      return false; // gone meanwhile
    }
  };
  const left = (): string[] => readdirSync("/proc").filter(ofFolder);
  for (let pids = left(); pids.length; pids = left()) spawnSync("kill", ["-KILL", ...pids]);
  rmSync(folder, { recursive: true, force: true, maxRetries: 20 }); // Postgres's children end a moment after it
}

/** What a server sees of a full disk: it cannot write a file of more than a kilobyte. */
export function withFullDisk({ command, args, ...rest }: Command): Command {
  return { ...rest, command: "bash", args: ["-c", 'trap \'\' XFSZ; ulimit -f 1; exec "$0" "$@"', command, ...args] };
}
