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
import { bigqueryVariables, connectBigQuery } from "../../shared/bigquery/client.ts";
import { type Contract, describeField, readContract } from "../../shared/bigquery/contract.ts";
import { flag, isSet, name, optional, postgresUrl, readEnv, required, UsageError } from "../../shared/env.ts";
import { log } from "../../shared/log.ts";
import { main } from "../../shared/main.ts";
import { pipelines } from "../../shared/pipelines.ts";
import { checkSession, connect } from "../../shared/session.ts";
import { applyMigrations, inClickHouse, inPostgres, type Step } from "./lib/migrations.ts";

await main(import.meta, async () => {
  // Each library only where it is used: they load slowly.
  const s3 = isSet("S3_BUCKET") ? await import("../../shared/events/s3.ts") : undefined;
  const clickhouse = isSet("CLICKHOUSE_URL") ? await import("../../shared/sensors/clickhouse.ts") : undefined;
  const own = {
    ETL_DATABASE_URL: required(postgresUrl),
    ...bigqueryVariables,
    BIGQUERY_VIEWS_DATASET: required(name),
    DRY_RUN: optional(flag, false),
  };
  readEnv({ ...own, ...s3?.bucketVariables, ...clickhouse?.clickhouseVariables }); // every fault at once
  const env = readEnv(own);
  const bucketEnv = s3 && readEnv(s3.bucketVariables);
  const clickhouseEnv = clickhouse && readEnv(clickhouse.clickhouseVariables);
  const leaveOut = (what: string, variable: string): void =>
    log({ step: "left-out", what, because: `${variable} is not set` });
  const apply: Step = async (what, work) => {
    log({ step: env.DRY_RUN ? "would-apply" : "apply", what });
    if (!env.DRY_RUN) await work();
  };

  // 1. One migrate at a time: a second one waits, and then finds nothing to do.
  const etl = connect(env.ETL_DATABASE_URL, { application: "etl:migrate", timeoutSeconds: 300 });
  await checkSession("ETL_DATABASE_URL", etl);
  await etl`select set_config('lock_timeout', '0', false)`;
  await etl`select pg_advisory_lock(hashtextextended('etl:migrate', 0))`;

  // 2. The etl tables.
  const [schema] = await etl`select to_regnamespace('etl') as etl`;
  if (!schema?.etl)
    throw new Error("schema etl does not exist. Run sql/roles.sql in that database as a superuser, then: make migrate");
  await applyMigrations("sql/etl", inPostgres(etl), apply);

  // 3. The datasets, and the tables of the raw one.
  const bigquery = connectBigQuery(env);
  for (const id of [env.BIGQUERY_DATASET, env.BIGQUERY_VIEWS_DATASET]) {
    const [there] = await bigquery.dataset(id).exists();
    if (!there)
      await apply(`create dataset ${id}`, () => bigquery.createDataset(id, { location: env.BIGQUERY_LOCATION }));
  }
  const refused: string[] = [];
  for (const pipeline of pipelines()) {
    const contract = readContract(pipeline);
    const table = bigquery.dataset(env.BIGQUERY_DATASET).table(pipeline);
    const name = `${env.BIGQUERY_DATASET}.${pipeline}`;
    const [there] = await table.exists();
    if (!there) {
      await apply(`create table ${name}`, () => table.create(contract.resource));
      continue;
    }
    const [actual] = await table.getMetadata();
    const difference = compare(contract, name, actual);
    refused.push(...difference.refused);
    if (difference.refused.length || !difference.additions.length) continue;
    for (const addition of difference.additions) log({ step: env.DRY_RUN ? "would-apply" : "apply", what: addition });
    const { description = "" } = contract.resource;
    if (!env.DRY_RUN) await table.setMetadata({ description, schema: { fields: contract.fields } });
  }

  // 4. The bucket.
  if (s3 && bucketEnv) {
    const bucket = s3.connectS3(bucketEnv);
    if (!(await s3.bucketExists(bucket)))
      await apply(`create bucket ${bucket.name}`, () => s3.createBucket(bucket, bucketEnv.AWS_REGION));
  } else leaveOut("the bucket of events", "S3_BUCKET");

  // 5. ClickHouse.
  if (clickhouse && clickhouseEnv) {
    const { CLICKHOUSE_DATABASE: database, CLICKHOUSE_URL: url } = clickhouseEnv;
    await using server = clickhouse.connectClickHouse(clickhouseEnv, "default");
    await using client = clickhouse.connectClickHouse(clickhouseEnv);
    const databases = await server.query({ query: "SHOW DATABASES", format: "TabSeparated" }).catch((error: Error) => {
      throw new Error(
        `ClickHouse at ${new URL(url).host} (CLICKHOUSE_URL): ${error.message.trim()}. Next: make doctor`,
      );
    });
    if (!(await databases.text()).split("\n").includes(database))
      await apply(`create database ${database}`, () => server.command({ query: `CREATE DATABASE ${database}` }));
    const target = inClickHouse(client, () => clickhouse.appliedMigrations(client));
    await applyMigrations("schemas/clickhouse", target, apply);
  } else leaveOut("ClickHouse's tables of sensors", "CLICKHOUSE_URL");
  await etl.end();
  if (refused.length) {
    throw new UsageError(
      `these differences could lose data or need a decision, and were left as they are:\n${refused.map((line) => `  ${line}`).join("\n")}\nRun the SQL there, or bring the contract back to the table; then: make migrate`,
    );
  }
  log({ step: "done" });
});

