#!/usr/bin/env -S npx tsx
/**
 * new-pipeline: writes what a pipeline from a table of the source to BigQuery is, and prints what is left for a person.
 *
 *   make new-pipeline TABLE=crm.stores EVERY=1d      EVERY=1h, 1d or 1w
 *     NAME=stores          by default the table's: the pipeline, its target in Makefile, and the table in BigQuery
 *     CURSOR=updated_at    the column that says when a row last changed
 *     KEY=id               columns of a unique, non-null index, by default of the primary key
 *     DRY_RUN=1            prints the differences, and writes nothing
 *
 *   writes     the contract, with types, modes and the columns' comments; the SELECT; the script; the target; the interval of the alerts,
 *              and successes in their tests; a line of the crontab, at a free minute; the grant in sql/roles.sql; the table in
 *              test/data/schema.sql, for make check and the local stack
 *   refuses    a table without a key or a cursor. A column whose type has no mapping is left out, with a comment in the SELECT
 *   safe to re-run   yes: a file or line that exists is never written over
 *
 * Touches: reads the source's catalogue; writes files of the project.
 */
import { existsSync, readFileSync } from "node:fs";
import { join } from "node:path";
import type { Field } from "../../shared/bigquery/types.ts";
import { flag, like, oneOf, optional, readEnv, required, root, text, UsageError } from "../../shared/env.ts";
import { main } from "../../shared/main.ts";
import { pipelineVariables } from "../../shared/run.ts";
import { ident, openSession } from "../../shared/session.ts";
import { readSelect } from "../../shared/source.ts";
import { after, applyEdits, type Edit } from "./lib/edits.ts";
import { fieldOf, formatContract, readTable, type SourceTable } from "./lib/source-table.ts";

/** How the schedule is written: in words, in seconds, in the crontab (M is its minute), and as a limit of the run. */
const schedules = {
  "1h": { words: "hourly", seconds: 3600, cron: "M *  * * *", limit: "45m" },
  "1d": { words: "daily", seconds: 86_400, cron: "M 3  * * *", limit: "2h" },
  "1w": { words: "weekly", seconds: 604_800, cron: "M 4  * * 1", limit: "4h" },
};

const plain = like(/^[A-Za-z_]\w*$/, "may hold letters, digits and _ only");
const variables = {
  SOURCE_DATABASE_URL: pipelineVariables.SOURCE_DATABASE_URL,
  TABLE: required(text),
  EVERY: required(oneOf(Object.keys(schedules))),
  NAME: optional(like(/^[a-z][a-z0-9_]*$/, "must begin with a letter, and may hold small letters, digits and _ only")),
  CURSOR: optional(plain, "updated_at"),
  KEY: optional(like(/^[A-Za-z_]\w*(,[A-Za-z_]\w*)*$/, "must be columns with commas between them")),
  DRY_RUN: optional(flag, false),
};

interface Plan {
  name: string;
  table: SourceTable;
  cursor: string;
  key: string[];
  schedule: (typeof schedules)["1h"];
}

