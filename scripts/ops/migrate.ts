#!/usr/bin/env -S npx tsx
/**
 * migrate: creates and evolves what the pipelines need, from the committed files. What it does is printed first.
 *
 *   schema etl       sql/etl/*.sql, each applied once, in order of its number; one that was applied may not be edited
 *   BigQuery         BIGQUERY_DATASET and BIGQUERY_VIEWS_DATASET. schemas/bigquery/*.json: created, or extended by what loses nothing
 *                    (a new column, REQUIRED that becomes NULLABLE, a description); any other difference is refused, with the SQL that a
 *                    person would run
 *   the bucket       S3_BUCKET, where that is set
 *   ClickHouse       schemas/clickhouse/*.sql, as sql/etl, where CLICKHOUSE_URL is set. A database that an older version made is taken over
 *   safe to re-run   yes: what exists is left as it is; a second migrate waits for the first
 *
 *   make migrate DRY_RUN=1   says what would be done; without DRY_RUN=1 it does it
 */
import { isDeepStrictEqual } from "node:util";
import { CreateBucketCommand } from "@aws-sdk/client-s3";
import type { TableField, TableMetadata } from "@google-cloud/bigquery";
import { bigqueryVariables, connectBigQuery } from "../../shared/bigquery/client.ts";
import { type Contract, differingColumns, optionFaults, readContract } from "../../shared/bigquery/contract.ts";
import { type Env, flag, isSet, name, optional, postgresUrl, readEnv, required, UsageError } from "../../shared/env.ts";
import { bucketExists, bucketVariables, connectS3 } from "../../shared/events/s3.ts";
import { log } from "../../shared/log.ts";
import { main } from "../../shared/main.ts";
import { pipelines } from "../../shared/pipelines.ts";
import { clickhouseVariables, connectClickHouse, nameClickHouse } from "../../shared/sensors/clickhouse.ts";
import { checkSession, openSession } from "../../shared/session.ts";
import { noExpiry } from "../../shared/views/build.ts";
import { migrateClickHouse, migratePostgres, type Step } from "./lib/migrations.ts";

const variables = {
  ETL_DATABASE_URL: required(postgresUrl),
  ...bigqueryVariables,
  BIGQUERY_VIEWS_DATASET: required(name),
  DRY_RUN: optional(flag, false),
};

await main(import.meta, async () => {
  const [archives, captures] = [isSet("S3_BUCKET"), isSet("CLICKHOUSE_URL")];
  readEnv({ ...variables, ...(archives && bucketVariables), ...(captures && clickhouseVariables) }); // every fault at once
  const env = readEnv(variables);
  const apply: Step = async (what, work) => {
    log({ step: env.DRY_RUN ? "would-apply" : "apply", what });
    if (!env.DRY_RUN) await work();
  };
  const leaveOut = (what: string, variable: string): void => log({ step: "left-out", what, because: `${variable} is not set` });

  // 1. One migrate at a time: a second one waits, and then finds nothing to do.
  await using etl = openSession(env.ETL_DATABASE_URL, { application: "etl:migrate", timeoutSeconds: 300 });
  await checkSession("ETL_DATABASE_URL", etl);
  await etl`select set_config('lock_timeout', '0', false)`;
  await etl`select pg_advisory_lock(hashtextextended('etl:migrate', 0))`;

  // 2. The etl tables.
  const [schema] = await etl`select to_regnamespace('etl') as etl`;
  if (!schema?.etl)
    throw new Error("schema etl does not exist. Run sql/roles.sql in that database as an administrator, then: make migrate");
  await migratePostgres(etl, apply);

  // 3. The datasets, and the tables of the raw one.
  const refused = await migrateBigQuery(env, apply);

  // 4. The bucket.
  if (archives) {
    const bucket = connectS3(readEnv(bucketVariables));
    const create = new CreateBucketCommand({ Bucket: bucket.name });
    if (!(await bucketExists(bucket))) await apply(`create bucket ${bucket.name}`, () => bucket.client.send(create));
  } else leaveOut("the bucket of events", "S3_BUCKET");

  // 5. ClickHouse.
  if (captures) {
    const clickhouse = readEnv(clickhouseVariables);
    await using server = connectClickHouse(clickhouse, "default");
    // A dry run asks the server all the same, so that a wrong login is known.
    const query = env.DRY_RUN ? "SELECT 1 FORMAT Null" : `CREATE DATABASE IF NOT EXISTS ${clickhouse.CLICKHOUSE_DATABASE}`;
    await server.command({ query }).catch((error: Error) => nameClickHouse(clickhouse, error));
    await using client = connectClickHouse(clickhouse);
    await migrateClickHouse(client, apply);
  } else leaveOut("ClickHouse's tables of sensors", "CLICKHOUSE_URL");

  const kept = "these differences could lose data or need a decision, and were left as they are";
  const next = "Run the SQL there, or bring the contract back to the table; then: make migrate";
  if (refused.length) throw new UsageError(`${kept}:\n  ${refused.join("\n  ")}\n${next}`);
  log({ step: "done" });
});

