#!/usr/bin/env -S npx tsx
/**
 * doctor: checks a set-up before its first run, one line a check: `ok`, or `FAIL` with what to do. What a run checks first is
 * checked by the same code; it goes on past what fails, and exits 1 if anything did.
 *
 *   the source        its connection and role, which may write nothing; open transactions can be seen; track_activities; of each
 *                     pipeline its columns, the index on its cursor, and the trigger that keeps it
 *   the metadata      its connection, not through a transaction pooler; its tables are those of sql/etl, and may be written
 *   the destinations  BigQuery by dry runs, which need the permissions and do nothing; the bucket by an object put and deleted;
 *                     ClickHouse by an insert without rows
 *   sensors           wal_level, role, publication, slot; Kafka's topic and group; the connector
 *   the Pushgateway   takes a push
 *   safe to re-run    yes: what it puts (an object, a metric group, both of them named doctor) it deletes
 *
 *   make doctor                    every pipeline that has its variables
 *   make doctor PIPELINE=orders    what this one needs
 */
import { readdirSync } from "node:fs";
import { join } from "node:path";
import { setTimeout as delay } from "node:timers/promises";
import type { Sql } from "postgres";
import { type BigQueryEnv, bigqueryVariables, connectBigQuery } from "../../shared/bigquery/client.ts";
import { checkSource, readContract } from "../../shared/bigquery/contract.ts";
import { mergeStatement, openDestination } from "../../shared/bigquery/load.ts";
import {
  type Env,
  isSet,
  name as nameReader,
  readEnv,
  redact,
  required,
  root,
  UsageError,
  type Variables,
} from "../../shared/env.ts";
import { checkArchivable } from "../../shared/events/archive.ts";
import { bucketVariables, checkBucket, connectS3, put, removeObjects } from "../../shared/events/s3.ts";
import { main } from "../../shared/main.ts";
import { pushMetrics } from "../../shared/metrics.ts";
import { pipelines } from "../../shared/pipelines.ts";
import { newRunId, pipelineVariables } from "../../shared/run.ts";
import { kafkaVariables } from "../../shared/sensors/broker.ts";
import {
  type ClickHouseEnv,
  checkMigrations,
  clickhouseVariables,
  connectClickHouse,
  insertRowBinary,
  readingColumns,
} from "../../shared/sensors/clickhouse.ts";
import { isRunning, namesOf, sourceTable } from "../../shared/sensors/connector.ts";
import { checkReadings } from "../../shared/sensors/consumer.ts";
import { topicState } from "../../shared/sensors/epoch.ts";
import { connectKafka, withAdmin } from "../../shared/sensors/kafka.ts";
import { checkSession, connect, quote } from "../../shared/session.ts";
import { readSelect, type SchemaCheck } from "../../shared/source.ts";
import { readBound } from "../../shared/watermark.ts";
import { checkReplication, connectorVariables } from "./lib/kafka-connect.ts";

/** Prints the check's line. @returns whether it is ok. `work` returns what else is worth knowing, or throws what to do. */
type Check = (name: string, work: () => Promise<unknown>) => Promise<boolean>;

const { ETL_DATABASE_URL, SOURCE_DATABASE_URL, PUSHGATEWAY_URL } = pipelineVariables;
const viewsVariables = { ...bigqueryVariables, BIGQUERY_VIEWS_DATASET: required(nameReader) };
const { SENSORS_TOPIC } = kafkaVariables;
const captureVariables = { SOURCE_DATABASE_URL, ...connectorVariables, ...clickhouseVariables, SENSORS_TOPIC };

const session = { application: "etl:doctor", timeoutSeconds: 30 };
/** One that hangs, or asks again and again, must not keep the others from being said. */
const DEADLINE_SECONDS = 40;

