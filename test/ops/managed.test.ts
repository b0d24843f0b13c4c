// A managed Postgres: no superuser, but the role that Amazon documents for RDS. From an empty database to a first run, a connector and a
// clean doctor. Needs the local stack (make up).
// Source: https://docs.aws.amazon.com/AmazonRDS/latest/UserGuide/Appendix.PostgreSQL.CommonDBATasks.Roles.rds_superuser.html
import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { test } from "node:test";
import postgres from "postgres";
import { sourceFiles } from "../data/source.ts";
import { createCluster } from "../lib/cluster.ts";
import { createSensors } from "../lib/sensors.ts";
import { root } from "../stack/env.ts";

/** What the provider has done before it hands the server over. rds_replication lets its members replicate; here nothing does. */
const provided = `
  create role rds_superuser; create role rds_replication;
  grant pg_monitor, pg_signal_backend, rds_replication to rds_superuser with admin option;
  create role master login password 'local-only' nosuperuser inherit createdb createrole noreplication;
  grant rds_superuser to master`;
const passwords = ["etl_reader", "etl_metadata", "etl_replicator"].map((role) => `alter role ${role} password 'local-only';`);

test("as RDS's master role: both files of roles, a first run, a connector, and doctor finds nothing", async () => {
  await using cluster = await createCluster({ wal_level: "logical" });
  await using sensors = await createSensors({ connector: false });
  const { shop } = sensors;
  const at = (username: string): string =>
    Object.assign(new URL(cluster.variables.SOURCE_DATABASE_URL), {
      username,
      password: "local-only",
      pathname: "/app",
    }).href;
  await cluster.admin.unsafe("drop database if exists app").catch(() => {});
  const dropped = ["etl_reader", "etl_metadata", "etl_replicator"].map((role) => `drop owned by ${role} cascade; drop role ${role};`);
  await cluster.admin.unsafe(`drop publication etl_sensors; drop schema etl; ${dropped.join(" ")} ${provided}`);
  await cluster.admin.unsafe("create database app owner master");

  const master = postgres(at("master"), { max: 1, fetch_types: false, onnotice: () => {} });
  for (const _ of ["once", "again"]) for (const file of sourceFiles) await master.unsafe(readFileSync(join(root, file), "utf8"));
  await master.unsafe(passwords.join(" "));
  const [powers] = await master`
    select count(*)::int as roles, bool_or(rolsuper or rolcreatedb or rolcreaterole or rolreplication or rolbypassrls) as powers,
      bool_or(pg_has_role('master', oid, 'usage')) as held from pg_roles where rolname in ('etl_reader', 'etl_metadata')`;
  assert.deepEqual({ ...powers }, { roles: 2, powers: false, held: false });
  await master`insert into orders (id) values (1), (2)`;

  const env = {
    SOURCE_DATABASE_URL: at("etl_reader"),
    ETL_DATABASE_URL: at("etl_metadata"),
    REPLICATION_DATABASE_URL: at("etl_replicator"),
  };
  await shop.succeed("scripts/ops/migrate.ts", env);
  assert.match((await shop.succeed("scripts/orders.ts", env)).stderr, /step=done rows=2 /);
  const lines = async (): Promise<string[]> => (await shop.run("scripts/ops/doctor.ts", env)).stdout.trim().split("\n");
  // The server's own part is missing still, and the connector: a member of rds_replication is no fault.
  const failed = (await lines()).filter((line) => line.startsWith("FAIL"));
  assert.match(failed[0] ?? "", /^FAIL {2}sensors: connector etl-\S+: it does not exist, or does not run/);
  assert.equal(failed.length, 1, failed.join("\n"));
  await cluster.admin`alter role etl_replicator replication`; // what Amazon's server does by the membership
  try {
    await shop.succeed("scripts/ops/connector.ts", env);
    assert.equal((await lines()).at(-1), "all is well");
  } finally {
    await fetch(new URL(`/connectors/etl-${shop.dataset}-sensor_readings`, shop.env.CONNECT_URL), { method: "DELETE" });
    await master.end();
  }
});
