/**
 * Postgres clusters of a test's own, for what must not be done to the shared one: a standby, a failover, another server in
 * its place, a clock that is set back. The destination and schema etl stay on the local stack.
 */
import { randomBytes } from "node:crypto";
import { cpSync, globSync, mkdirSync, rmSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import postgres, { type Sql } from "postgres";
import { createSource } from "../data/source.ts";
import { debianPackage, debianPath } from "../stack/debian.ts";
import { localEnv } from "../stack/env.ts";
import { ensureInstalled } from "../stack/install.ts";
import { type Cluster, startCluster, stopCluster } from "../stack/postgres.ts";
import { stackPath } from "../stack/stack.ts";
import { freePort } from "./shop.ts";

export interface TestCluster extends AsyncDisposable {
  /** Its superuser, in the shop's database. Connects again after a restart. */
  admin: Sql;
  /** What a run is given to read from this cluster. */
  variables: { SOURCE_DATABASE_URL: string; REPLICATION_DATABASE_URL: string };
  /** Copies its disk; what it returns puts the copy in the disk's place. Each restarts it. */
  saveDisk(): Promise<{ restore(): Promise<void> }>;
  /** Sets its clock against the machine's while it runs, for example "-3600" seconds. */
  setClock(offset: string): void;
  /** A standby that streams from it. Restarts this cluster, to copy it. */
  createStandby(): Promise<TestCluster>;
}

const small = { shared_buffers: "16MB", max_connections: "30" };

/** A cluster with the shop's tables and roles, and without rows. */
export async function createCluster(settings: Record<string, string> = {}): Promise<TestCluster> {
  await ensureInstalled(faketime);
  const cluster = await describe("primary", settings);
  const created = await start(cluster);
  await createSource(
    cluster.url,
    ["SOURCE_DATABASE_URL", "REPLICATION_DATABASE_URL"].map((name) => localEnv()[name] ?? ""),
  );
  return created;
}

/** Name, folder, port and environment: nothing is started yet. */
async function describe(kind: string, settings: Record<string, string>): Promise<Cluster> {
  const name = `test-${kind}-${randomBytes(4).toString("hex")}`;
  const folder = stackPath("clusters", name);
  mkdirSync(folder, { recursive: true });
  const port = String(await freePort());
  const url = Object.assign(new URL(localEnv().STACK_ADMIN_DATABASE_URL ?? ""), { port }).href;
  const env = {
    LD_PRELOAD: library(),
    FAKETIME_TIMESTAMP_FILE: join(folder, "clock"),
    FAKETIME_NO_CACHE: "1",
    FAKETIME_DONT_FAKE_MONOTONIC: "1", // Postgres waits by this one
    FAKETIME_DISABLE_SHM: "1",
  };
  writeFileSync(env.FAKETIME_TIMESTAMP_FILE, "+0");
  return { name, dataDir: join(folder, "data"), url, settings: { ...small, ...settings }, env };
}

async function start(cluster: Cluster): Promise<TestCluster> {
  await startCluster(cluster);
  const admin = postgres(cluster.url, { max: 1, fetch_types: false, onnotice: () => {} });
  const { host, pathname } = new URL(cluster.url);
  const at = (name: string): string => Object.assign(new URL(localEnv()[name] ?? ""), { host, pathname }).href;
  return {
    admin,
    variables: {
      SOURCE_DATABASE_URL: at("SOURCE_DATABASE_URL"),
      REPLICATION_DATABASE_URL: at("REPLICATION_DATABASE_URL"),
    },
    saveDisk: async () => {
      const [disk, copy] = [cluster.dataDir, `${cluster.dataDir}.saved`];
      const move = async (from: string, to: string): Promise<void> => {
        await stopCluster(cluster.name);
        rmSync(to, { recursive: true, force: true });
        cpSync(from, to, { recursive: true });
        await startCluster(cluster);
      };
      await move(disk, copy);
      return { restore: () => move(copy, disk) };
    },
    setClock: (offset) => writeFileSync(cluster.env?.FAKETIME_TIMESTAMP_FILE ?? "", offset),
    createStandby: async () => {
      const { hostname, port, username, password } = new URL(cluster.url);
      const conninfo = `host=${hostname} port=${port} user=${username} password=${decodeURIComponent(password)}`;
      const standby = await describe("standby", { ...cluster.settings, primary_conninfo: conninfo });
      await stopCluster(cluster.name); // a copy taken while it is stopped needs no backup mode
      cpSync(cluster.dataDir, standby.dataDir, { recursive: true });
      await startCluster(cluster);
      writeFileSync(join(standby.dataDir, "standby.signal"), "");
      return start(standby);
    },
    [Symbol.asyncDispose]: async () => {
      await admin.end({ timeout: 1 });
      await stopCluster(cluster.name);
      rmSync(join(cluster.dataDir, ".."), { recursive: true, force: true });
    },
  };
}

const faketime = debianPackage("libfaketime");
const library = (): string => globSync(debianPath("libfaketime", "usr/lib/*/faketime/libfaketime.so.1"))[0] ?? "";