await main(import.meta, async () => {
  const synced = pipelines();
  /** What only these pipelines need: a shop that has set none of it does not have them. */
  const own = {
    ...Object.fromEntries(synced.map((pipeline) => [pipeline, ["BIGQUERY_PROJECT", "BIGQUERY_DATASET"]])),
    views: ["BIGQUERY_PROJECT", "BIGQUERY_VIEWS_DATASET"],
    events: ["S3_BUCKET"],
    sensors: ["KAFKA_BROKERS", "CLICKHOUSE_URL", "CONNECT_URL", "REPLICATION_DATABASE_URL"],
  } as Record<string, string[]>;
  const asked = isSet("PIPELINE") ? readEnv({ PIPELINE: required(nameReader) }).PIPELINE : undefined;
  if (asked !== undefined && !Object.hasOwn(own, asked))
    throw new UsageError(`PIPELINE=${asked}: there is no such pipeline; there are: ${Object.keys(own).join(", ")}`);
  const checked = Object.keys(own).filter((name) => (asked === undefined ? own[name]?.some(isSet) : name === asked));
  const has = (...names: string[]): string[] => names.filter((name) => checked.includes(name));

  let failures = 0;
  const sections: Promise<string[]>[] = [];
  /** Sections go side by side, since what does not answer takes its time; each prints its lines together. */
  const section = <V extends Variables>(
    title: string,
    variables: V,
    work: (check: Check, env: Env<V>) => Promise<unknown>,
  ): void => {
    const lines: string[] = [];
    const check: Check = async (name, inner) => {
      const { ok, said } = await outcome(inner);
      if (!ok) failures += 1;
      lines.push(redact(`${ok ? "ok  " : "FAIL"}  ${title}: ${name}${said && `: ${said}`}`));
      return ok;
    };
    const done = Promise.try(() => work(check, readEnv(variables)));
    sections.push(done.catch((error) => check("variables", () => Promise.reject(error))).then(() => lines));
  };

  const tables = has(...synced, "events");
  section("etl", { ETL_DATABASE_URL }, checkMetadata);
  if (has(...synced, "events", "sensors").length)
    section("source", { SOURCE_DATABASE_URL }, (check, env) => checkSourceDatabase(check, env, tables));
  if (has(...synced).length)
    section("bigquery", bigqueryVariables, (check, env) => checkBigQuery(check, env, has(...synced)));
  if (has("views").length) section("views", viewsVariables, checkViews);
  if (has("events").length) section("s3", bucketVariables, checkS3);
  if (has("sensors").length) {
    section("sensors", captureVariables, checkCapture);
    section("kafka", kafkaVariables, checkKafka);
    section("clickhouse", clickhouseVariables, checkClickHouse);
  }
  section("pushgateway", { PUSHGATEWAY_URL }, checkPushgateway);

  for (const lines of sections) process.stdout.write((await lines).map((line) => `${line}\n`).join(""));
  for (const name of Object.keys(own).filter((name) => asked === undefined && !checked.includes(name)))
    process.stdout.write(`-     ${name}: not checked, since none of ${own[name]?.join(", ")} is set\n`);
  process.stdout.write(
    failures ? `${failures} checks failed. Fix the lines marked FAIL, then run: make doctor\n` : "all is well\n",
  );
  process.exit(failures ? 1 : 0); // a client may still be asking a server that is away
});

async function outcome(work: () => Promise<unknown>): Promise<{ ok: boolean; said: string }> {
  const late = delay(DEADLINE_SECONDS * 1000).then(() => {
    throw new Error(`no answer within ${DEADLINE_SECONDS} s. Is it reachable from here?`);
  });
  try {
    const said = await Promise.race([work(), late]);
    return { ok: true, said: typeof said === "string" ? said : "" };
  } catch (error) {
    const { message, code, name } = error as Error & { code?: string };
    return { ok: false, said: (message || code || name).replaceAll(/\s*\n\s*/g, "; ").replaceAll(":;", ":") };
  }
}

/** Opens a session of the variable, and says how it is encrypted: in clear text, passwords and rows can be read on the way. */
async function checkConnection(variable: string, sql: Sql, url: string): Promise<string> {
  await checkSession(variable, sql);
  const [row] = await sql<{ role: string; tls: boolean }[]>`
    select current_user as role, coalesce((select ssl from pg_stat_ssl where pid = pg_backend_pid()), false) as tls`;
  const mode = new URL(url).searchParams.get("sslmode") ?? "";
  const verified = /^verify-/.test(mode) ? "certificate checked" : "certificate not checked: sslmode=verify-full would";
  return `as ${row?.role}; ${row?.tls ? `TLS, ${verified}` : "in clear text: sslmode=verify-full in the URL would encrypt it"}`;
}

