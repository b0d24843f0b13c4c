/**
 * Postgres: COPY as a stream of JSON lines.
 */
import { connect as connectSocket, type Socket } from "node:net";
import { handled } from "./main.ts";
import { connect, type SessionOptions } from "./session.ts";

/** The source failed, not the destination: the run ends, and the next one resumes at the watermark. */
export class SourceError extends Error {
  override name = "SourceError";
}

export interface RowStream extends AsyncDisposable {
  /** JSON lines, in pieces of whole lines. */
  lines: AsyncIterable<Buffer>;
  /** What has passed so far. */
  sent: { rows: number; bytes: number };
}

const NEWLINE = 10;
const LARGE = 2 ** 20;

/**
 * Streams what a SELECT of one JSON column returns for [from, to), a value a line, in one statement (so from one snapshot).
 * JSON text holds no control characters, so that as CSV with two of them for quote and delimiter it passes as it is.
 * The lines throw a SourceError, and never just end, when the server dies, is cancelled or resets the connection.
 */
export function copyJsonLines(
  url: string,
  select: string,
  options: SessionOptions,
  { from, to }: { from: string; to: string },
): RowStream {
  // A socket of our own: where the reader fails in the middle of a COPY, nothing short of destroying it ends the backend, which would
  // hold its transaction open (postgres.js's end() and cancel() wait for the COPY to finish).
  let socket: Socket | undefined;
  const open = ({ host, port }: { host: string[]; port: number[] }): Socket => {
    socket = connectSocket({ host: host[0] ?? "localhost", port: port[0] ?? 5432 });
    return Object.assign(socket, { host: host[0] }); // the name that postgres.js checks a TLS certificate for
  };
  const settings = { ...options.settings, "etl.from": from, "etl.to": to };
  const session = connect(url, { ...options, settings }, { socket: open });
  const sent = { rows: 0, bytes: 0 };
  const copy = `/* ${options.application} */ copy (${select}) to stdout (format csv, quote e'\\x01', delimiter e'\\x02')`;
  async function* lines(): AsyncGenerator<Buffer> {
    try {
      const stream = await session.unsafe(copy).readable();
      handled(stream.errored); // it came with the first rows, before anybody could listen
      yield* wholeLines(stream, sent, () => socket);
    } catch (cause) {
      const { message, detail } = cause as Error & { detail?: string };
      const value = /etl refuses (.*)"$/s.exec(message)?.[1];
      const why = value ? `${value}, which its field cannot hold. Correct the row at the source.` : message;
      throw new SourceError(
        `reading the source failed after ${sent.rows} rows: ${[why, detail].filter(Boolean).join(": ")}`,
        { cause },
      );
    }
  }
  return {
    lines: lines(),
    sent,
    [Symbol.asyncDispose]: async () => {
      await session.end({ timeout: 0 });
      socket?.destroy(); // not before: over TLS the goodbye would fail where nobody listens
    },
  };
}

/** What the stream gives holds many lines, and may end inside one. */
async function* wholeLines(
  stream: AsyncIterable<Buffer>,
  sent: RowStream["sent"],
  socket: () => Socket | undefined,
): AsyncGenerator<Buffer> {
  let rest: Buffer[] = [];
  for await (const read of stream) {
    const end = read.lastIndexOf(NEWLINE) + 1;
    const whole = read.subarray(0, end);
    const piece = end ? (rest.length ? Buffer.concat([...rest, whole]) : whole) : undefined;
    if (piece) rest = [];
    if (end < read.length) rest.push(read.subarray(end));
    if (!piece) continue;
    for (let at = piece.indexOf(NEWLINE); at >= 0; at = piece.indexOf(NEWLINE, at + 1)) sent.rows += 1;
    sent.bytes += piece.length;
    // The stream reads ahead, which of large rows would be another one in memory.
    const large = piece.length > LARGE;
    if (large) socket()?.pause();
    yield piece;
    if (large) socket()?.resume();
  }
}

/** A cast that must fail is the only way for a plain SELECT of a read-only role to raise an error that names a row. */
export function raise(message: string, type: string): string {
  return `('etl refuses ' || ${message})::int::text::${type}`;
}
