// make doctor: each check is broken for real, and says so in its line; the others go on. Needs the local stack (make up).
import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { after, before, suite, test } from "node:test";
import postgres from "postgres";
import { listObjects } from "../../shared/events/s3.ts";
import { createCluster } from "../lib/cluster.ts";
import { answer, createProxy } from "../lib/faults.ts";
import { startPgbouncer } from "../lib/pgbouncer.ts";
import { createS3Proxy, refuse, s3Steps } from "../lib/s3.ts";
import { scratchCopy } from "../lib/scratch.ts";
import { createSensors, type Sensors } from "../lib/sensors.ts";
import { createShop, type Shop, until } from "../lib/shop.ts";
import { type Env, root } from "../stack/env.ts";

const doctor = "scripts/ops/doctor.ts";
const scratch = scratchCopy(["views"]);
let sensors: Sensors;
let shop: Shop;
before(async () => {
  sensors = await createSensors({ folder: scratch.folder });
  shop = sensors.shop;
});
after(async () => {
  await sensors?.[Symbol.asyncDispose]();
  scratch[Symbol.dispose]();
});

/** Runs it; of its lines, each `ok` or `FAIL`, those that fail. */
async function run(PIPELINE: string | undefined, variables: Env = {}): Promise<{ failed: string[]; lines: string[] }> {
  const { code, stdout, stderr } = await shop.run(doctor, { PIPELINE, ENV_FILE: undefined, ...variables });
  const lines = stdout.trimEnd().split("\n");
  for (const line of lines.slice(0, -1)) assert.match(line, /^(ok {4}|FAIL {2}|- {5})\S/);
  const failed = lines.filter((line) => line.startsWith("FAIL"));
  const end = failed.length ? `${failed.length} checks failed. Fix the lines marked FAIL, then run: make doctor` : "all is well";
  assert.equal(lines.at(-1), end, stderr);
  assert.equal(code, failed.length ? 1 : 0);
  assert.doesNotMatch(stdout, /^\s+at |undefined|\[object/m);
  return { failed, lines };
}

/** These lines fail, in this order, and no other. */
async function assertFails(pipeline: string | undefined, variables: Env, ...expected: RegExp[]): Promise<void> {
  const { failed } = await run(pipeline, variables);
  assert.equal(failed.length, expected.length, failed.join("\n"));
  for (const [index, line] of failed.entries()) assert.match(line, expected[index] as RegExp);
}

const at = (variable: string, change: Partial<URL>): Env => ({
  [variable]: Object.assign(new URL(shop.env[variable] ?? ""), change).href,
});

test("a set-up that is well: every line is ok, exit 0, and nothing of it is left", async () => {
  const { failed, lines } = await run(undefined);
  assert.deepEqual(failed, []);
  const sections = new Set(lines.slice(0, -1).map((line) => /^ok {4}(\w+): /.exec(line)?.[1]));
  const all = ["etl", "source", "bigquery", "views", "s3", "sensors", "pushgateway"];
  assert.deepEqual([...sections], all);
  assert.deepEqual(await shop.stagingTables(), []);
  const groups = await (await fetch(`${shop.env.PUSHGATEWAY_URL}/metrics`)).text();
  assert.ok(!groups.includes('pipeline="doctor"'));
  assert.deepEqual(await Array.fromAsync(listObjects(shop.bucket, shop.bucket.prefix)), []);
});

test("PIPELINE= checks what that one needs, and no more; one that does not exist is misuse", async () => {
  const sectionsOf = async (pipeline: string): Promise<string[]> => {
    const { lines } = await run(pipeline);
    return [...new Set(lines.slice(0, -1).map((line) => line.slice(6).replace(/:.*/, "")))];
  };
  const [orders, views, events, readings] = await Promise.all(["orders", "views", "events", "sensors"].map(sectionsOf));
  assert.deepEqual(orders, ["etl", "source", "bigquery", "pushgateway"]);
  assert.deepEqual(views, ["etl", "views", "pushgateway"]);
  assert.deepEqual(events, ["etl", "source", "s3", "pushgateway"]);
  assert.deepEqual(readings, ["etl", "source", "sensors", "pushgateway"]);
  const { lines } = await run("users");
  assert.ok(lines.some((line) => line.includes("users:")) && !lines.some((line) => line.includes("orders")));
  await shop.refused(doctor, 2, /PIPELINE must be one of orders, users, views, events, sensors\./, { PIPELINE: "toString" });
});

const ofSensors = /^(KAFKA|CLICKHOUSE|SENSORS|CONNECT|REPLICATION)_/;
const without = (pattern: RegExp): Env =>
  Object.fromEntries(
    Object.keys(shop.env)
      .filter((name) => pattern.test(name))
      .map((name) => [name, undefined]),
  );

test("a shop without sensors, or without an archive, is not told to have them; half of one is, and variables that are malformed", async () => {
  const { failed, lines } = await run(undefined, without(ofSensors));
  assert.deepEqual(failed, []);
  assert.ok(!lines.some((line) => /^\S+ +sensors: \w+ok/.test(line)));
  assert.match(lines.join("\n"), /^- {5}sensors: not checked, since none of KAFKA_BROKERS, .* is set$/m);
  await assertFails(undefined, { ...without(ofSensors), S3_BUCKET: undefined });
  await assertFails(
    undefined,
    {
      ...{ ...without(ofSensors), CLICKHOUSE_URL: shop.env.CLICKHOUSE_URL, S3_BUCKET: undefined },
      ...{ SOURCE_DATABASE_URL: "mysql://u:HUSH@db/shop", BIGQUERY_LOCATION: undefined },
    },
    /^FAIL {2}source: variables: .*SOURCE_DATABASE_URL is not postgres:\/\/USER:/,
    /^FAIL {2}bigquery: variables: .*BIGQUERY_LOCATION is missing/,
    /^FAIL {2}views: variables: .*BIGQUERY_LOCATION is missing/,
    new RegExp(
      "sensors: variables: (?=.*SOURCE_DATABASE_URL is not postgres)(?=.*CONNECT_URL is missing)(?=.*REPLICATION_DATABASE_URL is missing)" +
        "(?=.*SENSORS_TOPIC is missing)(?=.*KAFKA_BROKERS is missing\\. .* Example: KAFKA_BROKERS=).*CLICKHOUSE_DATABASE is missing",
    ),
  );
});

/** A trigger that keeps updated_at, or nearly. */
const trigger = (when: string, table = "orders", does = "set_updated_at"): string =>
  `create or replace trigger set_updated_at before ${when} on ${table} for each row execute function ${does}()`;

suite("on servers of their own, or none, at the same time", { concurrency: true }, () => {
  test("what does not answer is named by its variable, and the others are checked all the same", async () => {
    const nowhere = "http://127.0.0.1:1";
    await assertFails(
      undefined,
      {
        ...at("ETL_DATABASE_URL", { password: "wrong" }),
        ...at("SOURCE_DATABASE_URL", { port: "1" }),
        BIGQUERY_ENDPOINT: nowhere,
        S3_ENDPOINT: nowhere,
        ...at("REPLICATION_DATABASE_URL", { pathname: "/nowhere" }),
        CONNECT_URL: nowhere,
        KAFKA_BROKERS: "127.0.0.1:1",
        CLICKHOUSE_URL: nowhere,
        PUSHGATEWAY_URL: nowhere,
      },
      /etl: connection: cannot connect to ETL_DATABASE_URL .*password authentication failed/,
      /source: connection: cannot connect to SOURCE_DATABASE_URL \(host 127\.0\.0\.1, port 1, .*ECONNREFUSED 127\.0\.0\.1:1\. /,
      /bigquery: orders: .*ECONNREFUSED.*Check BIGQUERY_ENDPOINT/,
      /bigquery: users: .*ECONNREFUSED.*Check BIGQUERY_ENDPOINT/,
      /views: models may be published .*ECONNREFUSED/,
      /s3: an object .*ECONNREFUSED/,
      /sensors: connection: cannot connect to REPLICATION_DATABASE_URL .*database \S+ does not exist. Are these right/,
      /sensors: Debezium's version: 127\.0\.0\.1:1 \(CONNECT_URL\) does not answer: /,
      /sensors: connector etl-.*: 127\.0\.0\.1:1 \(CONNECT_URL\) does not answer: /,
      /sensors: topic .*: no broker of KAFKA_BROKERS \(127\.0\.0\.1:1\) answers/,
      /sensors: ClickHouse's tables, .*: ClickHouse at 127\.0\.0\.1:1 \(CLICKHOUSE_URL\): .*ECONNREFUSED/,
      /pushgateway: takes a push: 127\.0\.0\.1:1 \(PUSHGATEWAY_URL\) does not answer: /,
    );
  });

  test("metadata, roles, settings, columns, indexes and triggers that are not as a run needs them: a line each, with what to run", async () => {
    await using broken = await createShop();
    const { admin, dataset } = broken;
    const there = { ...broken.env, ...without(ofSensors), ENV_FILE: undefined };
    await admin.unsafe(`
    update etl.migrations set file = 'kept' where file = '003_topics.sql';
    revoke insert on etl.runs from etl_metadata;
    grant delete on users to etl_reader; grant update (status) on orders to etl_reader; grant usage on sequence events_id_seq to etl_reader;
    grant create on schema public to etl_reader; grant create on database ${dataset} to etl_reader;
    alter role etl_metadata in database ${dataset} set track_activities = off; alter database ${dataset} set track_activities = off;
    alter table orders alter user_id type text; alter table events alter user_id type text;
    drop index orders_updated_at; create index orders_updated_at on orders (updated_at) where id > 0;
    drop index events_created_at; create index events_created_at on events (id, created_at);
    update pg_index set indisvalid = false where indexrelid = 'users_updated_at'::regclass;
    ${trigger("insert")}; ${trigger("insert or update", "users", "suppress_redundant_updates_trigger")};
    alter table events alter created_at drop default`);
    await assertFails(
      undefined,
      there,
      /etl: tables are those of sql\/etl: not applied: 003_topics\.sql\. Run: make migrate$/,
      /etl: role may write them: etl_metadata may not write etl\.runs\. Run as an administrator: grant .* on etl\.runs to etl_metadata;$/,
      /source: open transactions can be seen: .*track_activities/,
      /source: orders: table .* column public\.orders\.user_id: expected INTEGER .* found text/,
      /source: events: table .* column public\.events\.user_id: expected bigint .* found text/,
      /source: events: index on created_at: no index/,
      /source: events: the database sets created_at: .* alter created_at set default now\(\);$/,
      /source: orders: index on updated_at: no index .* Run: create index concurrently on public\.orders \(updated_at\);$/,
      /source: orders: the database sets updated_at: public\.orders has no trigger that sets updated_at/,
      new RegExp(
        "etl_reader has (?=.*delete on users)(?=.*update on orders)(?=.*usage of sequence events_id_seq)(?=.*create in schema public)" +
          `.*create in database ${dataset}\\. Revoke that`,
      ),
      new RegExp(
        "source: track_activities is on: .*Run as an administrator: " +
          `(?=.*alter role etl_metadata in database ${dataset} reset track_activities;).*alter database ${dataset} reset track_activities;`,
      ),
      /source: users: index on updated_at: users_updated_at is not valid\. Run: drop index users_updated_at; create index/,
      /source: users: the database sets updated_at: public\.users has no trigger that sets updated_at/,
    );
  });

  test("a slot that is another database's, one that is lost, none that is free; wal_level", async () => {
    const small = { max_slot_wal_keep_size: "1MB", max_replication_slots: "1", min_wal_size: "32MB", max_wal_size: "32MB" };
    await using cluster = await createCluster(small);
    const { admin } = cluster;
    // Connect knows how far it was, at the shop's own source; of one that is away that is not known.
    const another = /connector .*: its database\.port, database\.dbname is not what .* Run: make connector/;
    await assertFails("sensors", cluster.variables, /slot \w+: it is gone, and with it the changes since\. Run: make resnapshot$/, another);
    const away = [/sensors: Debezium's version: /, /sensors: connector /];
    const variables = { ...cluster.variables, CONNECT_URL: "http://127.0.0.1:1" };
    const ok = async (says: RegExp) => assert.match((await run("sensors", variables)).lines.join("\n"), says);
    const slot = `etl_${shop.dataset}`;
    await ok(/^ok {4}sensors: slot \w+: it does not exist yet: make connector creates it$/m);
    const { host } = new URL(variables.SOURCE_DATABASE_URL);
    const { STACK_ADMIN_DATABASE_URL: url = "" } = at("STACK_ADMIN_DATABASE_URL", { host, pathname: "/postgres" });
    const other = postgres(url, { max: 1, fetch_types: false });
    await other`select pg_create_logical_replication_slot(${slot}, 'pgoutput')`;
    await assertFails("sensors", variables, /slot \w+: it is of database postgres\. Choose another prefix in SENSORS_TOPIC/, ...away);
    await other`select pg_drop_replication_slot(${slot})`;
    await other.end();
    await admin`select pg_create_logical_replication_slot('somebodys', 'pgoutput')`;
    const none = /sensors: slot \w+: it does not exist, and the server has no free replication slot\. Raise max_replication_slots/;
    await assertFails("sensors", variables, none, ...away);
    await admin`select pg_drop_replication_slot('somebodys')`;
    await admin`select pg_create_logical_replication_slot(${slot}, 'pgoutput')`;
    await ok(/^ok {4}sensors: slot \w+: its WAL is reserved; a failover to a standby loses it: see slot\.failover/m);
    for (let n = 0; n < 4; n++) await admin`select pg_logical_emit_message(false, 'x', repeat('x', 100)), pg_switch_wal()`;
    await admin`checkpoint`;
    await assertFails(
      "sensors",
      variables,
      /sensors: slot \w+: it is lost, and with it the changes since\. Run: make resnapshot$/,
      ...away,
    );
    await using replica = await createCluster({ wal_level: "replica" });
    const level =
      /sensors: wal_level, role and publication: .*wal_level is replica: alter system set wal_level = logical; and restart the server/;
    await assertFails("sensors", { ...replica.variables, CONNECT_URL: variables.CONNECT_URL }, level, ...away);
  });
});

test("triggers and defaults that round the cursor, or leave updates out: doctor's own statement repairs each", async () => {
  await using broken = await createShop();
  const env = { ...broken.env, ...without(ofSensors), ENV_FILE: undefined };
  await broken.admin.unsafe(`create function rounded() returns trigger language plpgsql as
      'begin new.status := date_trunc(''day'', now()); NEW."updated_at" = now()::timestamptz(3); return new; end';
    create trigger zero before update on orders for each row execute function rounded(); alter table events alter created_at set default
      current_timestamp(0);
    ${trigger("update", "users").replace("for each row", "$& when (old.age_band is distinct from new.age_band)")};
    alter table users alter updated_at set default current_timestamp`);
  const faults = [
    /source: events: the database sets created_at: .* has no default of now\(\)/,
    /source: orders: the database sets updated_at: .* to the microsecond.* Run as its owner: drop trigger zero on public\.orders; create /,
    /source: users: the database sets updated_at: .* before each insert and update/,
  ];
  await assertFails(undefined, env, ...faults);
  for (const line of (await run(undefined, env)).failed) await broken.admin.unsafe(line.replace(/^.*? Run as its owner: /, ""));
  await assertFails(undefined, env);
  await broken.admin.unsafe(trigger("update", "users").replace("for each row", "$& when (old.* is distinct from new.*)"));
  await broken.admin.unsafe("alter table users alter updated_at set default now(); alter table events rename to aside");
  await assertFails(undefined, env, /source: events: table .* there is no such table/); // and every other line
});

test("a source that Debezium cannot read: table, publication and heartbeat, all at once", async () => {
  const { admin } = shop;
  await admin.unsafe(`alter table sensor_readings replica identity default; revoke update on etl_heartbeat from etl_replicator;
    alter publication etl_sensors drop table sensor_readings`);
  await assertFails(
    "sensors",
    {},
    /sensors: wal_level, role and publication: .*role etl_replicator may not update table public\.etl_heartbeat; .*publication etl_sensors does not exist, or lacks public\.sensor_readings; Run sql\/replication\.sql/,
    /sensors: ClickHouse's tables, .* replica identity full;/,
  );
  const repair = () => admin.unsafe(readFileSync(join(root, "sql/replication.sql"), "utf8")).simple();
  await repair();
  for (const change of ["set (publish = 'insert, update')", "set table etl_heartbeat, sensor_readings where (id > 0)"]) {
    await admin.unsafe(`alter publication etl_sensors ${change}`);
    await assertFails("sensors", {}, /publication etl_sensors leaves changes out: .*; Run sql\/replication\.sql/);
    await repair();
  }
  assert.deepEqual((await run("sensors")).failed, []);
});

test("a connector that somebody changed; an epoch that is not the topic's; a gap in the flow", async () => {
  const { SENSORS_TOPIC: topic = "", CLICKHOUSE_DATABASE: database = "", CONNECT_URL } = shop.env;
  const url = `${CONNECT_URL}/connectors/etl-${database}-sensor_readings/config`;
  const config = (await fetch(url).then((answer) => answer.json())) as object;
  const body = JSON.stringify({ ...config, "skipped.operations": "d", "column.exclude.list": "public.sensor_readings.value" });
  const put = { method: "PUT", headers: { "content-type": "application/json" }, body };
  await until(
    "it is put, and runs",
    async () => (await fetch(url, put)).ok && (await run("sensors")).lines.join().includes("its skipped.op"),
  );
  await assertFails("sensors", {}, /its skipped\.operations, column\.exclude\.list is not what .* say\. Run: make connector$/);
  await sensors.connector();
  await shop.admin`insert into etl.topics (topic, epoch, database, canary_gap) values (${topic}, 1, ${database}, 'some never came')`;
  await assertFails("sensors", {}, /sensors: topic .* has 3 partitions, and had 0 when epoch 1 began\. .*run: make resnapshot/);
  await shop.admin`insert into etl.topic_offsets (topic, partition, next_offset) select ${topic}, i, 0 from generate_series(0, 2) i`;
  await assertFails("sensors", {}, /sensors: topic .*some never came\. Run: make verify PIPELINE=sensors$/);
  await shop.admin`delete from etl.topic_offsets`;
  await shop.admin`delete from etl.topics`;
  assert.deepEqual((await run("sensors")).failed, []);
});

test("a role with powers, in another role, and without pg_read_all_stats", async () => {
  const role = `${shop.dataset}_other`;
  await shop.admin.unsafe(`create role ${role} login password 'local-only' createdb; grant pg_write_all_data to ${role};
    alter role ${role} set default_transaction_read_only = on; grant select on orders to ${role}`);
  try {
    await assertFails(
      "orders",
      at("SOURCE_DATABASE_URL", { username: role, password: "local-only" }),
      /source: open transactions can be seen: .*Run as an administrator: grant pg_monitor to test_/,
      /source: role can write nothing: \w+ has attribute createdb, member of pg_write_all_data, insert on .* and \d+ more\./,
    );
  } finally {
    await shop.admin.unsafe(`drop owned by ${role}; drop role ${role}`);
  }
});

test("a session whose transactions cannot be seen, a role that may begin to write, a trigger that is disabled", async () => {
  const hidden = shop.connect("hidden");
  await hidden`set track_activities = off`;
  const readOnly = `alter role etl_reader in database ${shop.dataset}`;
  await shop.admin.unsafe(`${readOnly} set default_transaction_read_only = off; alter table users disable trigger set_updated_at`);
  await assertFails(
    "users",
    {},
    /source: open transactions can be seen: .*application "hidden".*reset track_activities/,
    /not read-only to begin with\. Run as an administrator: alter role etl_reader set default_transaction_read_only = on;$/,
    /its trigger set_updated_at is disabled\. Run as its owner: alter table public\.users enable trigger set_updated_at;$/,
  );
  await shop.admin.unsafe(`${readOnly} reset default_transaction_read_only; alter table users enable trigger set_updated_at`);
  await hidden.end();
});

// What a transaction pooler has to be told to ignore before it takes the sessions at all.
const ignored = [
  "extra_float_digits, row_security, statement_timeout, lock_timeout, idle_in_transaction_session_timeout, IntervalStyle",
  "bytea_output, tcp_keepalives_idle, tcp_keepalives_interval, client_connection_check_interval, search_path, tcp_user_timeout",
  "default_transaction_read_only, idle_session_timeout",
].join(", ");
test("through PgBouncer: the metadata refused by transaction, and where it does not take the settings, as the source; fine by session", async () => {
  const through = async (settings: Record<string, string>, ...says: RegExp[]): Promise<void> => {
    await using pooler = await startPgbouncer(shop.env.ETL_DATABASE_URL ?? "", settings);
    await assertFails("views", { ETL_DATABASE_URL: pooler.url }, ...says);
  };
  const met = /etl: one session is one connection to Postgres: ETL_DATABASE_URL goes through a transaction pooler/;
  await through({ pool_mode: "transaction", ignore_startup_parameters: ignored }, met);
  await through(
    { pool_mode: "transaction" },
    /etl: connection: .*unsupported startup parameter: .* a pooler, such as PgBouncer\? Point it at Postgres itself/,
  );
  await through({ pool_mode: "session", ignore_startup_parameters: ignored });
  const settings = { ignore_startup_parameters: `${ignored}, etl.lag_seconds, etl.tables` };
  await using pooler = await startPgbouncer(shop.env.SOURCE_DATABASE_URL ?? "", settings);
  const dropped =
    /source: open transactions can be seen: .*"etl\.lag_seconds"\. .* a pooler, such as PgBouncer\? Point it at Postgres itself$/;
  await assertFails("orders", { SOURCE_DATABASE_URL: pooler.url }, dropped);
});

test("BigQuery: another table, a dataset that is not there, and permissions that a dry run has not", async () => {
  const rest = { ...without(ofSensors), S3_BUCKET: undefined };
  await assertFails(
    undefined,
    { ...rest, BIGQUERY_DATASET: `${shop.dataset}_none`, BIGQUERY_VIEWS_DATASET: `${shop.dataset}_none` },
    /bigquery: orders: table is as .* does not exist\. Run: make migrate\. If it had rows/,
    /bigquery: users: table is as .* does not exist\. Run: make migrate\. If it had rows/,
    /views: models .*_none \(BIGQUERY_VIEWS_DATASET\) does not exist\. Run: make migrate$/,
  );
  await using proxy = await createProxy(shop.env.BIGQUERY_ENDPOINT);
  proxy.fault(/^POST .+\/jobs$/, answer(403, { reason: "accessDenied" }));
  const grant =
    "answered 403 by the test\\. Check BIGQUERY_PROJECT, its billing account, .* roles \\(bigquery\\.jobUser, bigquery\\.dataEditor\\)";
  const staging = "table is as .* \\(dry run\\)";
  await assertFails(
    undefined,
    { ...rest, BIGQUERY_ENDPOINT: proxy.url },
    new RegExp(`bigquery: orders: ${staging}: ${grant}`),
    new RegExp(`bigquery: users: ${staging}: ${grant}`),
    new RegExp(`views: models may be published \\(dry run\\): ${grant}`),
  );
  {
    using _ = scratch.edit("sql/users.sql", (sql) => sql.replace("from public.users", "from other.users"));
    await shop.admin.unsafe(
      "create schema other; create table other.users as select * from users; grant usage on schema other to etl_reader; grant select on other.users to etl_reader",
    );
    await assertFails(
      "users",
      {},
      /updated_at: expected a column of this table, since rows are found by it, found something else in the SELECT/,
    );
    await shop.admin.unsafe("drop schema other cascade");
  }
});

test("S3: another bucket, a wrong key, an object that may not be deleted", async () => {
  await assertFails(
    "events",
    { S3_BUCKET: "nowhere-at-all" },
    /s3: an object .*: bucket nowhere-at-all \(S3_BUCKET\) does not exist\. Run: make migrate$/,
  );
  await assertFails(
    "events",
    { AWS_SECRET_ACCESS_KEY: "wrong" },
    /s3: an object .*S3_BUCKET may not be used: \S+ SignatureDoesNotMatch .*Check AWS_ACCESS_KEY_ID/,
  );
  await using proxy = await createS3Proxy(shop.env.S3_ENDPOINT);
  proxy.fault(
    /^PUT /,
    async ({ send, response }) => {
      (await send()).resume();
      response.end(); // also where If-None-Match refused it
    },
    2,
  );
  await assertFails("events", { S3_ENDPOINT: proxy.url }, /s3: an object may be put and deleted: the server ignores If-None-Match/);
  proxy.fault(s3Steps.deleteObjects, refuse(403, "AccessDenied"));
  await assertFails(
    "events",
    { S3_ENDPOINT: proxy.url },
    /s3: an object may be put and deleted: s3:\/\/archive\/test_\w+\/events\/doctor\/.*: AccessDenied 403/,
  );
});

test("ClickHouse: a wrong password, a file that was not applied, a view that is gone, an insert that is refused", async () => {
  await assertFails(
    "sensors",
    { CLICKHOUSE_PASSWORD: "wrong" },
    /sensors: ClickHouse's tables, .*Authentication failed.* Check CLICKHOUSE_USER and CLICKHOUSE_PASSWORD/,
  );
  await assertFails(
    "sensors",
    { CLICKHOUSE_DATABASE: "nowhere" },
    /sensors: ClickHouse's tables, .*000_migrations\.sql and \d more files were not applied to .* nowhere \(CLICKHOUSE_DATABASE\)\. Run: make migrate$/,
  );
  await shop.clickhouse.command({ query: "DROP VIEW sensor_dead_letters_view" });
  await assertFails(
    "sensors",
    {},
    /sensors: ClickHouse's tables, .* has lost sensor_dead_letters_view, .* Run there: DROP TABLE etl_migrations, then: make migrate/,
  );
  await shop.clickhouse.command({ query: "DROP TABLE etl_migrations" });
  await shop.succeed("scripts/ops/migrate.ts");
  await using proxy = await createProxy(shop.env.CLICKHOUSE_URL);
  proxy.fault(/^POST/, async ({ request, response, send, reply }) => {
    if (!request.url?.includes("INSERT")) return reply(await send());
    request.resume();
    const message =
      "Code: 497. DB::Exception: etl: Not enough privileges. To execute this query, it's necessary to have the grant INSERT. (ACCESS_DENIED)";
    response.writeHead(403, { "x-clickhouse-exception-code": "497" }).end(message);
  });
  await assertFails("sensors", { CLICKHOUSE_URL: proxy.url }, /sensors: ClickHouse's tables, .*Not enough privileges/);
});

test("a topic that is not there, a connector that is gone", async () => {
  await assertFails(
    "sensors",
    { SENSORS_TOPIC: `${shop.dataset}_other.public.sensor_readings` },
    /sensors: connector etl-\w+-sensor_readings: it does not exist, or does not run\. Run: make connector/,
    /sensors: topic .*: Kafka has no topic .*\. Run: make connector$/,
  );
});
