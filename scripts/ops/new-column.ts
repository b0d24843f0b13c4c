#!/usr/bin/env -S npx tsx
/**
 * new-column: adds a column that the source has to the contract, NULLABLE, since rows that exist have no value for it; to the SELECT; and
 * to the local stack. Prints what is left for a person.
 *
 *   make new-column PIPELINE=orders COLUMN=channel DRY_RUN=1      prints the differences; without DRY_RUN=1 it writes them
 *   safe to re-run   yes: what exists stays as it is
 */
import { readContract } from "../../shared/bigquery/contract.ts";
import { flag, oneOf, optional, postgresUrl, readEnv, required, text, UsageError } from "../../shared/env.ts";
import { main } from "../../shared/main.ts";
import { pipelines } from "../../shared/pipelines.ts";
import { openSession } from "../../shared/session.ts";
import { inLine, readTable, unfitness } from "./lib/catalogue.ts";
import { applyEdits, type Edit } from "./lib/edits.ts";

await main(import.meta, async () => {
  const own = { PIPELINE: required(oneOf(pipelines())), COLUMN: required(text), DRY_RUN: optional(flag, false) };
  const env = readEnv({ SOURCE_DATABASE_URL: required(postgresUrl), ...own });
  const { PIPELINE: pipeline, COLUMN: name } = env;
  const { file, source } = readContract(pipeline);
  await using session = openSession(env.SOURCE_DATABASE_URL, { application: "etl:new", timeoutSeconds: 30 });
  const { path, columns } = await readTable(session, source.table);
  const column = columns.find((one) => one.name === name);
  if (!column) throw new UsageError(`${path} has no column ${name}. It has: ${columns.map((one) => one.name).join(", ")}`);
  if (!column.field) throw new UsageError(`column ${name} of ${path} cannot be synced, ${unfitness(column, file)}`);
  const field = inLine({ ...column.field, mode: column.field.mode.replace("REQUIRED", "NULLABLE") });
  const added = `alter table ${path} add column if not exists ${column.declaration};`;
  const edits: Edit[] = [
    [file, `"name": "${name}"`, /"fields": \[[\s\S]*?\}(?=\s*\]\s*\})/, () => `,\n      ${field}`],
    [`sql/${pipeline}.sql`, ` ${column.ident},\n`, /^select\s+/im, () => `${column.ident},\n  `],
    ["test/data/schema.sql", added, /$/, () => `\n${added}\n`],
  ];
  applyEdits(edits, env.DRY_RUN);
  const again = `make ${pipeline} FROM=2000-01-01 TO=2100-01-01`;
  process.stdout.write(`Then: make migrate ${pipeline}\nRows that do not change keep NULL until: ${again}\n`);
});