async function checkMetadata(check: Check, { ETL_DATABASE_URL: url }: { ETL_DATABASE_URL: string }): Promise<void> {
  const etl = connect(url, session);
  if (!(await check("connection", () => checkConnection("ETL_DATABASE_URL", etl, url)))) return;
  await check("one session is one connection to Postgres", () => checkNoPooler(etl, connect(url, session)));
  await check("tables are those of sql/etl", async () => {
    const [schema] = await etl`select to_regclass('etl.migrations') as migrations`;
    const applied = schema?.migrations ? await etl<{ file: string }[]>`select file from etl.migrations` : [];
    const missing = readdirSync(join(root, "sql/etl")).filter((name) => !applied.some(({ file }) => file === name));
    if (missing.length) throw new Error(`not applied: ${missing.sort().join(", ")}. Run: make migrate`);
  });
  await check("role may write them", async () => {
    const [row] = await etl<{ role: string; tables: string | null }[]>`
      select current_user as role, string_agg(oid::regclass::text, ', ' order by oid::regclass::text) as tables from pg_class
      where relnamespace = to_regnamespace('etl') and relkind = 'r'
        and not (has_table_privilege(oid, 'select') and has_table_privilege(oid, 'insert')
          and has_table_privilege(oid, 'update') and has_table_privilege(oid, 'delete'))`;
    const { role, tables } = row ?? {};
    if (tables)
      throw new Error(
        `${role} may not write ${tables}. Run as a superuser: grant select, insert, update, delete on ${tables} to ${role};`,
      );
  });
}

/**
 * A transaction pooler gives each statement whatever connection is free: two sessions that are open at once meet on one backend,
 * or one session on several. The lock of a run would then be held by nobody, or by somebody else.
 */
async function checkNoPooler(one: Sql, other: Sql): Promise<void> {
  const [mine, theirs] = [new Set<number>(), new Set<number>()];
  for (const sql of [one, other, other, one, one, one, other]) {
    // Without a name: a prepared statement would not be there on another connection.
    const [row] = await sql.unsafe<{ pid: number }[]>("select pg_backend_pid() as pid");
    (sql === one ? mine : theirs).add(row?.pid ?? 0);
  }
  if (mine.size > 1 || theirs.size > 1 || !mine.isDisjointFrom(theirs))
    throw new Error(
      "ETL_DATABASE_URL goes through a transaction pooler: two sessions met on one connection, so a run's lock would not be its own. Point it at Postgres itself, or at a pool in session mode",
    );
}

async function checkSourceDatabase(
  check: Check,
  { SOURCE_DATABASE_URL: url }: { SOURCE_DATABASE_URL: string },
  tables: string[],
): Promise<void> {
  const source = connect(url, { ...session, settings: { "etl.lag_seconds": "0" } });
  if (!(await check("connection", () => checkConnection("SOURCE_DATABASE_URL", source, url)))) return;
  await check("open transactions can be seen", async () => {
    const bound = await readBound(source);
    return bound.holder ?? "none holds a watermark";
  });
  await check("track_activities is on", () => checkTracked(source));
  await check("role can write nothing", () => checkReadOnly(source));
  for (const pipeline of tables) {
    const archived = pipeline === "events";
    const cursor = archived ? "created_at" : "updated_at";
    const of = { table: `public.${pipeline}`, cursor };
    await check(`${pipeline}: table and sql/${pipeline}.sql`, async () => {
      const from = { ...of, select: readSelect(pipeline) };
      const run: SchemaCheck = { pipeline, source, log: () => {} };
      if (archived) {
        const etl = connect(readEnv({ ETL_DATABASE_URL }).ETL_DATABASE_URL, session);
        await checkArchivable(Object.assign(run, { etl }), from);
      } else await checkSource(run, readContract(pipeline), from);
      return run.unknownColumns?.length ? `not synced: ${run.unknownColumns}` : "";
    });
    await check(`${pipeline}: index on ${cursor}`, () => checkIndex(source, of));
    await check(`${pipeline}: the database sets ${cursor}`, () => checkSetByDatabase(source, of, archived));
  }
}

/** safe_bound.sql refuses while a session without it is there; here those that would begin without it. */
async function checkTracked(source: Sql): Promise<void> {
  const [row] = await source<{ here: string; off: string[] }[]>`
    select current_setting('track_activities') as here, to_json(array(
      select case when setrole = 0 then format('alter database %I', datname)
                  else format('alter role %I', rolname) || coalesce(format(' in database %I', datname), '') end
      from pg_db_role_setting left join pg_roles r on r.oid = setrole left join pg_database d on d.oid = setdatabase
      where 'track_activities=off' = any(setconfig) and (setdatabase = 0 or datname = current_database()))) as off`;
  if (row?.off.length)
    throw new Error(
      `it is off for some sessions, whose open transactions no bound would see. Run as a superuser: ${row.off.map((who) => `${who} reset track_activities;`).join(" ")}`,
    );
  if (row?.here !== "on")
    throw new Error(
      "it is off for the server. Run as a superuser: alter system set track_activities = on; select pg_reload_conf();",
    );
}

