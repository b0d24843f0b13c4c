/**
 * A stack of the campaign's own: a copy of the project with ports, data and processes of its own, so that every server of it may
 * be killed, and the code be changed. What is installed is this checkout's. Every connection of its scripts goes through a Link.
 */
import { spawnSync } from "node:child_process";
import { readdirSync, readFileSync, rmSync } from "node:fs";
import { join } from "node:path";
import { createLink, type Link } from "../lib/link.ts";
import { type Scratch, scratchCopy } from "../lib/scratch.ts";
import { linkInstalled, type Servers, serversOf } from "../lib/servers.ts";
import type { Env } from "../stack/env.ts";
import { ensureInstalled } from "../stack/install.ts";
import { parts as installable } from "../stack/parts.ts";
import type { Command } from "../stack/process.ts";

export const servers = ["postgres", "bigquery", "clickhouse", "kafka", "connect", "s3", "pushgateway"] as const;
export type ServerName = (typeof servers)[number];

/** The variables of connections, each with the server behind it. */
const behind = {
  SOURCE_DATABASE_URL: "postgres",
  ETL_DATABASE_URL: "postgres",
  REPLICATION_DATABASE_URL: "postgres",
  BIGQUERY_ENDPOINT: "bigquery",
  CLICKHOUSE_URL: "clickhouse",
  KAFKA_BROKERS: "kafka",
  CONNECT_URL: "connect",
  S3_ENDPOINT: "s3",
  PUSHGATEWAY_URL: "pushgateway",
} as const;
export type LinkName = keyof typeof behind;
export const linkNames = Object.keys(behind) as LinkName[];

export interface PrivateStack extends Servers<ServerName> {
  scratch: Scratch;
  links: Record<LinkName, Link>;
  /** What a script of the shop is given, so that its connections go through the links. */
  variables(env: Env): Env;
  /** A module of the copy, which knows the copy's addresses. */
  load<T>(file: string): Promise<T>;
}

const installs = new Set(installable.filter(({ name }) => servers.includes(name as ServerName)).flatMap((part) => part.installs));

/**
 * However this process ends, but by SIGKILL, nothing of the stack is left.
 * @param change rewrites the copy before anything of it runs.
 */
export async function createStack(change: (scratch: Scratch) => void): Promise<PrivateStack> {
  await Promise.all([...installs].map(ensureInstalled));
  const scratch = scratchCopy(["test", "views"]);
  process.on("exit", () => remove(scratch.folder));
  rmSync(join(scratch.folder, ".stack")); // the link to this checkout's
  linkInstalled(scratch.folder);

  // Ports of no outgoing connection, which could take one while its server is down; nor of the tests' other servers.
  const first = 30_000 + 40 * Math.floor(Math.random() * 68);
  const ports = new Map<string, number>();
  scratch.edit(".env.example", (text) =>
    text
      .replaceAll(/127\.0\.0\.1:(\d+)/g, (_, port) => {
        ports.set(port, ports.get(port) ?? first + 2 * ports.size);
        return `127.0.0.1:${ports.get(port)}`;
      })
      .replace(/^PROMETHEUS_URL=.*/m, "PROMETHEUS_URL="),
  );
  const linkPort = (name: LinkName): number => first + 24 + linkNames.indexOf(name);
  // Clients go where the broker tells them to.
  scratch.edit("test/stack/kafka.ts", (text) =>
    text.replace(
      '"listener.security',
      `"advertised.listeners": "PLAINTEXT://127.0.0.1:${linkPort("KAFKA_BROKERS")}",\n    "listener.security`,
    ),
  );
  change(scratch);

  const load = <T>(file: string): Promise<T> => import(join(scratch.folder, file));
  const { localEnv, endpoint } = await load<typeof import("../stack/env.ts")>("test/stack/env.ts");
  const env = localEnv();
  const links = Object.fromEntries(
    await Promise.all(linkNames.map(async (name) => [name, await createLink(env[name], { port: linkPort(name) })])),
  ) as Record<LinkName, Link>;
  return {
    scratch,
    links,
    load,
    ...(await serversOf<ServerName>(scratch.folder, env)),
    variables: (shop) =>
      Object.fromEntries(
        linkNames.map((name) => {
          const { port } = endpoint(shop[name] ?? "");
          return [name, shop[name]?.replace(`:${port}`, `:${linkPort(name)}`)];
        }),
      ),
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