await main(import.meta, async () => {
  const env = readEnv(variables);
  // 1. Read the table.
  const path = env.TABLE.includes(".") ? env.TABLE : `public.${env.TABLE}`;
  const table = await readTable(env.SOURCE_DATABASE_URL, path, env.CURSOR, env.KEY);
  const name = env.NAME ?? table.path.replaceAll(/^.*\.|"/g, "").toLowerCase();
  const schedule = schedules[env.EVERY as keyof typeof schedules];
  const plan = { name, table, cursor: env.CURSOR, key: table.key ?? [], schedule };

  // 2. Refuse what could not be synced, and a name that is taken.
  checkPlan(plan);

  // 3. Write what is missing.
  applyEdits([...newFiles(plan), ...edits(plan)], env.DRY_RUN);

  // 4. Print what is left: the SQL, then the commands.
  const sql = [...table.grants, ...(await readRemedies(env.SOURCE_DATABASE_URL, plan))];
  if (sql.length) process.stdout.write(`Run in the source database, as a superuser:\n${sql.join("\n")}\n`);
  process.stdout.write(`Then: make migrate ${name} status\nIn production: crontab ops/crontab; reload ops/alerts.yml in Prometheus\n`);
});

/** @throws UsageError with everything that stands against the pipeline. */
function checkPlan({ name, table: { path, columns, faults }, key }: Plan): void {
  for (const column of columns.filter((one) => key.includes(one.name))) {
    const field = fieldOf(column);
    if (typeof field === "string") faults.push(`column ${column.name} of the key: ${field}. Choose another KEY=`);
  }
  const contract = join(root, `schemas/bigquery/${name}.json`);
  if (existsSync(contract)) {
    const read = JSON.parse(readFileSync(contract, "utf8")).source?.table;
    if (read !== path) faults.push(`schemas/bigquery/${name}.json is that of ${read}. Choose another NAME=`);
  } else if (readFileSync(join(root, "Makefile"), "utf8").includes(`\n${name}: setup`))
    faults.push(`make ${name} is another command. Choose another NAME=`);
  if (faults.length) throw new UsageError(`${path} cannot be synced yet:\n  ${faults.join("\n  ")}`);
}

/** The contract, what is read, and the script: that of orders, step for step. */
function newFiles({ name, table, cursor, key, schedule }: Plan): Edit[] {
  const { path, columns, comment } = table;
  const fields = columns.map(fieldOf).filter((field): field is Field => typeof field !== "string");
  const contract = formatContract({
    source: { table: path, cursor },
    description: comment ?? `Rows of ${path}, as they were when they last changed.`,
    schema: { fields },
    tableConstraints: { primaryKey: { columns: key } },
    clustering: { fields: key.slice(0, 4) },
  });
  const leftOut = columns.flatMap((column) => {
    const why = fieldOf(column);
    if (typeof why !== "string") return [];
    const cast = `${column.ident}::text as ${column.name.replaceAll(/\W/g, "_")}`;
    return `  -- Left out: ${column.ident}, since ${why}. To sync it: ${cast}, and a STRING in the contract.`;
  });
  const listed = columns.filter((column) => typeof fieldOf(column) !== "string").map(({ ident }) => `  ${ident}`);
  const select = [
    `-- What \`make ${name}\` reads: the window [etl.from, etl.to) of ${cursor}. Its columns are the fields of`,
    `-- schemas/bigquery/${name}.json. In psql:`,
    `--   set etl."from" = '2017-01-01'; set etl."to" = '2017-01-02'; \\i sql/${name}.sql`,
    "select",
    ...leftOut,
    listed.join(",\n"),
    `from ${path}`,
    `where ${ident(cursor)} >= current_setting('etl.from')::timestamptz`,
    `  and ${ident(cursor)} < current_setting('etl.to')::timestamptz;`,
    "",
  ];
  const script = readFileSync(join(root, "scripts/orders.ts"), "utf8")
    .replaceAll(/\b(public\.)?orders\b/g, (_, schema) => (schema ? path : name))
    .replace(/^( \* {3}key +).*$/m, `$1${key.join(", ")}`)
    .replace(/^( \* {3}watermark +).*$/m, `$1${cursor}, set by the database`)
    .replace(/^( \* {3}schedule +).*$/m, `$1${schedule.words}, cron`);
  const written = (file: string, text: string): Edit => ({ file, has: "", change: () => text });
  return [
    written(`schemas/bigquery/${name}.json`, contract),
    written(`sql/${name}.sql`, select.join("\n")),
    written(`scripts/${name}.ts`, script),
  ];
}

/** What is added to files that exist: what users have there, with another name. */
function edits({ name, table, cursor, key, schedule }: Plan): Edit[] {
  const { path, columns } = table;
  const renamed = (text: string): string => text.replaceAll(/\busers\b/g, name);
  // An enum or a domain need not exist on the local stack.
  const declared = columns.map(({ ident, type, declared, notnull }) => {
    return `  ${ident} ${type === "enum" ? "text" : declared}${notnull ? " not null" : ""},`;
  });
  const created = [
    `create schema if not exists ${path.replace(/\..*$/, "")};`,
    `create table if not exists ${path} (\n${declared.join("\n")}\n  primary key (${key.map(ident).join(", ")})\n);`,
    `create index if not exists ${name}_${cursor} on ${path} (${ident(cursor)});`,
  ];
  // A pipeline that never ran is an alert: where users succeed in the tests of the alerts, this one does at every minute.
  const succeeds = (series: string): string =>
    /verify/.test(series) ? renamed(series) : renamed(series).replace(/values: "[^"]*"/, 'values: "0+60x1000"');
  const succeeded = /^ +- (\{ )?series: '\w+\{.*pipeline="users".*\n( +values: .*\n)?/gm;
  const seconds = (rule: string): string => renamed(rule).replace(/\d+(?=\)$)/m, String(schedule.seconds));
  return [
    after("Makefile", `\n${name}: setup`, /^\.PHONY: users\n(.+\n)+\n/m, renamed),
    after("ops/alerts.yml", `{ pipeline: ${name} }`, /^ +- record: \w+\n +labels: \{ pipeline: users \}\n.*\n/m, seconds),
    after("ops/crontab", ` make ${name} `, /^.* make users .*\n/m, (line) => renamed(scheduled(line, schedule))),
    after("test/ops/alerts.test.yml", `pipeline="${name}"`, succeeded, succeeds),
    after("test/ops/alerts.weekly.test.yml", `pipeline="${name}"`, succeeded, succeeds),
    after("sql/roles.sql", `'${path}'`, /in array array\[[^\]]*/, () => `, '${path}'`),
    after("test/data/schema.sql", `table if not exists ${path} (`, /$/, () => `\n${created.join("\n")}\n`),
  ];
}

/** A line of the crontab by this schedule, at the first minute that no other has. */
function scheduled(line: string, { cron, limit }: Plan["schedule"]): string {
  const crontab = readFileSync(join(root, "ops/crontab"), "utf8");
  const taken = Array.from(crontab.matchAll(/^(\d+) /gm), ([, minute]) => Number(minute));
  const free = Array.from({ length: 60 }, (_, minute) => minute).find((minute) => !taken.includes(minute));
  return line.replace(/^(\S+ +){4}\S+/, cron.replace("M", String(free ?? 0))).replace(/-k 60 \w+/, `-k 60 ${limit}`);
}

/** The SQL of make doctor for what the table lacks besides grants: an index, a trigger. */
async function readRemedies(url: string, { name, table, cursor }: Plan): Promise<string[]> {
  const settings = { "etl.part": "source", "etl.tables": [name, table.path, cursor].join(":") };
  await using source = openSession(url, { application: "etl:new", timeoutSeconds: 30, settings });
  const checks = await source.unsafe<{ check: string; ok: boolean; remedy: string }[]>(readSelect("doctor"));
  const failed = checks.filter(({ check, ok }) => check.startsWith(`${name}: `) && !ok);
  return failed.map(({ remedy }) => remedy.replace(/^.*? Run[^:]*: /, ""));
}
