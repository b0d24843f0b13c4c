/**
 * The frame of every script: --help, signals, and errors that become exit codes.
 */
import { readFileSync } from "node:fs";
import { logFormat, UsageError } from "./env.ts";
import { type Fields, log, logError } from "./log.ts";

/**
 * Runs a script: --help prints its header comment, errors are printed in one place and become the exit code:
 * 0 done, 1 failed, 2 wrong arguments, environment or schema.
 */
export async function main(meta: ImportMeta, body: () => Promise<void>): Promise<void> {
  // Whoever reads the output may leave (make status | head); the run goes on.
  for (const stream of [process.stdout, process.stderr]) {
    stream.on("error", (error: NodeJS.ErrnoException) => {
      if (error.code !== "EPIPE") throw error;
    });
  }
  process.on("uncaughtException", fail); // also what is thrown here: scripts await it at their top level
  process.removeAllListeners("warning").on("warning", ({ message }) => log({ step: "warning", warning: message }));
  const [argument] = process.argv.slice(2);
  if (argument === "--help" || argument === "-h") {
    const header = /^\/\*\*\n([\s\S]*?)\n \*\/$/m.exec(readFileSync(meta.filename, "utf8"))?.[1] ?? "";
    process.stdout.write(`${header.replaceAll(/^ \* ?/gm, "")}\n`);
    return;
  }
  if (argument !== undefined)
    throw new UsageError(
      `unknown argument ${argument.replace(/=.*/s, "=…")}: arguments are given as variables, FROM=… TO=…; --help explains.`,
    );
  await body();
}

/** Pipeline and run of this process, once there is one: they join its last error to all else of the run. */
export const current: Fields = {};

function fail(error: unknown): never {
  const programming = error instanceof TypeError || error instanceof ReferenceError || !(error instanceof Error);
  const stack = logFormat() === "json" ? String(error) : (error as Error)?.stack;
  logError(programming ? (stack ?? String(error)) : explain(error), current);
  process.exit(error instanceof UsageError || withoutMetadata(error as Error) ? 2 : 1);
}

/** undefined_table or invalid_schema_name in schema etl, or a column that a newer file of sql/etl adds. */
const withoutMetadata = ({ code, message }: Error & { code?: string }): boolean =>
  ((code === "42P01" || code === "3F000") && /etl/.test(message)) ||
  (code === "42703" && /\b(by_hand|source_wal|source_server|source_database)\b/.test(message));

export function explain(error: Error & { code?: string; query?: string }): string {
  if (withoutMetadata(error)) return `${error.message}: the metadata tables are not there. Run: make migrate`;
  const message = error.message || String(error.code ?? error.name);
  // postgres.js says in which statement; which of the databases it was is seen there.
  if (!/^(read|write) [A-Z_]+/.test(message) || !error.query) return message;
  return `${message}: the connection to Postgres was lost in: ${error.query.trim().replaceAll(/\s+/g, " ").slice(0, 80)} …`;
}

/**
 * Calls `stop` at the first SIGINT or SIGTERM; a later one does not wait. Not one within a second: where timeout ends make, each of the
 * two sends SIGTERM, and the run shall still record its end.
 */
export function onSignal(stop: (signal: string) => void): void {
  let first: number | undefined;
  for (const signal of ["SIGINT", "SIGTERM"])
    process.on(signal, () => {
      if (first === undefined) {
        first = performance.now();
        stop(signal);
      } else if (performance.now() - first > 1000) process.exit(1);
    });
}
