/** A Postgres server of a bench's own: all of its processes count, and nothing else runs on it. */
import { randomBytes } from "node:crypto";
import { rmSync } from "node:fs";
import { freePort } from "../lib/shop.ts";
import { localEnv } from "../stack/env.ts";
import { startCluster, stopCluster } from "../stack/postgres.ts";
import { running } from "../stack/process.ts";
import { stackPath } from "../stack/stack.ts";
import { treeCpu } from "./measure.ts";

export interface Server extends AsyncDisposable {
  /** As its superuser. */
  url: string;
  /** CPU seconds so far of the postmaster, of those that it started, and of those of them that have ended. */
  cpu(): number;
}

export async function startServer(settings: Record<string, string> = {}): Promise<Server> {
  const name = `bench-${randomBytes(4).toString("hex")}`;
  const port = String(await freePort());
  const url = Object.assign(new URL(localEnv().STACK_ADMIN_DATABASE_URL ?? ""), { port }).href;
  const dispose = async (): Promise<void> => {
    await stopCluster(name);
    rmSync(stackPath("clusters", name), { recursive: true, force: true });
  };
  try {
    await startCluster({ name, dataDir: stackPath("clusters", name, "data"), url, settings });
  } catch (error) {
    await dispose();
    throw error;
  }
  return { url, cpu: () => treeCpu(running(name)?.pid ?? 0), [Symbol.asyncDispose]: dispose };
}
