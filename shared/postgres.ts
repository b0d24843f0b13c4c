/**
 * Postgres: sessions with fixed settings, and COPY as a stream of JSON lines.
 *
 * Timestamps travel as text, with microseconds: postgres.js would turn a timestamptz into a JS Date, which holds
 * milliseconds. Select `::text`, pass `::text::timestamptz`.
 */
import { connect as connectSocket, type Socket } from "node:net";
import { type Readable, Transform } from "node:stream";
import { setFlagsFromString } from "node:v8";
import { runInNewContext } from "node:vm";
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
 * What every session sets, whatever the role, the database or the server default to: text output that does not depend
 * on them, no row silently filtered, and nothing that hangs for ever.
 */
function sessionSettings(options: SessionOptions): Record<string, string> {
  return {
    application_name: options.application,
    TimeZone: "UTC",
    DateStyle: "ISO",
    IntervalStyle: "iso_8601",
    extra_float_digits: "1",
    bytea_output: "hex",
    row_security: "off",
    statement_timeout: `${Math.ceil(options.timeoutSeconds * 1000)}`,
    lock_timeout: "30000",
    idle_in_transaction_session_timeout: "60000",
    tcp_keepalives_idle: "30",
    tcp_keepalives_interval: "10",
    tcp_keepalives_count: "3",
    client_connection_check_interval: "5000",
    ...options.settings,
  };
}

/**
 * One session, opened at its first statement; `await session.end()` closes it.
 * max_lifetime is off because a session that postgres.js quietly replaces would lose its advisory lock.
 */
export function connect(
  url: string,
  options: SessionOptions,
  extra: postgres.Options<Record<string, never>> = {},
): Sql {
  return postgres(url, {
    max: 1,
    idle_timeout: 0,
    max_lifetime: null,
    connect_timeout: 10,
    keep_alive: 30,
    fetch_types: false,
    onnotice: () => {},
    connection: sessionSettings(options),
    ...extra,
  });
}

/**
 * Opens the session, so that a wrong URL, password or database is named by its variable and not met in mid-run.
 * @throws Error with the variable, the server's words and what to do.
 */
export async function checkSession(variable: string, session: Sql): Promise<void> {
  const { host, port, database, user } = session.options;
  const where = `${variable} (host ${host[0]}, port ${port[0]}, database ${database}, role ${user})`;
  try {
    await session`select 1`;
  } catch (error) {
    const { code, message } = error as { code?: string; message: string };
    const remedy: Record<string, string> = {
      "28P01": "Check the password in it; a special character must be percent-encoded.",
      "28000": "Check the role in it, and pg_hba.conf on the server.",
      "3D000": "Check the database's name in it.",
      ECONNREFUSED: "Is the server running, at this host and port? For the local stack: make up",
      ENOTFOUND: "Check the host's name in it.",
      CONNECT_TIMEOUT: "Is the host reachable from here?",
    };
    throw new Error(`cannot connect to ${where}: ${message || code}. ${remedy[code ?? ""] ?? "Check it."}`);
  }
}

/** The source failed, not the destination: the run ends, and the next one goes on from the watermark. */
export class SourceError extends Error {
  override name = "SourceError";
}

export interface RowStream {
  /** JSON lines, in pieces of about 64 KB. */
  lines: AsyncIterable<Buffer>;
  /** What has passed so far. */
  sent: { rows: number; bytes: number };
  /** Ends the session, in the middle of the COPY too. */
  [Symbol.asyncDispose](): Promise<void>;
}

/**
 * Streams what a SELECT of one JSON column returns for [from, to), a value a line, in one statement (so from one snapshot).
 * JSON text never holds the bytes 1 and 2, so as quote and delimiter of a CSV they leave it as it is.
 * The lines throw a SourceError, and never just end, when the server dies, is cancelled or resets the connection.
 */
export async function copyJsonLines(
  url: string,
  select: string,
  options: SessionOptions,
  { from, to }: { from: string; to: string },
): Promise<RowStream> {
  // A socket of our own: where the reader fails mid-COPY, nothing short of destroying it ends the backend, which would
  // hold its transaction open (postgres.js's end() and cancel() wait for the COPY to finish).
  let socket: Socket | undefined;
  const open = ({ host, port }: { host: string[]; port: number[] }): Socket => {
    socket = connectSocket({ host: host[0] ?? "localhost", port: port[0] ?? 5432 });
    return Object.assign(socket, { host: host[0] }); // the name that postgres.js checks a TLS certificate for
  };
  const settings = { ...options.settings, "etl.from": from, "etl.to": to };
  const session = connect(url, { ...options, settings }, { socket: open } as object);
  const sent = { rows: 0, bytes: 0 };
  const copy = `/* ${options.application} */ copy (${select}) to stdout (format csv, quote E'\\x01', delimiter E'\\x02')`;
  async function* lines(): AsyncGenerator<Buffer> {
    try {
      const query = session.unsafe(copy) as ReturnType<Sql["unsafe"]> & { resolve(rows: Readable): void };
      // An error in one packet with the first rows is emitted before an await goes on: a listener must be there by then.
      const { resolve } = query;
      query.resolve = (rows) => resolve(rows.on("error", () => {}));
      const rows: Readable = await query.readable();
      if (rows.errored) throw rows.errored;
      // postgres.js hands over one CopyData message, which is one row, at a time.
      yield* rows.compose(gather(sent));
    } catch (error) {
      throw new SourceError(`reading the source failed after ${sent.rows} rows: ${explainRefused(error as Error)}`, {
        cause: error,
      });
    }
  }
  return {
    lines: lines(),
    sent,
    [Symbol.asyncDispose]: async () => {
      socket?.destroy();
      await session.end({ timeout: 0 });
    },
  };
}

// Memory stays flat however many rows pass: buffers that were in use at two scavenges are freed by a full collection only, which
// V8 begins after 64 MB of them; and its young generation would grow with the garbage. A full collection takes about 15 ms here.
setFlagsFromString("--expose-gc");
setFlagsFromString("--semi-space-growth-factor=1");
const collectGarbage = runInNewContext("gc") as () => void;
const COLLECT_BYTES = 32_000_000;

function gather(sent: { rows: number; bytes: number }): Transform {
  let pieces: Buffer[] = [];
  let size = 0;
  let collected = 0;
  return new Transform({
    transform(row: Buffer, _encoding, done) {
      pieces.push(row);
      size += row.length;
      sent.rows += 1;
      sent.bytes += row.length;
      if (size < 65_536) return done();
      if (sent.bytes - collected > COLLECT_BYTES) {
        collectGarbage();
        collected = sent.bytes;
      }
      const full = Buffer.concat(pieces, size);
      pieces = [];
      size = 0;
      done(null, full);
    },
    flush(done) {
      done(null, Buffer.concat(pieces, size));
    },
  });
}

/** A cast that must fail is the only way for a plain SELECT of a read-only role to raise an error that names a row. */
export function raise(message: string, type: string): string {
  return `('etl refuses ' || ${message})::int::text::${type}`;
}

function explainRefused({ message }: Error): string {
  const value = /etl refuses (.*)"$/s.exec(message)?.[1];
  return value === undefined ? message : `${value}, which its field cannot hold. Correct the row at the source.`;
}

/** An identifier as SQL writes it. */
export function quote(name: string): string {
  return `"${name.replaceAll('"', '""')}"`;
}