/** A field's type as SQL has it, without its mode: INTEGER NULLABLE → INT64 */
function sqlType(field: string): string {
  return field.replace(/ \w+$/, "").replace("INTEGER", "INT64").replace("FLOAT", "FLOAT64").replace("BOOLEAN", "BOOL");
}

/** What the contract has and the table has not: additions, in words, and what is refused, with the SQL a person would run. */
function compare(contract: Contract, name: string, actual: TableMetadata): { additions: string[]; refused: string[] } {
  const additions: string[] = [];
  const refused: string[] = [];
  const there: TableField[] = actual.schema?.fields ?? [];
  for (const field of contract.fields) {
    const column = `${name}.${field.name}`;
    const now = there.find((one) => one.name === field.name);
    const [is, wanted] = [describeField(now ?? {}), describeField(field)];
    const difference = `column ${column}: expected ${wanted} (${contract.file}), found ${is}`;
    if (!now && field.mode !== "REQUIRED") additions.push(`add column ${column} ${wanted}`);
    else if (!now)
      refused.push(
        `column ${column} is ${wanted} in ${contract.file} and not there: rows that exist have no value for it. Add it as NULLABLE`,
      );
    else if (is === wanted) {
      if ((now.description ?? "") !== (field.description ?? "")) additions.push(`describe ${column}`);
    } else if (is.replace("REQUIRED", "NULLABLE") === wanted) additions.push(`relax ${column} from ${is} to ${wanted}`);
    else if (is.replace("NULLABLE", "REQUIRED") === wanted)
      refused.push(`${difference}. BigQuery cannot make a column REQUIRED again: create the table again`);
    else
      refused.push(
        `${difference}. SQL: ALTER TABLE ${name} ALTER COLUMN ${field.name} SET DATA TYPE ${sqlType(wanted)};`,
      );
  }
  for (const { name: column } of there) {
    if (!contract.fields.some((field) => field.name === column)) {
      refused.push(
        `column ${name}.${column} is not in ${contract.file}. SQL: ALTER TABLE ${name} DROP COLUMN ${column};`,
      );
    }
  }
  if ((actual.description ?? "") !== (contract.resource.description ?? "")) additions.push(`describe ${name}`);
  for (const part of ["timePartitioning", "clustering", "tableConstraints"] as const) {
    const wanted = contract.resource[part] ?? {};
    const is = actual[part] ?? {};
    // What the service adds of its own, such as an expiry that is 0, is nobody's difference.
    const same = Object.entries(wanted).every(([key, value]) => isDeepStrictEqual(is[key as keyof typeof is], value));
    if (!same) {
      refused.push(
        `table ${name}: expected ${part} ${JSON.stringify(wanted)} (${contract.file}), found ` +
          `${JSON.stringify(is)}. A table keeps these for its life: create a new one, and copy its rows`,
      );
    }
  }
  return { additions, refused };
}
