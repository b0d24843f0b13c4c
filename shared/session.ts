/** Postgres: sessions with fixed settings. */
import { once } from "node:events";
import { readFileSync } from "node:fs";
import { connect as connectSocket, isIP, type Socket } from "node:net";
import { join } from "node:path";
import { connect as connectTls } from "node:tls";
import postgres, { type Sql } from "postgres";
import { parsePostgresUrl, root } from "./env.ts";

export type Settings = Record<string, string>;

/** Its name in pg_stat_activity, of at most 63 bytes; the deadline of each statement; further settings, such as etl.from and etl.to. */
export type SessionOptions = { application: string; timeoutSeconds: number; settings?: Settings };

/**
 * One session, opened at its first statement. `await session.end()` closes it; so does the end of its scope with `await using`, whatever
 * it still does. It is never replaced (max_lifetime): that would quietly lose its advisory lock.
 */
export function openSession(url: string, options: SessionOptions): Sql & AsyncDisposable {
  const { sslmode, ...server } = parsePostgresUrl(url);
  const connectSeconds = Math.min(10, options.timeoutSeconds);
  let socket: Socket | undefined;
  delete process.env.PGTARGETSESSIONATTRS; // libpq's: postgres.js would refuse our read-only role by it, without a word
  const session = postgres({
    ...server,
    host: [server.host], // as text ::1 would be a host and a port
    port: [server.port],
    socket: async () => {
      socket = await openSocket({ ...server, sslmode }, connectSeconds);
      return socket;
    },
    max: 1,
    max_lifetime: null,
    connect_timeout: connectSeconds,
    fetch_types: false,
    onnotice: () => {},
    // Whatever the role, the database or the server default to: the same names and text, no row silently filtered, nothing that hangs
    // for ever, and nothing that ends a session which waits for another.
    connection: {
      application_name: options.application,
      search_path: "public",
      TimeZone: "UTC",
      DateStyle: "ISO",
      IntervalStyle: "iso_8601",
      extra_float_digits: "1",
      bytea_output: "hex",
      standard_conforming_strings: "on",
      row_security: "off",
      statement_timeout: Math.ceil(options.timeoutSeconds * 1000),
      lock_timeout: 30_000,
      idle_in_transaction_session_timeout: 60_000,
      idle_session_timeout: "0",
      tcp_keepalives_idle: "30",
      tcp_keepalives_interval: "10",
      tcp_user_timeout: "0",
      client_connection_check_interval: "5000",
      ...options.settings,
    },
  } as object);
  const close = async (): Promise<void> => {
    await session.end({ timeout: 0 });
    socket?.destroy(); // Nothing else ends a COPY whose reader has failed.
  };
  return Object.assign(session, { [Symbol.asyncDispose]: close });
}

type Address = { host: string; port: number; sslmode: string };
const SSL_REQUEST = Buffer.from([0, 0, 0, 8, 4, 210, 22, 47]);

/**
 * Opens a session's connection. sslmode=require encrypts, as in libpq; verify-full (and verify-ca, here the same) also checks the
 * certificate and that it is the host's. Where the server ends the session, its words are the error: postgres.js would drop them.
 */
async function openSocket({ host, port, sslmode }: Address, seconds: number): Promise<Socket> {
  const signal = AbortSignal.timeout(seconds * 1000);
  let socket = connectSocket({ host, port });
  try {
    await once(socket, "connect", { signal });
    if (sslmode !== "disable") {
      socket.write(SSL_REQUEST);
      const [answer] = await once(socket, "data", { signal });
      if (String(answer) !== "S") throw new Error(`the server has no TLS, and sslmode is ${sslmode}`);
      const rejectUnauthorized = sslmode.startsWith("verify-");
      socket = connectTls({ socket, host, servername: isIP(host) ? "" : host, rejectUnauthorized });
      await once(socket, "secureConnect", { signal });
    }
  } catch (error) {
    socket.on("error", () => {}).destroy();
    throw signal.aborted ? new Error(`no answer within ${seconds} s`) : error;
  }
  socket.on("end", () => socket.destroy(new Error("the server closed the connection")));
  return socket.on("data", (received: Buffer) => {
    const fatal = received.lastIndexOf("VFATAL\0C");
    const [, code, message] = /C(.{5})\0M([^\0]*)/.exec(fatal < 0 ? "" : received.toString("utf8", fatal)) ?? [];
    if (code) process.nextTick(() => socket.destroy(Object.assign(new Error(message), { code })));
  });
}

/** Opens it. What only some versions have cannot be set at its start: a server refuses a name that it does not know. */
export const prepareSession = (session: Sql): Promise<unknown> =>
  session`select set_config(name, '0', false) from pg_settings where name = 'transaction_timeout'`.execute();

/**
 * Opens the session, so that a wrong URL, password or database is named by its variable and not met in the middle of a run.
 * @throws Error with the variable, the server's words and what to do.
 */
export async function checkSession(variable: string, session: Sql): Promise<void> {
  await prepareSession(session).catch(({ code, message }: Error & { code?: string }) => {
    const { host, port, database, user } = session.options;
    const where = `${variable} (host ${host[0]}, port ${port[0]}, database ${database}, role ${user})`;
    const next = "Are these right, and its password (percent-encoded), sslmode and NODE_EXTRA_CA_CERTS?";
    throw new Error(`cannot connect to ${where}: ${message || code}. ${next} For the local stack: make up`);
  });
}

/** Timestamps as `utc` writes them: from inclusive, '-infinity' before the first run; to exclusive. */
export type Window = Record<"from" | "to", string>;

/** Rows of a query that reads settings, such as etl.from. In autocommit: a ROLLBACK on a lost connection would hide why it was lost. */
export async function queryWith<T extends object>(sql: Sql, settings: Settings, query: string): Promise<T[]> {
  const set = sql`select set_config(key, value, false) from jsonb_each_text(${JSON.stringify(settings)}::text::jsonb)`;
  return (await Promise.all([set, sql.unsafe<T[]>(query)]))[1]; // nothing of this session comes in between
}

/** Rows of sql/NAME.sql, which reads the settings. */
export const queryFile = <T extends object>(sql: Sql, name: string, settings: Settings): Promise<T[]> =>
  queryWith<T>(sql, settings, readFileSync(join(root, `sql/${name}.sql`), "utf8"));

/** An identifier as SQL writes it. */
export const quote = (name: string): string => `"${name.replaceAll('"', '""')}"`;
export const ident = (name: string): string => (/^[a-z_][a-z_0-9]*$/.test(name) ? name : quote(name)); // for people

/** SQL: a timestamptz as text of a fixed width in UTC, so that two compare as text. Never a JS Date, which holds milliseconds. */
export const utc = (sql: string): string => `to_char(${sql} at time zone 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"+00"')`;
