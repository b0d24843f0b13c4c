/**
 * make check: schemas/clickhouse, executed by the engine itself in a throw-away database, in the order of the files, and each statement twice,
 * as after a migrate that was killed. Prints all faults as file:line: message; exit code 1 where there are any.
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
session.query("CREATE DATABASE check");
session.query("USE check");
const migrations = readMigrations("schemas/clickhouse");
for (const { folder: within, file, sql } of migrations)
  for (const statement of statementsOf(sql).flatMap((one) => [one, one]))
    try {
      session.query(statement);
    } catch (error) {
      const { message } = error as Error;
      faults.push(`${within}/${file}:${/line (\d+)/.exec(message)?.[1] ?? 1}: ${message.split("\n")[0]}`);
    }
session.cleanup();
rmSync(folder, { recursive: true, force: true });
for (const fault of faults) say(fault);
say(`check: ClickHouse executed ${migrations.length} files: ${faults.length} faults`);
process.exit(faults.length ? 1 : 0);
