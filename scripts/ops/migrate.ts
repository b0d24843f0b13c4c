#!/usr/bin/env -S npx tsx
/**
 * migrate: creates and evolves what the pipelines need, from the committed files. What it does is printed first.
 *
 *   schema etl, ClickHouse   sql/etl and schemas/clickhouse: each file once, by its number; one that was applied may not be edited
 *   BigQuery                 the datasets; schemas/bigquery: each table is created, or extended by what loses nothing (a new column,
 *                            REQUIRED that becomes NULLABLE, a description); any other difference is refused
 *   the bucket               is created. It and ClickHouse are left out where S3_BUCKET or CLICKHOUSE_URL is not set
 *   safe to re-run           yes: what exists is left as it is; a second migrate waits for the first
 *
 *   make migrate DRY_RUN=1   says what would be done; without DRY_RUN=1 it does it
 */
import { isDeepStrictEqual } from "node:util";
import { CreateBucketCommand } from "@aws-sdk/client-s3";
import type { Dataset, TableField } from "@google-cloud/bigquery";
import { bigqueryVariables, connectBigQuery } from "../../shared/bigquery/client.ts";
import { type Contract, differingColumns, optionFaults, readContract } from "../../shared/bigquery/contract.ts";
import { flag, isSet, name, optional, postgresUrl, readEnv, required, UsageError } from "../../shared/env.ts";
import { bucketExists, bucketVariables, connectS3 } from "../../shared/events/s3.ts";
import { log } from "../../shared/log.ts";
import { main } from "../../shared/main.ts";
import { pipelines } from "../../shared/pipelines.ts";
import { clickhouseVariables, connectClickHouse, nameClickHouse } from "../../shared/sensors/clickhouse.ts";
import { checkSession, openSession } from "../../shared/session.ts";
import { noExpiry } from "../../shared/views/build.ts";
import { migrateClickHouse, migratePostgres, type Step } from "./lib/migrations.ts";

const own = { ETL_DATABASE_URL: required(postgresUrl), BIGQUERY_VIEWS_DATASET: required(name), DRY_RUN: optional(flag, false) };
const variables = { ...bigqueryVariables, ...own };

await main(import.meta, async () => {
  const [archives, captures] = [isSet("S3_BUCKET"), isSet("CLICKHOUSE_URL")];
  readEnv({ ...variables, ...(archives && bucketVariables), ...(captures && clickhouseVariables) }); // every fault at once
  const env = readEnv(variables);
  const apply: Step = async (what, work) => {
    log({ step: env.DRY_RUN ? "would-apply" : "apply", what });
    if (!env.DRY_RUN) await work();
  };

  // 1. One migrate at a time: a second one waits, and then finds nothing to do.
  const session = { application: "etl:migrate", timeoutSeconds: 300, settings: { lock_timeout: "0" } };
  await using etl = openSession(env.ETL_DATABASE_URL, session);
  await checkSession("ETL_DATABASE_URL", etl);
  await etl`select pg_advisory_lock(hashtextextended('etl:migrate', 0))`;

  // 2. The etl tables.
  const [schema] = await etl`select to_regnamespace('etl') as etl`;
  if (!schema?.etl)
    throw new Error("schema etl does not exist. Run sql/roles.sql in that database as an administrator, then: make migrate");
  await migratePostgres(etl, apply);

  // 3. The bucket.
  if (archives) {
    const bucket = connectS3(readEnv(bucketVariables));
    const create = new CreateBucketCommand({ Bucket: bucket.name });
    if (!(await bucketExists(bucket))) await apply(`create bucket ${bucket.name}`, () => bucket.client.send(create));
  } else log({ step: "left-out", what: "the bucket of events", because: "S3_BUCKET is not set" });

  // 4. ClickHouse.
  if (captures) {
    const clickhouse = readEnv(clickhouseVariables);
    await using server = connectClickHouse(clickhouse, "default");
    await using client = connectClickHouse(clickhouse);
    const query = `CREATE DATABASE IF NOT EXISTS ${clickhouse.CLICKHOUSE_DATABASE}`;
    const created = env.DRY_RUN ? Promise.resolve() : server.command({ query });
    await created.then(() => migrateClickHouse(client, apply)).catch((error: Error) => nameClickHouse(clickhouse, error));
  } else log({ step: "left-out", what: "ClickHouse's tables of sensors", because: "CLICKHOUSE_URL is not set" });

  // 5. The datasets, and the tables of the raw one.
  const bigquery = connectBigQuery(env);
  for (const id of [env.BIGQUERY_DATASET, env.BIGQUERY_VIEWS_DATASET])
    if (!(await bigquery.dataset(id).exists())[0])
      await apply(`create dataset ${id}`, () => bigquery.createDataset(id, { location: env.BIGQUERY_LOCATION }));
  const refused: string[] = [];
  for (const pipeline of pipelines())
    refused.push(...(await migrateTable(bigquery.dataset(env.BIGQUERY_DATASET), readContract(pipeline), apply)));
  const kept = "these differences could lose data or need a decision, and their tables were left as they are";
  const next = "Bring the contract back, or change the table (ALTER TABLE … ALTER COLUMN … SET DATA TYPE …); then: make migrate";
  if (refused.length) throw new UsageError(`${kept}:\n  ${refused.join("\n  ")}\n${next}`);
  log({ step: "done" });
});

