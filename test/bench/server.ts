/** A Postgres server of a bench's own: nothing else runs on it. */
import { randomBytes } from "node:crypto";
import { rmSync } from "node:fs";
import { freePort } from "../lib/shop.ts";
import { localEnv } from "../stack/env.ts";
import { startCluster, stopCluster } from "../stack/postgres.ts";
import { stackPath } from "../stack/stack.ts";

/** @returns its URL, as its superuser. */
export async function startServer(): Promise<{ url: string } & AsyncDisposable> {
  const name = `bench-${randomBytes(4).toString("hex")}`;
  const port = String(await freePort());
  const url = Object.assign(new URL(localEnv().STACK_ADMIN_DATABASE_URL ?? ""), { port }).href;
  await startCluster({ name, dataDir: stackPath("clusters", name, "data"), url });
  const dispose = async (): Promise<void> => {
    await stopCluster(name);
    rmSync(stackPath("clusters", name), { recursive: true, force: true });
  };
  return { url, [Symbol.asyncDispose]: dispose };
}
