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
 *   writes           schemas/README.md, "Adding a pipeline", lists it. A column whose type has no mapping is left out, with a comment
 *   refuses          a table without a key or a cursor
 *   safe to re-run   yes: a file or line that exists is never written over
 *
 * Touches: reads the source's catalogue; writes files of the project.
 */
import { existsSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { flag, like, oneOf, optional, readEnv, required, root, text, UsageError } from "../../shared/env.ts";
import { main } from "../../shared/main.ts";
import { pipelineVariables } from "../../shared/run.ts";
import { ident, openSession } from "../../shared/session.ts";
import { askCatalogue, declare, formatContract, readTable, type SourceTable, unfitness } from "./lib/catalogue.ts";
import { after, applyEdits, type Edit } from "./lib/edits.ts";

/** How the schedule is written: in words, in seconds, in the crontab (M is its minute), and as a limit of the run. */
const schedules = {
  "1h": { words: "hourly", seconds: 3600, cron: "M *  * * *", limit: "45m" },
  "1d": { words: "daily", seconds: 86_400, cron: "M 3  * * *", limit: "2h" },
  "1w": { words: "weekly", seconds: 604_800, cron: "M 4  * * 1", limit: "4h" },
};

const variables = {
  SOURCE_DATABASE_URL: pipelineVariables.SOURCE_DATABASE_URL,
  TABLE: required(text),
  EVERY: required(oneOf(Object.keys(schedules))),
  NAME: optional(like(/^[a-z][a-z0-9_]*$/, "must begin with a letter, and may hold small letters, digits and _ only")),
  CURSOR: optional(like(/^[A-Za-z_]\w*$/, "may hold letters, digits and _ only"), "updated_at"),
  KEY: optional(like(/^[A-Za-z_]\w*(,[A-Za-z_]\w*)*$/, "must be columns with commas between them")),
  DRY_RUN: optional(flag, false),
};

type Plan = SourceTable & { name: string; cursor: string; schedule: (typeof schedules)["1h"] };

await main(import.meta, async () => {
  const env = readEnv(variables);
  // 1. Read the table.
  await using source = openSession(env.SOURCE_DATABASE_URL, { application: "etl:new", timeoutSeconds: 30 });
  const table = await readTable(source, env.TABLE.includes(".") ? env.TABLE : `public.${env.TABLE}`, env.CURSOR, env.KEY);
  const name = env.NAME ?? table.path.replaceAll(/^.*\.|"/g, "").toLowerCase();
  const plan = { ...table, name, cursor: env.CURSOR, schedule: schedules[env.EVERY as keyof typeof schedules] };

  // 2. Refuse what could not be synced, and a name that is taken.
  checkPlan(plan);

  // 3. Write what is missing.
  const files = { [contractOf(name)]: contract(plan), [`sql/${name}.sql`]: select(plan), [`scripts/${name}.ts`]: script(plan) };
  const written = Object.entries(files).map(([file, text]) => ({ file, has: "", change: () => text }));
  applyEdits([...written, ...edits(plan)], env.DRY_RUN);

  // 4. Print what is left: the SQL (grants; what make doctor says of an index and a trigger), then the commands.
  const checks = await askCatalogue(source, "source", { "etl.tables": [name, table.path, env.CURSOR].join(":") });
  const failed = checks.filter(({ check, ok }) => check.startsWith(`${name}: `) && !ok);
  const sql = [...table.grants, ...failed.map(({ remedy }) => `${remedy}`.replace(/^.*? Run[^:]*: /, ""))];
  if (sql.length) process.stdout.write(`Run in the source database, as a superuser:\n${sql.join("\n")}\n`);
  process.stdout.write(`Then: make migrate ${name} status\nIn production: crontab ops/crontab; reload ops/alerts.yml in Prometheus\n`);
});

function contractOf(name: string): string {
  return `schemas/bigquery/${name}.json`;
}

/** @throws UsageError with everything that stands against the pipeline. */
function checkPlan({ name, path, columns, faults, key }: Plan): void {
  for (const column of columns)
    if (key.includes(column.name) && !column.field) faults.push(`column ${column.name} of the key: ${column.unfit}. Choose another KEY=`);
  const file = contractOf(name);
  const taken = existsSync(join(root, file)) ? JSON.parse(readFileSync(join(root, file), "utf8")).source?.table : undefined;
  if (taken && taken !== path) faults.push(`${file} is that of ${taken}. Choose another NAME=`);
  if (!taken && readFileSync(join(root, "Makefile"), "utf8").includes(`\n${name}: setup`))
    faults.push(`make ${name} is another command. Choose another NAME=`);
  if (faults.length) throw new UsageError(`${path} cannot be synced yet:\n  ${faults.join("\n  ")}`);
}

function contract({ path, columns, comment, cursor, key }: Plan): string {
  return formatContract({
    source: { table: path, cursor },
    description: comment ?? `Rows of ${path}, as they were when they last changed.`,
    schema: { fields: columns.flatMap(({ field }) => field ?? []) },
    tableConstraints: { primaryKey: { columns: key } },
    clustering: { fields: key.slice(0, 4) },
  });
}

function select({ name, path, columns, cursor }: Plan): string {
  const leftOut = columns.flatMap((one) => (one.field ? [] : `  -- Left out: ${one.ident}, ${unfitness(one, "the contract")}.\n`));
  const listed = columns.flatMap(({ field, ident }) => (field ? `  ${ident}` : []));
  return `-- What \`make ${name}\` reads: the window [etl.from, etl.to) of ${cursor}. Its columns are the fields of
-- ${contractOf(name)}. In psql:
--   set etl."from" = '2017-01-01'; set etl."to" = '2017-01-02'; \\i sql/${name}.sql
select
${leftOut.join("")}${listed.join(",\n")}
from ${path}
where ${ident(cursor)} >= current_setting('etl.from')::timestamptz
  and ${ident(cursor)} < current_setting('etl.to')::timestamptz;
`;
}

/** That of orders, step for step. */
function script({ name, path, cursor, key, schedule }: Plan): string {
  return readFileSync(join(root, "scripts/orders.ts"), "utf8")
    .replaceAll(/\b(public\.)?orders\b/g, (_, schema) => (schema ? path : name))
    .replace(/^( \* {3}key +).*$/m, `$1${key.join(", ")}`)
    .replace(/^( \* {3}watermark +).*$/m, `$1${cursor}, set by the database`)
    .replace(/^( \* {3}schedule +).*$/m, `$1${schedule.words}, cron`);
}

/** What is added to files that exist: what users have there, with another name. */
function edits({ name, path, columns, cursor, key, schedule: { cron, limit, seconds } }: Plan): Edit[] {
  const renamed = (text: string): string => text.replaceAll(/\busers\b/g, name);
  const declared = columns.map((column) => `  ${declare(column)}${column.notnull ? " not null" : ""},\n`);
  const created = `
create schema if not exists ${path.replace(/\..*$/, "")};
create table if not exists ${path} (\n${declared.join("")}  primary key (${key.map(ident).join(", ")})\n);
create index if not exists ${name}_${cursor} on ${path} (${ident(cursor)});\n`;
  // A pipeline that never ran is an alert: where users succeed in the tests of the alerts, this one does at every minute.
  const succeeds = (series: string): string =>
    /verify/.test(series) ? renamed(series) : renamed(series).replace(/values: "[^"]*"/, 'values: "0+60x1000"');
  const succeeded = /^ +- (\{ )?series: '\w+\{.*pipeline="users".*\n( +values: .*\n)?/gm;
  const expected = (rule: string): string => renamed(rule).replace(/\d+(?=\)$)/m, String(seconds));
  // By its schedule, at the first odd minute that no other line has.
  const minutes = Array.from({ length: 25 }, (_, half) => `${2 * half + 11}`);
  const minute = minutes.find((one) => !new RegExp(`^${one} `, "m").test(readFileSync(join(root, "ops/crontab"), "utf8"))) ?? "59";
  const scheduled = (line: string): string =>
    line.replace(/^(\S+ +){4}\S+/, cron.replace("M", minute)).replace(/-k 60 \w+/, `-k 60 ${limit}`);
  return [
    after("Makefile", `\n${name}: setup`, /^\.PHONY: users\n(.+\n)+\n/m, renamed),
    after("ops/alerts.yml", `{ pipeline: ${name} }`, /^ +- record: \w+\n +labels: \{ pipeline: users \}\n.*\n/m, expected),
    after("ops/crontab", ` make ${name} `, /^.* make users .*\n/m, (users) => scheduled(renamed(users))),
    after("test/ops/alerts.test.yml", `pipeline="${name}"`, succeeded, succeeds),
    after("test/ops/alerts.weekly.test.yml", `pipeline="${name}"`, succeeded, succeeds),
    after("sql/roles.sql", `'${path}'`, /in array array\[[^\]]*/, () => `, '${path}'`),
    after("test/data/schema.sql", `table if not exists ${path} (`, /$/, () => created),
  ];
}
