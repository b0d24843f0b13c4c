/**
 * The peers, each in a venv of its own below .stack/peers/, and their commands. All of them as their documentation says; their
 * telemetry is off.
 */
import { execFileSync } from "node:child_process";
import { mkdtempSync } from "node:fs";
import { join } from "node:path";
import { root } from "../stack/env.ts";
import { ensureInstalled, run } from "../stack/install.ts";
import { stackPath } from "../stack/stack.ts";
import type { Command } from "./measure.ts";

const packages = {
  dlt: ["dlt[postgres,filesystem,s3,parquet,sql-database]==1.31.0", "connectorx==0.4.4"],
  sling: ["sling-linux-amd64==1.4.11"],
  ingestr: ["ingestr==1.1.22"],
};

/** Installs a peer once. @returns the folder of its programs. */
async function venv(name: keyof typeof packages): Promise<string> {
  const folder = stackPath("peers", name);
  const install = async (): Promise<void> => {
    await run("python3", ["-m", "venv", folder], { needs: "Install Python 3 with venv" });
    await run(join(folder, "bin/pip"), ["install", "-q", ...packages[name]]);
  };
  await ensureInstalled({ name: `peer-${name}`, definition: () => packages[name].join(), run: install });
  return join(folder, "bin");
}

const scheme = (url: string, name: string): string => url.replace(/^\w+:/, `${name}:`);
/** A URL of Postgres, without TLS. */
export const plain = (url: string): string => `${scheme(url, "postgresql")}?sslmode=disable`;

/** The commands of the peers. `home` is a folder: what a tool remembers of a source is below it, and is forgotten with it. */
export async function openPeers(home: string) {
  const bin = { dlt: await venv("dlt"), sling: await venv("sling"), ingestr: await venv("ingestr") };
  const find = "import sling_linux_amd64 as s; print(list(s.__path__)[0], end='')";
  const sling = execFileSync(join(bin.sling, "python"), ["-c", find], { encoding: "utf8" });
  const off = { DO_NOT_TRACK: "1", SLING_DISABLE_TELEMETRY: "true", DISABLE_TELEMETRY: "true" };
  const flags = (given: Record<string, string>): string[] => Object.entries(given).flatMap(([name, value]) => [`--${name}`, value]);
  return {
    /** Somewhere for a tool to remember from run to run what it has read. */
    newHome: (): string => mkdtempSync(join(home, "peer-")),

    dlt: (source: string, env: NodeJS.Dict<string>): Command => ({
      command: join(bin.dlt, "python"),
      args: [join(root, "test/bench/peers/dlt_table.py")],
      cwd: home,
      env: {
        ...{ ...off, HOME: home, RUNTIME__DLTHUB_TELEMETRY: "false" },
        ...{ NORMALIZE__DATA_WRITER__DISABLE_COMPRESSION: "false", SOURCE: scheme(source, "postgresql+psycopg2") },
        ...env,
      },
    }),

    /** @param target a URL of Postgres, or Sling's own description of a connection. */
    sling: (source: string, target: string, given: Record<string, string>): Command => ({
      command: join(sling, "bin", "sling-linux-amd64"),
      args: ["run", ...flags({ "src-conn": "PG", ...(target && { "tgt-conn": "TARGET" }), ...given })],
      cwd: home,
      env: { ...off, HOME: home, PG: plain(source), TARGET: target.startsWith("postgres") ? plain(target) : target },
    }),

    /** @param source and target as URIs, with their settings. */
    ingestr: (source: string, target: string, given: Record<string, string>): Command => ({
      command: join(bin.ingestr, "ingestr"),
      args: [...["ingest", ...flags({ "source-uri": source, "dest-uri": target, progress: "log", ...given })], "--yes"],
      cwd: home,
      env: { ...off, HOME: home },
    }),
  };
}

type Peers = Awaited<ReturnType<typeof openPeers>>;

/** A tool's incremental run of public.orders into a schema of a Postgres, by the cursor updated_at and the primary key id. */
export interface Sync {
  by: string;
  /** The schema of the target. */
  schema: string;
  command(): Command;
  /** The rows that a run says it delivered. */
  delivered: RegExp;
}

const inMergeMode = { mode: "incremental", "primary-key": "id", "update-key": "updated_at" };

/** @param env for dlt: LAG, BACKEND, LOADER. */
export function dltSync(peers: Peers, source: string, target: string, schema: string, env: NodeJS.Dict<string>): Sync {
  const HOME = peers.newHome();
  return {
    ...{ by: "dlt 1.31.0", schema, delivered: /^delivered (\d+)$/m },
    command: () => peers.dlt(source, { HOME, TABLE: "orders", TARGET: scheme(target, "postgresql"), DATASET: schema, ...env }),
  };
}

/** @param stream the table, or a SELECT. */
export function slingSync(peers: Peers, source: string, target: string, schema: string, stream = "public.orders"): Sync {
  const given = { "src-stream": stream, "tgt-object": `${schema}.orders`, ...inMergeMode };
  return {
    ...{ by: "Sling 1.4.11", schema, delivered: /inserted (\d+) rows/ },
    command: () => peers.sling(source, target, given),
  };
}

/** @param from where it reads: all, from the beginning of the run before on (as its scheduler would say), or the write-ahead log. */
export function ingestrSync(peers: Peers, source: string, target: string, schema: string, from: "all" | "interval" | "log"): Sync {
  const given = { "source-table": "public.orders", "dest-table": `${schema}.orders`, "incremental-strategy": "merge" };
  const cursor = from === "log" ? {} : { "incremental-key": "updated_at", "primary-key": "id" };
  const uri = from === "log" ? `${scheme(source, "postgres+cdc")}?sslmode=disable&slot=${slotOf(source)}` : plain(source);
  let interval = {};
  return {
    ...{ by: "ingestr 1.1.22", schema, delivered: /Total Rows\s+│\s+([\d,]+)/ },
    command: () => {
      const command = peers.ingestr(uri, plain(target), { ...given, ...cursor, ...interval });
      if (from === "interval") interval = { "interval-start": new Date().toISOString() };
      return command;
    },
  };
}

/** The replication slot by which ingestr reads a database's log. */
export const slotOf = (source: string): string => `${new URL(source).pathname.slice(1)}_ingestr`;