/** Creates the datasets and tables, and adds to these what loses nothing. @returns what else differs, with what a person would do. */
async function migrateBigQuery(env: Env<typeof variables>, apply: Step): Promise<string[]> {
  const bigquery = connectBigQuery(env);
  for (const id of [env.BIGQUERY_DATASET, env.BIGQUERY_VIEWS_DATASET])
    if (!(await bigquery.dataset(id).exists())[0])
      await apply(`create dataset ${id}`, () => bigquery.createDataset(id, { location: env.BIGQUERY_LOCATION }));
  const refused: string[] = [];
  for (const pipeline of pipelines()) {
    const contract = readContract(pipeline);
    const table = bigquery.dataset(env.BIGQUERY_DATASET).table(pipeline);
    const name = `${env.BIGQUERY_DATASET}.${pipeline}`;
    if (!(await table.exists())[0]) {
      await apply(`create table ${name}`, async () => {
        await table.create(contract.resource);
        await table.setMetadata(noExpiry((await table.getMetadata())[0]));
      });
      continue;
    }
    const [actual] = await table.getMetadata();
    const { additions, decisions } = compare(contract, name, actual);
    refused.push(...decisions, ...optionFaults(name, actual));
    if (decisions.length) continue;
    const { description = "" } = contract.resource;
    // The API takes what is left out for none: policy tags, collation, default values and rounding modes are the table's own.
    const fields = contract.fields.map((field) => ({ ...columnOf(actual, field), ...field }));
    for (const addition of additions) await apply(addition, async () => {});
    if (additions.length && !env.DRY_RUN) await table.setMetadata({ description, schema: { fields } });
  }
  return refused;
}

function columnOf(table: TableMetadata, { name }: TableField): TableField | undefined {
  return table.schema?.fields?.find((one: TableField) => one.name === name);
}

/** What the contract has and the table has not: additions, and what needs a person's decision, with what that person would do. */
function compare(contract: Contract, name: string, actual: TableMetadata): { additions: string[]; decisions: string[] } {
  const { file, fields, resource } = contract;
  const [additions, decisions]: [string[], string[]] = [[], []];
  for (const { column, expected, found, fault } of differingColumns(contract, name, actual)) {
    const type = expected.replace(/ \w+$/, "").replace(/^FLOAT$/, "FLOAT64");
    let remedy = `SQL: ALTER TABLE ${name} ALTER COLUMN ${column} SET DATA TYPE ${type};`;
    if (!expected) remedy = `SQL: ALTER TABLE ${name} DROP COLUMN ${column};`;
    if (!found) remedy = "Rows that exist have no value for it: add it as NULLABLE";
    if (found.replace("NULLABLE", "REQUIRED") === expected) remedy = "BigQuery cannot make a column REQUIRED again: create the table again";
    if (!found && !expected.endsWith("REQUIRED")) additions.push(`add column ${name}.${column} ${expected}`);
    else if (found.replace("REQUIRED", "NULLABLE") === expected) additions.push(`relax ${name}.${column} from ${found} to ${expected}`);
    else decisions.push(`${fault}. ${remedy}`);
  }
  const textOf = ({ description = "" }: { description?: string }): string => description;
  for (const field of fields)
    if (textOf(field) !== textOf(columnOf(actual, field) ?? field)) additions.push(`describe ${name}.${field.name}`);
  if (textOf(resource) !== textOf(actual)) additions.push(`describe ${name}`);
  for (const part of ["timePartitioning", "clustering", "tableConstraints"] as const) {
    const [wanted, found] = [resource[part] ?? {}, actual[part] ?? {}] as [Record<string, unknown>, Record<string, unknown>];
    // What the service adds itself, such as an expiry that is 0, is nobody's difference.
    if (Object.entries(wanted).every(([key, value]) => isDeepStrictEqual(found[key], value))) continue;
    const fault = `table ${name}: expected ${part} ${JSON.stringify(wanted)} (${file}), found ${JSON.stringify(found)}`;
    decisions.push(`${fault}. A table keeps these for its life: create a new one, and copy its rows`);
  }
  return { additions, decisions };
}
