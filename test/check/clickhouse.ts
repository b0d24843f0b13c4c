/**
 * make check: schemas/clickhouse, executed by the engine itself in a throw-away database, in the order of the files, and each statement twice,
 * as after a migrate that was killed; then a message of each kind goes through the views. Prints all faults as file:line: message; exit
 * code 1 where there are any.
 */
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { Session } from "chdb";
import { statementsOf } from "../../scripts/ops/lib/migrations.ts";
import { readMigrations } from "../../shared/migrations.ts";
import { say } from "../stack/stack.ts";

const folder = mkdtempSync(join(tmpdir(), "etl-check-clickhouse-"));
const session = new Session(join(folder, "data"));
const faults: string[] = [];
const attempt = (file: string, query: string): string => {
  try {
    return session.query(query, "TSV").trim();
  } catch (error) {
    const { message } = error as Error;
    faults.push(`${file}:${/line (\d+)/.exec(message)?.[1] ?? 1}: ${message.split("\n")[0]}`);
    return "";
  }
};

session.query("CREATE DATABASE check");
session.query("USE check");
const migrations = readMigrations("schemas/clickhouse");
for (const { folder: within, file, sql } of migrations)
  for (const statement of statementsOf(sql)) for (const _ of ["once", "twice"]) attempt(`${within}/${file}`, statement);
const row = (id: number): string =>
  `{"id":${id},"sensor_id":"JFK","metric":"temp","value":1.5,"recorded_at":"2013-01-01T06:00:00.000000Z"}`;
const messages = [`{"op":"c","before":null,"after":${row(0)}}`, `{"op":"d","before":${row(1)},"after":null}`, "no JSON"];
for (const [at, value] of messages.entries())
  attempt("schemas/clickhouse", `INSERT INTO sensor_landing SELECT 't', 1, 0, ${at}, 0, '{"id":${at}}', '${value}'`);
const counts = attempt("schemas/clickhouse", "SELECT (SELECT count() FROM sensor_readings), (SELECT count() FROM sensor_dead_letters)");
if (counts !== "2\t1") faults.push(`schemas/clickhouse:1: two changes and one dead letter became ${counts}`);
session.cleanup();
rmSync(folder, { recursive: true, force: true });
for (const fault of faults) say(fault);
say(`check: ClickHouse executed ${migrations.length} files: ${faults.length} faults`);
process.exit(faults.length ? 1 : 0);