/** What sql/roles.sql promises of the reading role: its sessions are not waited for, which is right only while it cannot write. */
async function checkReadOnly(source: Sql): Promise<void> {
  const [row] = await source<{ role: string; read_only: string; powers: string[] }[]>`
    with outside as (
      select oid, relkind, oid::regclass::text as name from pg_class
      where relnamespace not in (select oid from pg_namespace where nspname ~ '^pg_' or nspname = 'information_schema')
    )
    select current_user as role, current_setting('default_transaction_read_only') as read_only, to_json(array(
      select 'attribute ' || power from pg_roles, unnest(
        array[rolsuper, rolcreaterole, rolcreatedb, rolreplication, rolbypassrls],
        array['superuser', 'createrole', 'createdb', 'replication', 'bypassrls']) p (has, power)
      where rolname = current_user and has
      union all
      select 'member of ' || r.rolname from pg_roles r
      where not exists (select from pg_roles where rolname = current_user and rolsuper)
        and pg_has_role(current_user, oid, 'member') and rolname not in (current_user, 'pg_read_all_stats', 'pg_read_all_data', 'pg_monitor', 'pg_read_all_settings', 'pg_stat_scan_tables')
      union all
      select privilege || ' on ' || name from outside, unnest(array['insert', 'update', 'delete', 'truncate']) privilege
      where relkind in ('r', 'p', 'v', 'f') and (has_table_privilege(oid, privilege)
        or privilege in ('insert', 'update') and has_any_column_privilege(oid, privilege))
      union all
      select 'usage of sequence ' || name from outside
      where case when relkind = 'S' then has_sequence_privilege(oid, 'usage, update') end
      union all
      select 'create in schema ' || nspname from pg_namespace where has_schema_privilege(oid, 'create') and nspname !~ '^pg_'
      union all
      select 'create in database ' || datname from pg_database where datname = current_database() and has_database_privilege(oid, 'create')
    )) as powers`;
  const { role = "", read_only, powers = [] } = row ?? {};
  const some = powers.slice(0, 10).join(", ") + (powers.length > 10 ? ` and ${powers.length - 10} more` : "");
  if (powers.length)
    throw new Error(
      `${role} has ${some}. Revoke that, or use the role of sql/roles.sql: run that file as a superuser in the source database`,
    );
  if (read_only !== "on")
    throw new Error(
      `its transactions are not read-only to begin with. Run as a superuser: alter role ${quote(role)} set ` +
        `default_transaction_read_only = on;`,
    );
}

/** Without it each chunk reads the whole table. */
async function checkIndex(source: Sql, { table, cursor }: { table: string; cursor: string }): Promise<void> {
  const [index] = await source<{ valid: boolean; name: string }[]>`
    select indisvalid as valid, indexrelid::regclass::text as name from pg_index
    join pg_attribute on attrelid = indrelid and attnum = indkey[0]
    join pg_class i on i.oid = indexrelid join pg_am on pg_am.oid = i.relam
    where indrelid = to_regclass(${table}) and attname = ${cursor} and indpred is null and amname = 'btree'
    order by indisvalid desc limit 1`;
  const create = `create index concurrently on ${table} (${cursor});`;
  if (!index) throw new Error(`no index of ${table} begins with ${cursor}. Run: ${create}`);
  if (!index.valid) throw new Error(`${index.name} is not valid. Run: drop index ${index.name}; ${create}`);
}

/**
 * Rows that an application dates itself can be older than the watermark, and lost. What a trigger's function does cannot be known;
 * that it names the column can.
 */
