/**
 * ClickHouse's HTTP interface over the engine of the npm package chdb, as far as @clickhouse/client needs it.
 *   node clickhouse-server.ts HOST PORT FOLDER     with CLICKHOUSE_USER and CLICKHOUSE_PASSWORD
 * Source of what it answers: ClickHouse's documentation of the HTTP interface, and its src/Server/HTTP.
 */
import { randomUUID } from "node:crypto";
import { createWriteStream, mkdirSync, rmSync } from "node:fs";
import { createServer, type IncomingMessage, type ServerResponse } from "node:http";
import { join, resolve } from "node:path";
import { PassThrough } from "node:stream";
import { buffer } from "node:stream/consumers";
import { pipeline } from "node:stream/promises";
import { promisify } from "node:util";
import { createBrotliDecompress, createGunzip, createInflate, createZstdDecompress, gzip } from "node:zlib";
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

/** The server's exceptionCodeToHTTPStatus, by the names of the codes. */
const statuses: [RegExp, number][] = [
  [/^(UNKNOWN_USER|WRONG_PASSWORD|AUTHENTICATION_FAILED|ACCESS_DENIED)$/, 403],
  [/^CANNOT_PARSE_|^(BAD_ARGUMENTS|SYNTAX_ERROR|INCORRECT_DATA|TYPE_MISMATCH|DUPLICATE_COLUMN|ILLEGAL_COLUMN)$/, 400],
  [/^(THERE_IS_NO_COLUMN|CANNOT_COMPILE_REGEXP|VALUE_IS_OUT_OF_RANGE_OF_DATA_TYPE|TOO_(DEEP|BIG)_AST)$/, 400],
  [/^UNKNOWN_(TABLE|FUNCTION|IDENTIFIER|TYPE|STORAGE|DATABASE|SETTING|AGGREGATE_FUNCTION|FORMAT|DATABASE_ENGINE)$/, 404],
  [/^NOT_IMPLEMENTED$/, 501],
  [/^TIMEOUT_EXCEEDED$/, 408],
];

function answerError(response: ServerResponse, error: Error): void {
  // An error in a file's data comes wrapped into another of the same code.
  const nested = /^Code: \d+\. DB::Exception: (Code: \d+\. DB::Exception: .*) \(version [^)]*\)\. \([A-Z0-9_]+\)$/s;
  const text = error.message.match(nested)?.[1] ?? error.message;
  const [, code] = text.match(/^Code: (\d+)\. DB::Exception: /) ?? [];
  const [, type] = text.match(/\(([A-Z0-9_]+)\)$/) ?? [];
  const known = code && type;
  const body = known ? text : `Code: 1001. DB::Exception: ${error.name}: ${text} (STD_EXCEPTION)`;
  console.error(`${new Date().toISOString()} ${response.getHeader("x-clickhouse-query-id")} ${body.slice(0, 500)}`);
  response.writeHead(statuses.find(([names]) => known && names.test(type))?.[1] ?? 500, {
    "x-clickhouse-exception-code": known ? code : "1001",
    "content-type": "text/plain; charset=UTF-8",
  });
  response.end(`${body} (version ${version} (chdb))\n`);
}

function authenticate(request: IncomingMessage, params: URLSearchParams): void {
  const [, basic] = request.headers.authorization?.match(/^Basic (.+)$/i) ?? [];
  const [name, ...rest] = Buffer.from(basic ?? "", "base64")
    .toString()
    .split(":");
  const given = basic
    ? { name, key: rest.join(":") }
    : {
        name: request.headers["x-clickhouse-user"] ?? params.get("user") ?? "default",
        key: request.headers["x-clickhouse-key"] ?? params.get("password") ?? "",
      };
  if (given.name === user && given.key === password) return;
  const reason = "Authentication failed: password is incorrect, or there is no user with such name";
  throw exception(516, `${given.name}: ${reason}.`, "AUTHENTICATION_FAILED");
}

/** The body and what decodes it, as the beginning of a pipeline. */
function bodyOf(request: IncomingMessage): [IncomingMessage, ...NodeJS.ReadWriteStream[]] {
  const encoding = request.headers["content-encoding"] ?? "identity";
  const decoders = {
    gzip: createGunzip,
    deflate: createInflate,
    br: createBrotliDecompress,
    zstd: createZstdDecompress,
  };
  if (encoding === "identity") return [request];
  const decoder = decoders[encoding as keyof typeof decoders];
  if (!decoder) throw exception(89, `Unknown compression method: ${encoding}.`, "UNKNOWN_COMPRESSION_METHOD");
  return [request, decoder()];
}

/** Single quotes for SQL. */
const quoted = (text: string): string => `'${text.replaceAll("\\", "\\\\").replaceAll("'", "\\'")}'`;

