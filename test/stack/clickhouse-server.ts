/**
 * ClickHouse's HTTP interface over the engine of the npm package chdb, as far as @clickhouse/client needs it.
 *   node clickhouse-server.ts HOST PORT FOLDER     with CLICKHOUSE_USER and CLICKHOUSE_PASSWORD
 * Source of what it answers: ClickHouse's documentation of the HTTP interface, and its src/Server/HTTP.
 */
import { randomUUID } from "node:crypto";
import { createWriteStream, mkdirSync, rmSync } from "node:fs";
import { createServer, type IncomingMessage, type ServerResponse } from "node:http";
import { join, resolve } from "node:path";
import { text } from "node:stream/consumers";
import { pipeline } from "node:stream/promises";
import { type ChdbResult, Session } from "chdb";

const [host = "", port = "", folder = ""] = process.argv.slice(2);
const dataDir = resolve(folder, "data");
const spoolDir = resolve(folder, "tmp");
const user = process.env.CLICKHOUSE_USER ?? "default";
const password = process.env.CLICKHOUSE_PASSWORD ?? "";

rmSync(spoolDir, { recursive: true, force: true }); // what a killed server had not read
mkdirSync(spoolDir, { recursive: true });
/** The engine lives as long as one session does. Others come and go beside it, and run in parallel. */
const engine = new Session(dataDir);
const version = engine.query("SELECT version()", "TSVRaw").trim();

/** An exception as ClickHouse puts it into words; engine errors come as such text already. */
const exception = (code: number, text: string, type: string): Error => new Error(`Code: ${code}. DB::Exception: ${text} (${type})`);

function answerError(response: ServerResponse, error: Error): void {
  // An error in a file's data comes wrapped into another of the same code.
  const nested = /^Code: \d+\. DB::Exception: (Code: \d+\. DB::Exception: .*) \(version [^)]*\)\. \([A-Z0-9_]+\)$/s;
  const message = error.message.match(nested)?.[1] ?? error.message;
  const [, code] = message.match(/^Code: (\d+)\. DB::Exception: .*\([A-Z0-9_]+\)$/s) ?? [];
  const body = code ? message : `Code: 1001. DB::Exception: ${error.name}: ${message} (STD_EXCEPTION)`;
  console.error(`${new Date().toISOString()} ${response.getHeader("x-clickhouse-query-id")} ${body.slice(0, 500)}`);
  response.writeHead(500, { "x-clickhouse-exception-code": code ?? "1001", "content-type": "text/plain; charset=UTF-8" });
  response.end(`${body} (version ${version} (chdb))\n`);
}

function authenticate({ headers }: IncomingMessage): void {
  const [, basic = ""] = headers.authorization?.match(/^Basic (.+)$/i) ?? [];
  const given = Buffer.from(basic, "base64").toString();
  if (given === `${user}:${password}`) return;
  const reason = "Authentication failed: password is incorrect, or there is no user with such name";
  throw exception(516, `${given.split(":")[0] || "default"}: ${reason}.`, "AUTHENTICATION_FAILED");
}

/** Single quotes for SQL. */
const quoted = (text: string): string => `'${text.replaceAll("\\", "\\\\").replaceAll("'", "\\'")}'`;

/**
 * Parameters of the interface itself; every other one is a setting or, as param_NAME, a value for {NAME:Type}. Answers are always whole
 * before they begin, and never compressed.
 */
const own = new Set(["query", "query_id", "database", "default_format", "role", "wait_end_of_query", "enable_http_compression"]);

/** What gives a session the request's database, settings and parameters. */
function preamble(params: URLSearchParams): string {
  const sets = [...params].flatMap(([name, value]) => {
    if (own.has(name)) return [];
    if (!/^\w+$/.test(name)) throw exception(115, `Unknown setting '${name}'.`, "UNKNOWN_SETTING");
    return [`SET ${name} = ${quoted(value)};`];
  });
  const database = params.get("database");
  if (database) sets.unshift(`USE \`${database.replaceAll("\\", "\\\\").replaceAll("`", "\\`")}\`;`);
  return sets.join(" ");
}

/** The engine runs several statements of one text; the server refuses them, and so would production. */
async function refuseSeveral(session: Session, sql: string): Promise<void> {
  if (!/;\s*\S/.test(sql) || /^\s*INSERT\b/i.test(sql)) return;
  await session.queryAsync(`SELECT formatQuerySingleLine(${quoted(sql)})`);
}

/** Runs `work` in a session of its own. */
async function inSession<T>(work: (session: Session) => Promise<T>): Promise<T> {
  const session = new Session(dataDir);
  return await work(session).finally(() => session.close());
}

/** INSERT … [SETTINGS …] FORMAT X with nothing behind it: the data is the body. In chDB the file comes before SETTINGS. */
const insert = /^(\s*INSERT\s+INTO\s.*?)(\s+SETTINGS\s+.*?)?\s+(?:FORMAT\s+(\w+)|(VALUES))[\s;]*$/is;

/** Inserts the body: whole, or nothing of it where the client went away in the middle. */
async function insertBody(request: IncomingMessage, params: URLSearchParams, parts: RegExpMatchArray) {
  const [, into, settings = "", format = "Values"] = parts;
  const file = join(spoolDir, randomUUID());
  try {
    await pipeline(request, createWriteStream(file));
    const sql = `${into} FROM INFILE ${quoted(file)}${settings} FORMAT ${format}`;
    return await inSession((session) => session.queryAsync(`${preamble(params)} ${sql}`));
  } finally {
    rmSync(file, { force: true });
  }
}

async function query(request: IncomingMessage, params: URLSearchParams): Promise<ChdbResult> {
  const sql = [params.get("query") ?? "", await text(request)].filter(Boolean).join("\n");
  if (!sql.trim()) throw exception(62, "Syntax error: failed at position 1: Empty query.", "SYNTAX_ERROR");
  return await inSession(async (session) => {
    await refuseSeveral(session, sql);
    return await session.queryAsync(`${preamble(params)} ${sql}`, { format: params.get("default_format") ?? "TabSeparated" });
  });
}

async function handle(request: IncomingMessage, response: ServerResponse): Promise<void> {
  const { pathname, searchParams: params } = new URL(request.url ?? "", "http://localhost");
  if (pathname === "/ping") return void response.end("Ok.\n");
  response.setHeader("x-clickhouse-query-id", params.get("query_id") || randomUUID());
  if (pathname !== "/") return void response.writeHead(404).end(`There is no handle ${pathname}\n`);
  authenticate(request);
  const parts = params.get("query")?.match(insert);
  const result = parts ? await insertBody(request, params, parts) : await query(request, params);
  response.end(result.bytes());
}

const server = createServer({ maxHeaderSize: 1 << 20, requestTimeout: 0, keepAliveTimeout: 10_000 });
server.on("request", (request: IncomingMessage, response: ServerResponse) => {
  handle(request, response).catch((error: Error) => {
    request.resume(); // the rest of the body, so that the answer can be read
    if (!response.destroyed) answerError(response, error);
  });
});
server.listen(Number(port), host);
// Acknowledged inserts are in files already: nothing is lost by ending at once.
for (const signal of ["SIGTERM", "SIGINT"]) process.on(signal, () => process.exit(0));
