#!/usr/bin/env -S npx tsx
/**
 * new-pipeline: writes what a pipeline from a table of the source to BigQuery is (schemas/README.md, "Adding a pipeline"), as orders or
 * users have it, and prints what is left for a person.
 *
 *   make new-pipeline TABLE=crm.stores EVERY=1d      EVERY=1h, as orders; or 1d, as users
 *     NAME=stores          by default the table's: the pipeline, its target in Makefile, and the table in BigQuery
 *     CURSOR=updated_at    the column that says when a row last changed
 *     KEY=id               columns of a unique, non-null index, by default of the primary key
 *     DRY_RUN=1            prints the differences, and writes nothing
 *
 *   safe to re-run   yes: a file or line that exists is never written over
 */
import { existsSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { flag, like, oneOf, optional, postgresUrl, readEnv, required, root, text, UsageError } from "../../shared/env.ts";
import { main } from "../../shared/main.ts";
import { ident, openSession } from "../../shared/session.ts";
import { askCatalogue, inLine, readTable, type SourceTable, unfitness } from "./lib/catalogue.ts";
import { applyEdits, type Edit } from "./lib/edits.ts";

/** The pipeline that has the schedule: its script, its target, its interval and its line in the crontab are copied. */
const models: Record<string, string> = { "1h": "orders", "1d": "users" };

const variables = {
  SOURCE_DATABASE_URL: required(postgresUrl),
  TABLE: required(text),
  EVERY: required(oneOf(Object.keys(models))),
  NAME: optional(like(/^[a-z][a-z0-9_]*$/, "must begin with a letter, and may hold small letters, digits and _ only")),
  CURSOR: optional(like(/^[A-Za-z_]\w*$/, "may hold letters, digits and _ only"), "updated_at"),
  KEY: optional(like(/^[A-Za-z_]\w*(,[A-Za-z_]\w*)*$/, "must be columns with commas between them")),
  DRY_RUN: optional(flag, false),
};

const read = (file: string): string => readFileSync(join(root, file), "utf8");

type Plan = SourceTable & { name: string; cursor: string; file: string; model: string };

await main(import.meta, async () => {
  const env = readEnv(variables);
  // 1. Read the table.
  await using source = openSession(env.SOURCE_DATABASE_URL, { application: "etl:new", timeoutSeconds: 30 });
  const table = await readTable(source, env.TABLE.includes(".") ? env.TABLE : `public.${env.TABLE}`, env.CURSOR, env.KEY);
  const name = env.NAME ?? table.path.replaceAll(/^.*\.|"/g, "").toLowerCase();
  const plan = { ...table, name, cursor: env.CURSOR, file: `schemas/bigquery/${name}.json`, model: models[env.EVERY] ?? "" };

  // 2. Refuse what could not be synced, and a name that is taken.
  checkPlan(plan);

  // 3. Write what is missing.
  applyEdits(edits(plan), env.DRY_RUN);

  // 4. Print what is left: the SQL (grants; what make doctor says of an index and a trigger), then the commands.
  const checks = await askCatalogue(source, "source", { "etl.tables": [name, table.path, env.CURSOR].join(":") });
  const failed = checks.filter(({ check, ok }) => check.startsWith(`${name}: `) && !ok);
  const sql = [...table.grants, ...failed.map(({ remedy }) => `${remedy}`.replace(/^.*? Run[^:]*: /, ""))];
  if (sql.length) process.stdout.write(`Run in the source database, as a superuser:\n${sql.join("\n")}\n`);
  process.stdout.write(`Then: make migrate ${name} status\nIn production: crontab ops/crontab; reload ops/alerts.yml in Prometheus\n`);
});

/** @throws UsageError with everything that stands against the pipeline. */
function checkPlan({ name, path, file, columns, faults, key }: Plan): void {
  for (const column of columns)
    if (key.includes(column.name) && !column.field) faults.push(`column ${column.name} of its key cannot be synced. Choose another KEY=`);
  const isKnown = existsSync(join(root, file)) && JSON.parse(read(file)).source?.table === path;
  if (!isKnown && read("Makefile").includes(`\n${name}: setup`)) faults.push(`make ${name} is another command. Choose another NAME=`);
  if (faults.length) throw new UsageError(`${path} cannot be synced yet:\n  ${faults.join("\n  ")}`);
}

function contract({ path, columns, comment, cursor, key }: Plan): string {
  return `{
  "source": ${inLine({ table: path, cursor })},
  "description": ${JSON.stringify(comment ?? `Rows of ${path}, as they were when they last changed.`)},
  "schema": {
    "fields": [
      ${columns.flatMap(({ field }) => (field ? inLine(field) : [])).join(",\n      ")}
    ]
  },
  "tableConstraints": ${inLine({ primaryKey: { columns: key } })},
  "clustering": ${inLine({ fields: key.slice(0, 4) })}
}
`;
}

function select({ name, path, file, columns, cursor }: Plan): string {
  const leftOut = columns.flatMap((one) => (one.field ? [] : `  -- Left out: ${one.ident}, ${unfitness(one, "the contract")}.\n`));
  const listed = columns.flatMap(({ field, ident }) => (field ? `  ${ident}` : []));
  return `-- What \`make ${name}\` reads: the window [etl.from, etl.to) of ${cursor}. Its columns are the fields of
-- ${file}. In psql:
--   set etl."from" = '2017-01-01'; set etl."to" = '2017-01-02'; \\i sql/${name}.sql
select
${leftOut.join("")}${listed.join(",\n")}
from ${path}
where ${ident(cursor)} >= current_setting('etl.from')::timestamptz
  and ${ident(cursor)} < current_setting('etl.to')::timestamptz;
`;
}

/** The model's script, step for step, with its own names. */
function script({ name, path, cursor, key, model }: Plan): string {
  return read(`scripts/${model}.ts`)
    .replaceAll(new RegExp(`\\b(public\\.)?${model}\\b`, "g"), (_, schema) => (schema ? path : name))
    .replace(/^( \* {3}key +).*$/m, `$1${key.join(", ")}`)
    .replace(/^( \* {3}watermark +).*$/m, `$1${cursor}, set by the database`);
}

function edits(plan: Plan): Edit[] {
  const { name, path, file, model, created } = plan;
  const renamed = (text: string): string => text.replaceAll(new RegExp(`\\b(${model}|users)\\b`, "g"), name);
  // A pipeline that never ran is an alert: where users succeed in the tests of the alerts, this one does at every minute.
  const succeeds = (series: string): string =>
    series.includes("verify") ? renamed(series) : renamed(series).replace(/values: "[^"]*"/, 'values: "0+60x1000"');
  const ofUsers = /^ +- (\{ )?series: '\w+\{.*pipeline="users".*\n( +values: .*\n)?/gm;
  // The first odd minute that no other line has.
  let minute = 11;
  while (minute < 59 && read("ops/crontab").includes(`\n${minute} `)) minute += 2;
  const { raw } = String;
  const behind = (pattern: string): RegExp => new RegExp(pattern, "m");
  return [
    [file, "", /^/, () => contract(plan)],
    [`sql/${name}.sql`, "", /^/, () => select(plan)],
    [`scripts/${name}.ts`, "", /^/, () => script(plan)],
    ["Makefile", `\n${name}: setup`, behind(raw`^\.PHONY: ${model}\n(.+\n)+\n`), renamed],
    ["ops/alerts.yml", `{ pipeline: ${name} }`, behind(raw`^ +- record: \w+\n +labels: \{ pipeline: ${model} \}\n.*\n`), renamed],
    ["ops/crontab", ` make ${name} `, behind(raw`^.* make ${model} .*\n`), (line) => renamed(line).replace(/^\d+/, `${minute}`)],
    ["test/ops/alerts.test.yml", `pipeline="${name}"`, ofUsers, succeeds],
    ["test/ops/alerts.weekly.test.yml", `pipeline="${name}"`, ofUsers, succeeds],
    ["sql/roles.sql", `'${path}'`, /in array array\[[^\]]*/, () => `, '${path}'`],
    ["test/data/schema.sql", `table if not exists ${path} (`, /$/, () => `\n${created}`],
  ];
}
