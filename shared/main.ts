/** The frame of every script: --help, signals, exit codes (0 done, 1 failed, 2 wrong arguments, environment or schema). */
import { readFileSync } from "node:fs";
import { UsageError } from "./env.ts";
import { json, log, logError } from "./log.ts";

/** Runs a script: --help prints its header comment; an error is printed in one place and becomes the exit code. */
export async function main(meta: ImportMeta, body: () => Promise<void>): Promise<void> {
  // Also what is thrown here: scripts await it at their top level.
  process.on("uncaughtException", (error: NodeJS.ErrnoException, origin) => {
    // Emitted where nobody listens: `make status | head`; a COPY that fails with its first rows, whose reader is told.
    const isHarmless = error.code === "EPIPE" || error.name === "PostgresError";
    if (origin === "unhandledRejection" || !isHarmless) fail(error);
  });
  process.removeAllListeners("warning").on("warning", ({ message }) => log({ step: "warning", warning: message }));
  const [argument] = process.argv.slice(2);
  if (argument === "--help" || argument === "-h") {
    const header = /^\/\*\*\n([\s\S]*?)\n \*\/$/m.exec(readFileSync(meta.filename, "utf8"))?.[1] ?? "";
    process.stdout.write(`${header.replaceAll(/^ \* ?/gm, "")}\n`);
    return;
  }
  if (argument !== undefined) {
    const name = argument.replace(/=.*/s, "=…"); // its value may be a secret
    throw new UsageError(`unknown argument ${name}: arguments are given as variables, FROM=… TO=…; --help explains.`);
  }
  await body();
}

function fail(error: unknown): never {
  const bug = error instanceof TypeError || error instanceof ReferenceError || !(error instanceof Error);
  logError(bug ? String((!json() && (error as Error)?.stack) || error) : explain(error));
  process.exit(error instanceof UsageError || lacksMetadata(error as Error) ? 2 : 1);
}

type DatabaseError = Error & { code?: string; query?: string };

/** undefined_table, _schema_name, _column or _function in schema etl: a file of sql/etl was not applied. */
const lacksMetadata = ({ code = "", message, query = "" }: DatabaseError): boolean =>
  /^(42P01|3F000|42703|42883)$/.test(code) &&
  /\betl\.(watermarks|runs|chunks|models|verifications|topic|migrations|events_|duration)/.test(message + query);

/** An error's text for people, with the next command where its code says one. */
export function explain(error: DatabaseError): string {
  const { name, code = "", query = "", message } = error;
  const said = message || code || name;
  if (lacksMetadata(error)) return `${said}: the metadata tables are older than this version. Run: make migrate`;
  if (/(unrecognized configuration|unsupported startup) parameter/.test(said))
    return `${said}. Is its URL that of a pooler, such as PgBouncer? Point it at Postgres itself`;
  // Few words of their own: the statement tells which of the databases it was.
  if (!/^(55P03|57014|ECONNRESET|EPIPE|ETIMEDOUT)$/.test(code) || !query) return said;
  const statement = query.trim().replaceAll(/\s+/g, " ").slice(0, 80);
  return `${said} in: ${statement} …. Did the server restart, or another session lock a table? Once that is over, run this again`;
}

/** Calls `stop` at SIGINT or SIGTERM: at both, where `timeout` or `make` forward one. */
export function onSignal(stop: (signal: string) => void): void {
  for (const signal of ["SIGINT", "SIGTERM"]) process.on(signal, stop);
}