/** Parameters of the interface itself; every other one is a setting or, as param_NAME, a value for {NAME:Type}. */
const own = new Set(["query", "query_id", "database", "default_format", "user", "password", "quota_key", "role"]);
for (const name of ["session_id", "session_timeout", "session_check", "close_session"]) own.add(name);
// Settings of the server's answers: they are always whole before they begin, and never carry progress.
for (const name of ["wait_end_of_query", "buffer_size", "compress", "decompress", "stacktrace"]) own.add(name);

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

const sessions = new Map<string, { session: Session; busy: boolean; timer?: NodeJS.Timeout }>();

/** Runs `work` in a session of its own, or in that of session_id, which keeps its temporary tables for session_timeout seconds. */
async function inSession<T>(params: URLSearchParams, work: (session: Session) => Promise<T>): Promise<T> {
  const id = params.get("session_id");
  if (!id) {
    const session = new Session(dataDir);
    return await work(session).finally(() => session.close());
  }
  const kept = sessions.get(id) ?? { session: new Session(dataDir), busy: false };
  if (kept.busy) throw exception(373, `Session ${id} is locked by a concurrent client.`, "SESSION_IS_LOCKED");
  sessions.set(id, kept);
  clearTimeout(kept.timer);
  kept.busy = true;
  try {
    return await work(kept.session);
  } finally {
    kept.busy = false;
    const end = () => sessions.delete(id) && kept.session.close();
    kept.timer = setTimeout(end, Number(params.get("session_timeout") ?? 60) * 1000).unref();
  }
}

/** INSERT … [SETTINGS …] FORMAT X with nothing behind it: the data is the body. In chDB the file comes before SETTINGS. */
const insert = /^(\s*INSERT\s+INTO\s.*?)(\s+SETTINGS\s+.*?)?\s+(?:FORMAT\s+(\w+)|(VALUES))[\s;]*$/is;

/** Inserts the body: whole, or nothing of it where the client went away in the middle. */
async function insertBody(request: IncomingMessage, params: URLSearchParams, parts: RegExpMatchArray) {
  const [, into, settings = "", format = "Values"] = parts;
  const file = join(spoolDir, randomUUID());
  try {
    await pipeline([...bodyOf(request), createWriteStream(file)]);
    const sql = `${into} FROM INFILE ${quoted(file)}${settings} FORMAT ${format}`;
    return await inSession(params, (session) => session.queryAsync(`${preamble(params)} ${sql}`));
  } finally {
    rmSync(file, { force: true });
  }
}

async function query(request: IncomingMessage, params: URLSearchParams, format: string): Promise<ChdbResult> {
  const whole = new PassThrough();
  const [body] = await Promise.all([buffer(whole), pipeline([...bodyOf(request), whole])]);
  const sql = [params.get("query") ?? "", body.toString()].filter(Boolean).join("\n");
  if (!sql.trim()) throw exception(62, "Syntax error: failed at position 1: Empty query.", "SYNTAX_ERROR");
  return await inSession(params, async (session) => {
    await refuseSeveral(session, sql);
    return await session.queryAsync(`${preamble(params)} ${sql}`, { format });
  });
}

async function handle(request: IncomingMessage, response: ServerResponse): Promise<void> {
  const { pathname, searchParams: params } = new URL(request.url ?? "", "http://localhost");
  if (pathname === "/ping" || (pathname === "/" && request.method === "GET" && !params.has("query"))) return void response.end("Ok.\n");
  response.setHeader("x-clickhouse-query-id", params.get("query_id") || randomUUID());
  response.setHeader("x-clickhouse-server-display-name", "chdb");
  response.setHeader("x-clickhouse-timezone", "UTC");
  if (pathname !== "/") return void response.writeHead(404).end(`There is no handle ${pathname}\n`);
  if (request.headers["content-type"]?.startsWith("multipart/form-data"))
    throw exception(48, "Multipart bodies are not supported by the local server.", "NOT_IMPLEMENTED");
  authenticate(request, params);
  const format = params.get("default_format") ?? "TabSeparated";
  const parts = params.get("query")?.match(insert);
  const result = parts ? await insertBody(request, params, parts) : await query(request, params, format);
  // Of an insert the engine tells what it read of the body; what views wrote besides is not known.
  const rows = { [parts ? "written_rows" : "read_rows"]: result.rowsRead };
  const summary = { read_rows: 0, read_bytes: result.bytesRead, written_rows: 0, written_bytes: 0, ...rows };
  const times = { result_rows: parts ? 0 : result.rowsRead, elapsed_ns: Math.round(result.elapsed * 1e9) };
  const texts = Object.entries({ ...summary, ...times }).map(([name, value]) => [name, String(value)]);
  response.setHeader("x-clickhouse-summary", JSON.stringify(Object.fromEntries(texts)));
  response.setHeader("x-clickhouse-format", format);
  const wanted = params.get("enable_http_compression") === "1" && request.headers["accept-encoding"]?.includes("gzip");
  if (wanted) response.setHeader("content-encoding", "gzip");
  response.end(wanted ? await promisify(gzip)(result.bytes()) : result.bytes());
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
