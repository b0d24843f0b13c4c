/**
 * migrate: creates what the pipelines need from the committed files, where it is missing.
 *
 *   etl tables       sql/etl/*.sql, each applied once, in order of its number, in ETL_DATABASE_URL
 *   BigQuery tables  schemas/bigquery/*.json, in BIGQUERY_DATASET
 *   safe to re-run   yes: what is there already is left as it is
 *
 *   make migrate             do it
 *   make migrate DRY_RUN=1   say what would be done
 */
import { readdirSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { connectBigQuery } from "../../shared/bigquery.ts";
import { readEnv, root } from "../../shared/env.ts";
import { checkSession, connect } from "../../shared/postgres.ts";
import { log } from "../../shared/progress.ts";
import { main } from "../../shared/run.ts";
import { pipelines, readContract } from "../../shared/schema.ts";

await main(import.meta, async () => {
  const env = readEnv(
    "ETL_DATABASE_URL",
    "BIGQUERY_PROJECT",
    "BIGQUERY_DATASET",
    "BIGQUERY_LOCATION",
    "BIGQUERY_ENDPOINT",
    "DRY_RUN",
  );
  const would = env.DRY_RUN ? "would-apply" : "apply";

  // 1. The etl tables, under a lock: a second migrate waits, and then finds nothing to do.
  const etl = connect(env.ETL_DATABASE_URL, { application: "etl:migrate", timeoutSeconds: 300 });
  await checkSession("ETL_DATABASE_URL", etl);
  await etl.begin(async (sql) => {
    await sql`select pg_advisory_xact_lock(hashtextextended('etl:migrate', 0))`;
    const [schema] = await sql`select to_regclass('etl.migrations') as migrations, to_regnamespace('etl') as etl`;
    if (!schema?.etl)
      throw new Error("schema etl is not there. Run sql/roles.sql in that database as a superuser, then: make migrate");
    if (!schema.migrations && !env.DRY_RUN) {
      await sql`create table etl.migrations (file text primary key, applied_at timestamptz not null default now())`;
    }
    const applied = schema.migrations ? await sql<{ file: string }[]>`select file from etl.migrations` : [];
    for (const file of readdirSync(join(root, "sql/etl")).sort()) {
      if (applied.some((migration) => migration.file === file)) continue;
      log({ step: would, file: `sql/etl/${file}` });
      if (env.DRY_RUN) continue;
      await sql.unsafe(readFileSync(join(root, "sql/etl", file), "utf8"));
      await sql`insert into etl.migrations (file) values (${file})`;
    }
  });
  await etl.end();

  // 2. The dataset and the tables of BigQuery. Another migrate may create one at the same moment: that is as good.
  const dataset = connectBigQuery(env).dataset(env.BIGQUERY_DATASET);
  const create = async (
    what: string,
    exists: () => Promise<[boolean]>,
    make: () => Promise<unknown>,
  ): Promise<void> => {
    const [there] = await exists();
    if (there) return;
    log({ step: would, bigquery: what });
    if (env.DRY_RUN) return;
    await make().catch(async (error: Error) => {
      const [now] = await exists();
      if (!now) throw error;
    });
  };
  await create(
    `dataset ${env.BIGQUERY_DATASET}`,
    () => dataset.exists(),
    () => dataset.create({ location: env.BIGQUERY_LOCATION }),
  );
  for (const pipeline of pipelines()) {
    const { resource } = readContract(pipeline);
    const table = dataset.table(pipeline);
    await create(
      `table ${env.BIGQUERY_DATASET}.${pipeline}`,
      () => table.exists(),
      () => table.create(resource),
    );
  }
  log({ step: "done" });
});
