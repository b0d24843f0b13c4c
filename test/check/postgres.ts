/**
 * make check: all SQL against Postgres, on a throw-away cluster with the demo source's tables and no rows. What creates
 * things is executed, in the role that does it in production; what reads is prepared and then run as the role that does, which also
 * finds a missing grant. Then, as a run does it, each pipeline's SELECT is compared with its contract, and the SELECT made of it
 * that writes each column as its field reads it is run. Prints all faults as file:line: message; exit code 1 where there are any.
 */
import { globSync, readFileSync } from "node:fs";
import { join } from "node:path";
import postgres, { type Sql } from "postgres";
import { checkSource, readContract } from "../../shared/bigquery/contract.ts";
import { jsonLines } from "../../shared/bigquery/types.ts";
import { root, UsageError } from "../../shared/env.ts";
import { pipelines } from "../../shared/pipelines.ts";
import { createServers } from "../lib/servers.ts";
import { say } from "../stack/stack.ts";

const faults: string[] = [];

async function attempt(file: string, use: (text: string) => Promise<unknown>): Promise<void> {
  const text = readFileSync(join(root, file), "utf8");
  try {
    await use(text);
  } catch (error) {
    if (!(error instanceof postgres.PostgresError)) throw error;
    // Inside a DO block there is no position in the file.
    const line = text.slice(0, Number(error.position ?? 1) - 1).split("\n").length;
    faults.push(`${file}:${line}: ${[error.message, error.hint, error.where].filter(Boolean).join("; ")}`);
  }
}

async function checkContract(sql: Sql, pipeline: string): Promise<void> {
  const contract = readContract(pipeline);
  try {
    const columns = await checkSource({ pipeline, source: sql, log: () => {}, metrics: {} }, contract);
    await sql.unsafe(jsonLines(contract.fields, contract.source.select, columns));
  } catch (error) {
    if (!(error instanceof UsageError || error instanceof postgres.PostgresError)) throw error;
    const what = error instanceof UsageError ? "" : "the SELECT made of it and its SELECT: ";
    faults.push(`${contract.file}:1: ${what}${error.message}`);
  }
}

await using servers = await createServers(["postgres"]);
for (const signal of ["SIGINT", "SIGTERM"])
  process.once(signal, async () => {
    await servers[Symbol.asyncDispose]();
    process.exit(1);
  });

const as = (sql: Sql, role: string): Promise<unknown> => sql.unsafe(`set session authorization ${role}`);
/** What the statements read in place of a 0. */
const examples: Record<string, string> = {
  from: "2017-01-01",
  to: "2017-01-02",
  limits: "{}",
  run: '{"run_id": "a", "pipeline": "orders", "state": "running", "host": "b", "pid": 1, "by_hand": false, "rows": 0, "bytes": 0, "bytes_billed": 0, "hold_seconds": 0}',
  source_fields: "[]",
  canary: "{}",
  readings: "",
  ...Object.fromEntries(["facts", "source_select", "status", "wanted", "before", "partitions"].map((name) => [name, "[]"])),
};
const files = (pattern: string): string[] => globSync(pattern, { cwd: root }).sort();
const sql = postgres(servers.env.STACK_ADMIN_DATABASE_URL ?? "", { max: 1, onnotice: () => {} });
const setup = ["sql/source.sql", "sql/roles.sql", "sql/replication.sql"];
for (const file of ["test/data/schema.sql", ...setup]) await attempt(file, (text) => sql.unsafe(text));
await as(sql, "etl_metadata");
for (const file of files("sql/etl/*.sql")) await attempt(file, (text) => sql.unsafe(text));
for (const file of files("sql/*.sql").filter((path) => !setup.includes(path)))
  await attempt(file, async (text) => {
    await as(sql, /\b(from|into|join|update) etl\./.test(text) ? "etl_metadata" : "etl_reader");
    await sql.unsafe(text).describe(); // refuses a second statement
    for (const [, setting = ""] of text.matchAll(/current_setting\('etl\.(\w+)'/g))
      await sql`select set_config(${`etl.${setting}`}, ${examples[setting] ?? "0"}, false)`;
    await sql.unsafe(text);
  });
await as(sql, "etl_reader");
// Where a SELECT itself is at fault, that has been said.
if (!faults.length) for (const pipeline of pipelines()) await checkContract(sql, pipeline);
await sql.end({ timeout: 1 });
for (const fault of faults) say(fault);
process.exitCode = faults.length ? 1 : 0;