async function checkSetByDatabase(
  source: Sql,
  { table, cursor }: { table: string; cursor: string },
  appendOnly: boolean,
): Promise<void> {
  // tgtype's bits, of pg_trigger.h: 1 row, 2 before, 4 insert, 16 update.
  const [found] = await source<{ inserts: boolean; updates: boolean; disabled: string | null; dated: boolean }[]>`
    select coalesce(bool_or(enabled and tgtype & 7 = 7), false) as inserts,
      coalesce(bool_or(enabled and tgtype & 19 = 19 and tgattr = ''::int2vector), false) as updates,
      min(tgname) filter (where not enabled) as disabled,
      exists (select from pg_attrdef join pg_attribute a on a.attrelid = adrelid and attnum = adnum
        where adrelid = to_regclass(${table}) and attname = ${cursor} and pg_get_expr(adbin, adrelid)
          ~* '[[:<:]](now|clock_timestamp|transaction_timestamp|statement_timestamp)[(][)]|current_timestamp') as dated
    from pg_trigger join pg_proc on pg_proc.oid = tgfoid, lateral (select tgenabled in ('O', 'A') as enabled) e
    where tgrelid = to_regclass(${table}) and not tgisinternal
      and (strpos(prosrc, ${cursor}) > 0 or strpos(encode(tgargs, 'escape'), ${cursor}) > 0)`;
  const { inserts, updates, disabled, dated } = found ?? {};
  if (appendOnly && !dated && !inserts)
    throw new Error(
      `${table}.${cursor} has no default of now(), and no trigger. Run as its owner: alter table ${table} alter ` +
        `${cursor} set default now();`,
    );
  if (appendOnly || (updates && (inserts || dated))) return;
  throw new Error(
    disabled
      ? `its trigger ${disabled} is disabled. Run as its owner: alter table ${table} enable trigger ${quote(disabled)};`
      : `${table} has no trigger that sets ${cursor} before each insert and update of a row. Create it as in ` +
          `test/data/schema.sql (set_updated_at)`,
  );
}

/** BigQuery looks at the permissions of a dry run as of the query itself. */
async function dryRun(env: BigQueryEnv, query: string): Promise<void> {
  const job = { query, dryRun: true, useLegacySql: false, location: env.BIGQUERY_LOCATION };
  await connectBigQuery(env)
    .createQueryJob(job)
    .catch(({ code, message }: Error & { code?: number }) => {
      const grant =
        "Grant the service account roles/bigquery.jobUser on the project and roles/bigquery.dataEditor on the dataset";
      throw new Error(`${message}. ${code === 403 ? grant : "Check BIGQUERY_PROJECT and the Google credentials"}`);
    });
}

async function checkBigQuery(check: Check, env: BigQueryEnv, synced: string[]): Promise<void> {
  for (const pipeline of synced) {
    const contract = readContract(pipeline);
    const there = async (): Promise<void> => void (await openDestination(env, contract, "updated_at"));
    if (!(await check(`${pipeline}: table is as ${contract.file} says`, there))) continue;
    const address = (table: string): string => `\`${env.BIGQUERY_PROJECT}.${env.BIGQUERY_DATASET}.${table}\``;
    const target = address(pipeline);
    await check(`${pipeline}: may be merged into (dry run)`, () =>
      dryRun(env, mergeStatement(contract, target, target, "updated_at")),
    );
    await check(`${pipeline}: staging tables may be made (dry run)`, () =>
      dryRun(env, `CREATE TABLE ${address(`${pipeline}_staging_doctor`)} AS SELECT * FROM ${target}`),
    );
  }
}

async function checkViews(check: Check, env: Env<typeof viewsVariables>): Promise<void> {
  const { BIGQUERY_PROJECT: project, BIGQUERY_VIEWS_DATASET: dataset } = env;
  await check("models may be published (dry run)", async () => {
    const [there] = await connectBigQuery(env).dataset(dataset).exists();
    if (!there) throw new Error(`dataset ${dataset} (BIGQUERY_VIEWS_DATASET) does not exist. Run: make migrate`);
    await dryRun(env, `CREATE TABLE \`${project}.${dataset}.doctor\` AS SELECT 1 AS one`);
  });
}

async function checkS3(check: Check, env: Env<typeof bucketVariables>): Promise<void> {
  const bucket = connectS3(env);
  if (!(await check("bucket", () => checkBucket(bucket)))) return;
  const key = `${bucket.prefix}events/doctor/${newRunId()}.json`;
  const putOne = (): Promise<unknown> => put(bucket, key, "{}\n", undefined, { by: "make doctor" });
  if (await check("an object may be put", putOne)) await check("and deleted", () => removeObjects(bucket, [key]));
}

