/** PgBouncer in front of the local stack's Postgres: Debian's, of a test's own. */
import { spawn } from "node:child_process";
import { once } from "node:events";
import { chmodSync, globSync, mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { connect } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { debianPackage, debianPath } from "../stack/debian.ts";
import { endpoint } from "../stack/env.ts";
import { ensureInstalled } from "../stack/install.ts";
import { freePort, until } from "./shop.ts";

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
  const own = await freePort();
  const all = {
    listen_addr: host,
    listen_port: String(own),
    unix_socket_dir: "",
    auth_type: "plain",
    auth_file: join(folder, "users"),
    ...settings,
  };
  const lines = Object.entries(all).map(([name, value]) => `${name} = ${value}`);
  writeFileSync(join(folder, "ini"), `[databases]\n* = host=${host} port=${port}\n[pgbouncer]\n${lines.join("\n")}\n`);
  writeFileSync(all.auth_file, `"${username}" "${decodeURIComponent(password)}"\n`);
  chmodSync(folder, 0o755);
  const [libraries] = globSync(debianPath("pgbouncer", "usr/lib/*-linux-gnu"));
  // It refuses to run as root.
  const user = process.getuid?.() === 0 ? ["-u", "nobody"] : [];
  const args = ["-q", ...user, join(folder, "ini")];
  const env = { PATH: process.env.PATH, LD_LIBRARY_PATH: libraries };
  const child = spawn(debianPath("pgbouncer", "usr/sbin/pgbouncer"), args, {
    env,
    stdio: ["ignore", "ignore", "pipe"],
  });
  let said = "";
  child.stderr.setEncoding("utf8").on("data", (text) => {
    said += text;
  });
  const listens = (): Promise<boolean> =>
    new Promise((resolve, reject) => {
      if (child.exitCode !== null) return reject(new Error(`pgbouncer ended: ${said}`));
      const socket = connect(own, host).once("error", () => resolve(false));
      socket.once("connect", () => resolve(socket.end() !== undefined));
    });
  await until("pgbouncer listens", listens);
  return {
    url: Object.assign(new URL(url), { port: String(own) }).href,
    [Symbol.asyncDispose]: async () => {
      const closed = once(child, "close");
      if (child.kill("SIGKILL")) await closed;
      rmSync(folder, { recursive: true, force: true });
    },
  };
}
