/**
 * Postgres: sessions with fixed settings.
 *
 * Timestamps travel as text of a fixed width in UTC (`utc`), never as a JS Date, which holds milliseconds: two of them compare as text.
 */
import postgres, { type Sql } from "postgres";

export interface SessionOptions {
  /** Names the session in pg_stat_activity, so that whoever looks there finds the run. At most 63 bytes. */
  application: string;
  /** Deadline of each statement, in seconds. */
  timeoutSeconds: number;
  /** Further settings of the session, for example etl.from and etl.to. */
  settings?: Record<string, string>;
}

/**
 * One session, opened at its first statement; `await session.end()` closes it, as does the end of its scope with `await using`.
 * max_lifetime is off because a session that postgres.js quietly replaces would lose its advisory lock.
 */
export function connect(url: string, options: SessionOptions, extra: object = {}): Sql & AsyncDisposable {
  const session = postgres(url, {
    max: 1,
    idle_timeout: 0,
    max_lifetime: null,
    connect_timeout: 10,
    keep_alive: 30,
    fetch_types: false,
    onnotice: () => {},
    // Whatever the role, the database or the server default to: text output that does not depend on them, no row silently
    // filtered, and nothing that hangs for ever.
    connection: {
      application_name: options.application,
      TimeZone: "UTC",
      DateStyle: "ISO",
      IntervalStyle: "iso_8601",
      extra_float_digits: "1",
      bytea_output: "hex",
      row_security: "off",
      statement_timeout: Math.ceil(options.timeoutSeconds * 1000),
      lock_timeout: 30_000,
      idle_in_transaction_session_timeout: 60_000,
      tcp_keepalives_idle: "30",
      tcp_keepalives_interval: "10",
      tcp_keepalives_count: "3",
      client_connection_check_interval: "5000",
      ...options.settings,
    },
    ...checkedTls(url),
    ...extra,
  });
  return Object.assign(session, { [Symbol.asyncDispose]: () => session.end({ timeout: 5 }) });
}

/**
 * sslmode=require and prefer encrypt, as in libpq; verify-full (and verify-ca, here the same) also checks the certificate and that it
 * is the host's. An address has to be told: postgres.js would compare the certificate with "localhost".
 */
function checkedTls(url: string): { ssl?: object } {
  if (!URL.canParse(url)) return {};
  const { hostname, searchParams } = new URL(url);
  if (!searchParams.get("sslmode")?.startsWith("verify-")) return {};
  return { ssl: { host: hostname.replaceAll(/[[\]]/g, "") } };
}

/**
 * Opens the session, so that a wrong URL, password or database is named by its variable and not met in the middle of a run.
 * @throws Error with the variable, the server's words and what to do.
 */
export async function checkSession(variable: string, session: Sql): Promise<void> {
  const remedies: Record<string, string> = {
    "28P01": "Check the password in it; a special character must be percent-encoded.",
    "28000": "Check the role in it, sslmode, and pg_hba.conf on the server.",
    "08P01": "Is that a pooler, such as PgBouncer? Point it at Postgres itself.",
    "3D000": "Check the database's name in it.",
    ENOTFOUND: "Check the host's name in it.",
    ECONNREFUSED: "Is the server running, at this host and port? For the local stack: make up",
  };
  await session`select 1`.catch(({ code = "", message }: Error & { code?: string }) => {
    const { host, port, database, user } = session.options;
    const where = `${variable} (host ${host[0]}, port ${port[0]}, database ${database}, role ${user})`;
    const remedy =
      remedies[code] ?? "Is it reachable, with TLS as sslmode says, and its authority in NODE_EXTRA_CA_CERTS?";
    throw new Error(`cannot connect to ${where}: ${message || code}. ${remedy}`);
  });
}

/** An identifier as SQL writes it. */
export function quote(name: string): string {
  return `"${name.replaceAll('"', '""')}"`;
}

/** SQL: a timestamptz as text of a fixed width, with microseconds. */
export const utc = (sql: string): string => `to_char(${sql} at time zone 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"+00"')`;