async function checkCapture(check: Check, env: Env<typeof captureVariables>): Promise<void> {
  const { connector, slot } = namesOf(env);
  const { REPLICATION_DATABASE_URL: url } = env;
  const replication = connect(url, session);
  await check(
    "columns and replica identity",
    async () => checkReadings(env, await readingColumns(connectClickHouse(env)).catch(() => [])), // ClickHouse's own lines say why
  );
  if (await check("connection", () => checkConnection("REPLICATION_DATABASE_URL", replication, url))) {
    await check("wal_level, role and publication", () => checkReplication(env));
    await check("role may read the table, and write the heartbeat", async () => {
      const [row] = await replication<{ role: string; may: boolean }[]>`
        select current_user as role, has_table_privilege(${sourceTable}, 'select')
          and has_table_privilege('public.etl_heartbeat', 'insert') and has_table_privilege('public.etl_heartbeat', 'update') as may`;
      if (!row?.may) throw new Error(`${row?.role} may not. Run sql/replication.sql as a superuser`);
    });
    await check(`slot ${slot}`, () => checkSlot(replication, slot));
  }
  await check(`connector ${connector}`, async () => {
    if (!(await isRunning(env))) throw new Error("it is not there, or does not run. Run: make connector (says why)");
  });
}

async function checkSlot(replication: Sql, slot: string): Promise<string> {
  const [row] = await replication<{ status: string | null; elsewhere: string | null; free: number; keeps: string }[]>`
    select s.wal_status as status, case when s.database <> current_database() then s.database end as elsewhere,
      current_setting('max_replication_slots')::int - (select count(*)::int from pg_replication_slots) as free,
      current_setting('max_slot_wal_keep_size') as keeps
    from (select) one left join pg_replication_slots s on slot_name = ${slot}`;
  const { status, elsewhere, free = 0, keeps } = row ?? {};
  if (elsewhere)
    throw new Error(`it is of database ${elsewhere}. Choose another prefix in SENSORS_TOPIC, then: make connector`);
  if (status === "lost") throw new Error("it is lost, and with it the changes since. Run: make resnapshot");
  if (!status && free < 1)
    throw new Error(
      "it is not there, and the server has none free. Raise max_replication_slots, and restart the server",
    );
  const unlimited = keeps === "-1" ? "; max_slot_wal_keep_size is not set: it may fill the source's disk" : "";
  return `${status ? `its WAL is ${status}` : "not there yet: make connector makes it"}${unlimited}`;
}

async function checkKafka(check: Check, env: Env<typeof kafkaVariables>): Promise<void> {
  const { SENSORS_TOPIC: topic, SENSORS_GROUP: group } = env;
  const broker = connectKafka(env, "etl-doctor");
  if (!(await check("connection", () => withAdmin(broker, env, (admin) => admin.listTopics())))) return;
  await check(`topic ${topic} and group ${group}`, async () => {
    const asked = withAdmin(broker, env, (admin) => topicState(admin, topic, group));
    const partitions = await asked.catch((error: Error) => {
      if (error instanceof UsageError) throw error;
      throw new Error(`${error.message}. KAFKA_USERNAME needs READ on topic and group`);
    });
    return `${partitions.length} partitions, lag ${partitions.reduce((sum, { lag }) => sum + lag, 0)}`;
  });
}

async function checkClickHouse(check: Check, env: ClickHouseEnv): Promise<void> {
  const [server, client] = [connectClickHouse(env, "default"), connectClickHouse(env)];
  const connection = async (): Promise<void> => {
    const answer = await server.query({ query: "SELECT 1" }).catch((error: Error) => {
      const { host } = new URL(env.CLICKHOUSE_URL);
      throw new Error(
        `ClickHouse at ${host} (CLICKHOUSE_URL): ${error.message.trim()} Check CLICKHOUSE_USER and CLICKHOUSE_PASSWORD; is it running?`,
      );
    });
    await answer.text();
  };
  if (!(await check("connection", connection))) return;
  const migrations = (): Promise<void> => checkMigrations(client, env.CLICKHOUSE_DATABASE);
  if (!(await check("the files of schemas/clickhouse are applied", migrations))) return;
  await check("rows may be inserted", () =>
    insertRowBinary(client, "sensor_landing", Buffer.alloc(0), AbortSignal.timeout(30_000)),
  );
}

async function checkPushgateway(check: Check, { PUSHGATEWAY_URL: url }: { PUSHGATEWAY_URL: string }): Promise<void> {
  await check("takes a push", async () => {
    try {
      await pushMetrics(url, "doctor", {});
      const signal = AbortSignal.timeout(5000);
      await fetch(new URL("/metrics/job/etl/pipeline/doctor", url), { method: "DELETE", signal });
    } catch (error) {
      const { message, cause } = error as Error & { cause?: Error };
      const why = [message, cause?.message].filter(Boolean).join(": ");
      throw new Error(`${new URL(url).host} (PUSHGATEWAY_URL): ${why}. Is it running? For the local stack: make up`);
    }
  });
}
