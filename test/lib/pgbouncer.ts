/** PgBouncer in front of the local stack's Postgres: Debian's, of a test's own. */
import { chmodSync, globSync, mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { debianPackage, debianPath } from "../stack/debian.ts";
import { endpoint } from "../stack/env.ts";
import { ensureInstalled } from "../stack/install.ts";
import { listens } from "../stack/process.ts";
import { startServer } from "./servers.ts";
import { freePort } from "./shop.ts";

const install = debianPackage("pgbouncer", "libc-ares2", "libevent-2.1-7");

/**
 * @param settings over those of pgbouncer.ini, such as pool_mode.
 * @returns `url` with PgBouncer's port.
 */
export async function startPgbouncer(url: string, settings: Record<string, string>): Promise<{ url: string } & AsyncDisposable> {
  await ensureInstalled(install);
  const { host, port } = endpoint(url);
  const { username, password } = new URL(url);
  const folder = mkdtempSync(join(tmpdir(), "etl-pgbouncer-"));
  const own = String(await freePort());
  const users = join(folder, "users");
  const all = { listen_addr: host, listen_port: own, unix_socket_dir: "", auth_type: "plain", auth_file: users, ...settings };
  const lines = Object.entries(all).map(([name, value]) => `${name} = ${value}`);
  writeFileSync(join(folder, "ini"), `[databases]\n* = host=${host} port=${port}\n[pgbouncer]\n${lines.join("\n")}\n`);
  writeFileSync(users, `"${username}" "${decodeURIComponent(password)}"\n`);
  chmodSync(folder, 0o755);
  // It refuses to run as root.
  const user = process.getuid?.() === 0 ? ["-u", "nobody"] : [];
  const command = {
    command: debianPath("pgbouncer", "usr/sbin/pgbouncer"),
    args: ["-q", ...user, join(folder, "ini")],
    env: { LD_LIBRARY_PATH: globSync(debianPath("pgbouncer", "usr/lib/*-linux-gnu"))[0] },
  };
  const server = await startServer("pgbouncer", command, () => listens(Number(own)));
  return {
    url: Object.assign(new URL(url), { port: own }).href,
    [Symbol.asyncDispose]: async () => {
      await server[Symbol.asyncDispose]();
      rmSync(folder, { recursive: true, force: true });
    },
  };
}