/** Creates the contract's table, or adds to it what loses nothing. @returns what else differs: then nothing is added. */
async function migrateTable(dataset: Dataset, contract: Contract, apply: Step): Promise<string[]> {
  const { pipeline, file, fields, resource } = contract;
  const [table, name] = [dataset.table(pipeline), `${dataset.id}.${pipeline}`];
  if (!(await table.exists())[0]) {
    await apply(`create table ${name}`, async () => {
      await table.create(resource);
      await table.setMetadata(noExpiry((await table.getMetadata())[0]));
    });
    return [];
  }
  const [actual] = await table.getMetadata();
  const faults = optionFaults(name, actual);
  const changes: string[] = [];
  for (const { column, expected, found, fault } of differingColumns(contract, name, actual)) {
    const relaxes = found.replace("REQUIRED", "NULLABLE") === expected;
    if (relaxes || (!found && !expected.endsWith("REQUIRED")))
      changes.push(`${found ? "relax" : "add"} column ${name}.${column} ${expected}`);
    else faults.push(expected ? fault : `${fault}. Run in BigQuery, to drop it: ALTER TABLE ${name} DROP COLUMN ${column}`);
  }
  for (const part of ["timePartitioning", "clustering", "tableConstraints"] as const) {
    const [wanted, found] = [resource[part] ?? {}, actual[part] ?? {}] as [object, object];
    const fault = `table ${name}: expected ${part} ${JSON.stringify(wanted)} (${file}), found ${JSON.stringify(found)}`;
    // What the service adds itself, such as an expiry that is 0, is nobody's difference.
    if (!isDeepStrictEqual({ ...found, ...wanted }, found)) faults.push(`${fault}. To change it, create a new table and copy its rows`);
  }
  if (faults.length) return faults;
  const there = new Map<string | undefined, TableField>(actual.schema.fields.map((field: TableField) => [field.name, field]));
  const describes = (ours: TableField, theirs?: TableField) => theirs && ours.description && ours.description !== theirs.description;
  if (describes(resource, actual) || fields.some((field) => describes(field, there.get(field.name)))) changes.push(`describe ${name}`);
  // The API takes what is left out for none: policy tags, collation, default values and rounding modes are the table's own.
  const merged = fields.map((field) => ({ ...there.get(field.name), ...field }));
  const { description = actual.description } = resource;
  if (changes.length) await apply(changes.join(", "), () => table.setMetadata({ description, schema: { fields: merged } }));
  return [];
}
