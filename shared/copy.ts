/**
 * Postgres: COPY as a stream of JSON lines.
 */
import { connect as connectSocket, type Socket } from "node:net";
import type { Readable } from "node:stream";
import type { Sql } from "postgres";
import { connect, type SessionOptions } from "./session.ts";

/** The source failed, not the destination: the run ends, and the next one goes on from the watermark. */
export class SourceError extends Error {
  override name = "SourceError";
}

export interface RowStream {
  /** JSON lines, in pieces of about 64 KB. The memory of one is used again when the next is asked for: copy it to keep it. */
  lines: AsyncIterable<Buffer>;
  /** What has passed so far. */
  sent: { rows: number; bytes: number };
  /** Ends the session, in the middle of the COPY too. */
  [Symbol.asyncDispose](): Promise<void>;
}

/**
 * Streams what a SELECT of one JSON column returns for [from, to), a value a line, in one statement (so from one snapshot).
 * In binary format, which leaves the text as it is and costs Postgres a tenth less than a CSV.
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
  const copy = `/* ${options.application} */ copy (${select}) to stdout (format binary)`;
  async function* lines(): AsyncGenerator<Buffer> {
    try {
      const query = session.unsafe(copy) as ReturnType<Sql["unsafe"]> & { resolve(rows: unknown): void };
      // An error in one packet with the first rows is emitted before an await goes on: a listener must be there by then.
      const { resolve } = query;
      query.resolve = (rows) => resolve(gather(rows as Readable, sent));
      yield* await query.readable();
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

const PIECE_BYTES = 65_536;
/** Of COPY's binary format, before the first row; each row is then 6 bytes (one field, its length) and the field. */
const HEADER_BYTES = 19;
const ROW_BYTES = 6;

/**
 * The lines of a COPY of one column in binary format. postgres.js pushes one row at a time into its stream: as items of a stream
 * they would cost several times what copying them together does. A piece's memory is used again once the next is asked for, which
 * keeps memory flat however many rows pass: buffers made anew would pile up until V8 collects its whole heap.
 */
function gather(rows: Readable, sent: { rows: number; bytes: number }): AsyncIterable<Buffer> {
  const [full, free]: [Buffer[], Buffer[]] = [[], []];
  let piece: Buffer = Buffer.allocUnsafeSlow(PIECE_BYTES);
  let [size, header] = [0, HEADER_BYTES];
  let end: { error?: Error } | undefined;
  let wake = (): void => {};
  const give = (next: Buffer): void => {
    full.push(next);
    wake();
  };
  const flush = (): void => {
    if (!size) return;
    give(piece.subarray(0, size));
    piece = free.pop() ?? Buffer.allocUnsafeSlow(PIECE_BYTES);
    size = 0;
  };
  rows.on("error", (error) => {
    end = { error };
    wake();
  });
  rows.push = (message: Buffer | null): boolean => {
    if (message === null) {
      flush();
      end ??= {};
      wake();
      return false;
    }
    const start = header + ROW_BYTES;
    header = 0;
    const length = message.length - start;
    if (length < 0) return true; // the header alone, or the mark of the end
    if (size + length >= PIECE_BYTES) flush();
    const large = length >= PIECE_BYTES;
    const into = large ? Buffer.allocUnsafeSlow(length + 1) : piece;
    message.copy(into, size, start);
    into[size + length] = NEWLINE;
    if (large) give(into);
    else size += length + 1;
    sent.rows += 1;
    sent.bytes += length + 1;
    return full.length < 4;
  };
  async function* pieces(): AsyncGenerator<Buffer> {
    for (;;) {
      for (let next = full.shift(); next; next = full.shift()) {
        yield next;
        if (next.buffer.byteLength === PIECE_BYTES) free.push(Buffer.from(next.buffer));
      }
      if (end?.error) throw end.error;
      if (end) return;
      const { promise, resolve } = Promise.withResolvers<void>();
      wake = resolve;
      rows._read(0); // postgres.js lets the socket go on, which it pauses where push returns false
      await promise;
    }
  }
  return pieces();
}
const NEWLINE = 10;

/** A cast that must fail is the only way for a plain SELECT of a read-only role to raise an error that names a row. */
export function raise(message: string, type: string): string {
  return `('etl refuses ' || ${message})::int::text::${type}`;
}

function explainRefused({ message }: Error): string {
  const value = /etl refuses (.*)"$/s.exec(message)?.[1];
  return value === undefined ? message : `${value}, which its field cannot hold. Correct the row at the source.`;
}
