/** Postgres: COPY as a stream of JSON lines. */
import { openSession, prepareSession, type SessionOptions } from "./session.ts";

/** The source failed, not the destination: the run ends, and the next one resumes at the watermark. */
export class SourceError extends Error {
  override name = "SourceError";
}

/** JSON lines, in pieces of whole lines, and what of them has passed so far. */
export type RowStream = AsyncDisposable & { lines: AsyncIterable<Buffer>; sent: { rows: number; bytes: number } };

const NEWLINE = 10;

/**
 * Streams what a SELECT of one JSON column returns, a value a line, in one statement (so from one snapshot) of a session of its own. JSON
 * text holds no control characters, so that as CSV with two of them for quote and delimiter it passes as it is. The lines throw a
 * SourceError, and never just end, when the server dies, is cancelled or resets the connection.
 */
export function copyJsonLines(url: string, select: string, options: SessionOptions): RowStream {
  const session = openSession(url, options);
  const sent = { rows: 0, bytes: 0 };
  const copy = `/* ${options.application} */ copy (${select}) to stdout (format csv, quote e'\\x01', delimiter e'\\x02')`;
  async function* lines(): AsyncGenerator<Buffer> {
    try {
      await prepareSession(session);
      const stream = await session.unsafe(copy).readable();
      let rest: Buffer[] = []; // what is read holds many lines, and may end inside one
      for await (const read of stream as AsyncIterable<Buffer>) {
        const end = read.lastIndexOf(NEWLINE) + 1;
        rest.push(read.subarray(0, end || read.length));
        if (!end) continue;
        const piece = rest.length > 1 ? Buffer.concat(rest) : read.subarray(0, end);
        rest = end < read.length ? [read.subarray(end)] : [];
        for (let at = piece.indexOf(NEWLINE); at >= 0; at = piece.indexOf(NEWLINE, at + 1)) sent.rows += 1;
        sent.bytes += piece.length;
        yield piece;
      }
    } catch (cause) {
      const { message, detail } = cause as Error & { detail?: string };
      throw new SourceError(`reading the source failed after ${sent.rows} rows: ${message}${detail ? `: ${detail}` : ""}`, { cause });
    }
  }
  return { lines: lines(), sent, [Symbol.asyncDispose]: session[Symbol.asyncDispose] };
}
