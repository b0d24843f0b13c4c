#!/usr/bin/env -S npx tsx
/**
 * migrate: creates and evolves what the pipelines need, from the committed files. What it does is printed first.
 *
 *   etl tables       sql/etl/*.sql in ETL_DATABASE_URL: each applied once, in order of its number; one that was applied may
 *                    not be edited, which its checksum tells
 *   BigQuery tables  schemas/bigquery/*.json in BIGQUERY_DATASET: created, or extended by what loses nothing (a new NULLABLE
 *                    column, REQUIRED that becomes NULLABLE, a description); any other difference is refused, with the SQL
 *                    that a person would run
 *   the models' dataset  BIGQUERY_VIEWS_DATASET: created where it is missing; make views fills it
 *   the bucket       S3_BUCKET: created where it is missing; left out where the variable is not set
 *   ClickHouse       schemas/clickhouse/*.sql in CLICKHOUSE_DATABASE: as sql/etl, and recorded there in etl_migrations. A database that
 *                    an older version made is taken over: each file keeps what exists, and replaces the views' SELECTs. Left out where
 *                    CLICKHOUSE_URL is not set
 *   safe to re-run   yes: what is there already is left as it is; a second migrate waits for the first
 *
 *   make migrate             do it
 *   make migrate DRY_RUN=1   say what would be done
 */
import { isDeepStrictEqual } from "node:util";
import type { TableField, TableMetadata } from "@google-cloud/bigquery";
import { bigqueryVariables, connectBigQuery, noExpiry } from "../../shared/bigquery/client.ts";
import { type Contract, describeField, optionFaults, readContract } from "../../shared/bigquery/contract.ts";
import { type Env, flag, isSet, name, optional, postgresUrl, readEnv, required, UsageError } from "../../shared/env.ts";
import { bucketExists, bucketVariables, connectS3, createBucket } from "../../shared/events/s3.ts";
import { log } from "../../shared/log.ts";
import { main } from "../../shared/main.ts";
import { pipelines } from "../../shared/pipelines.ts";
import { type ClickHouseEnv, clickhouseVariables, connectClickHouse } from "../../shared/sensors/clickhouse.ts";
import { checkSession, openSession } from "../../shared/session.ts";
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
    if (!(await bucketExists(bucket))) await apply(`create bucket ${bucket.name}`, () => createBucket(bucket));
  } else leaveOut("the bucket of events", "S3_BUCKET");

  // 5. ClickHouse.
  if (captures) {
    const clickhouse = readEnv(clickhouseVariables);
    await createDatabase(clickhouse, env.DRY_RUN);
    await using client = connectClickHouse(clickhouse);
    await migrateClickHouse(client, apply);
  } else leaveOut("ClickHouse's tables of sensors", "CLICKHOUSE_URL");

  if (refused.length)
    throw new UsageError(
      `these differences could lose data or need a decision, and were left as they are:\n  ${refused.join("\n  ")}\n` +
        "Run the SQL there, or bring the contract back to the table; then: make migrate",
    );
  log({ step: "done" });
});

/** A dry run asks the server all the same, so that a wrong login is known. */
async function createDatabase(env: ClickHouseEnv, dryRun: boolean): Promise<void> {
  await using server = connectClickHouse(env, "default");
  const query = dryRun ? "SELECT 1 FORMAT Null" : `CREATE DATABASE IF NOT EXISTS ${env.CLICKHOUSE_DATABASE}`;
  await server.command({ query }).catch(({ message }: Error) => {
    throw new Error(`ClickHouse at ${new URL(env.CLICKHOUSE_URL).host} (CLICKHOUSE_URL): ${message.trim()}. Next: make doctor`);
  });
}

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
    const difference = compare(contract, name, actual);
    refused.push(...difference.refused, ...optionFaults(name, actual));
    if (difference.refused.length) continue;
    const { description = "" } = contract.resource;
    // The API takes what is left out for none: policy tags, collation, default values and rounding modes are the table's own.
    const there: TableField[] = actual.schema?.fields ?? [];
    const fields = contract.fields.map((field) => ({ ...there.find(({ name }) => name === field.name), ...field }));
    for (const addition of difference.additions) await apply(addition, async () => {});
    if (difference.additions.length && !env.DRY_RUN) await table.setMetadata({ description, schema: { fields } });
  }
  return refused;
}

/** What the contract has and the table has not: additions, in words, and what is refused, with what a person would do. */
function compare(contract: Contract, name: string, actual: TableMetadata): { additions: string[]; refused: string[] } {
  const additions: string[] = [];
  const refused: string[] = [];
  const { file, resource } = contract;
  const there = (actual.schema?.fields ?? []) as Contract["fields"];
  for (const field of new Set([...contract.fields, ...there].map((field) => field.name))) {
    const [wanted, found] = [contract.fields, there].map((fields) => fields.find((one) => one.name === field));
    const [expected, is] = [wanted, found].map((one) => (one ? describeField(one) : "no such column")) as [string, string];
    const column = `${name}.${field}`;
    const type = expected.replace(/ \w+$/, "").replace(/^FLOAT$/, "FLOAT64");
    const refuse = (remedy: string): void => void refused.push(`column ${column}: expected ${expected} (${file}), found ${is}. ${remedy}`);
    if (!wanted) refuse(`SQL: ALTER TABLE ${name} DROP COLUMN ${field};`);
    else if (!found && wanted.mode === "REQUIRED") refuse("Rows that exist have no value for it: add it as NULLABLE");
    else if (!found) additions.push(`add column ${column} ${expected}`);
    else if (is === expected) {
      if ((wanted.description ?? "") !== (found.description ?? "")) additions.push(`describe ${column}`);
    } else if (is.replace("REQUIRED", "NULLABLE") === expected) additions.push(`relax ${column} from ${is} to ${expected}`);
    else if (is.replace("NULLABLE", "REQUIRED") === expected)
      refuse("BigQuery cannot make a column REQUIRED again: create the table again");
    else refuse(`SQL: ALTER TABLE ${name} ALTER COLUMN ${field} SET DATA TYPE ${type};`);
  }
  if ((actual.description ?? "") !== (resource.description ?? "")) additions.push(`describe ${name}`);
  for (const part of ["timePartitioning", "clustering", "tableConstraints"] as const) {
    const [wanted, found] = [resource[part] ?? {}, actual[part] ?? {}] as Record<string, unknown>[];
    // What the service adds itself, such as an expiry that is 0, is nobody's difference.
    if (Object.entries(wanted ?? {}).every(([key, value]) => isDeepStrictEqual(found?.[key], value))) continue;
    refused.push(
      `table ${name}: expected ${part} ${JSON.stringify(wanted)} (${file}), found ${JSON.stringify(found)}. ` +
        "A table keeps these for its life: create a new one, and copy its rows",
    );
  }
  return { additions, refused };
}
