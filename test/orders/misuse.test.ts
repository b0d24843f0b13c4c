// The upsert, and what a second pair of eyes broke once: each of these lost, doubled or hung something, or said nothing useful.
import assert from "node:assert/strict";
import { after, before, test } from "node:test";
import { scratchCopy } from "../lib/scratch.ts";
import { createShop, type Shop, stepsOfPipeline, until } from "../lib/shop.ts";

const scratch = scratchCopy(["test"]);
after(() => scratch[Symbol.dispose]());

stepsOfPipeline((pipeline) => {
  const script = `scripts/${pipeline}.ts`;
  let shop: Shop;
  before(async () => {
    shop = await createShop({ pipeline, folder: scratch.folder, pushgateway: true });
    await shop.insertRows(1, 3);
    await shop.succeed(script);
  });
  after(() => shop?.[Symbol.asyncDispose]());

  const assertSynced = async (): Promise<void> => {
    await shop.succeed(script);
    assert.deepEqual(await shop.destinationRows(), await shop.sourceRows());
  };
  const assertRefuses = async (code: number, text: RegExp): Promise<void> => {
    const state = async (): Promise<unknown[]> => [await shop.watermark(), await shop.destinationRows()];
    const before = await state();
    const result = await shop.run(script);
    assert.equal(result.code, code, result.stderr);
    assert.match(result.stderr, text);
    assert.doesNotMatch(result.stderr, /^ {4}at /m, "a stack trace where a sentence should be");
    assert.deepEqual(await state(), before);
  };

  test("a row whose created_at changes, to another month and another year too, stays one row", async () => {
    // orders is partitioned by its month.
    const times = ["2017-02-01", "2018-01-01 00:01", "2015-12-31 23:59:59.999999"];
    for (const [at, time] of times.entries())
      await shop.admin`update ${shop.admin(pipeline)} set created_at = ${time}::text::timestamptz where id = ${at + 1}`;
    await assertSynced();
  });

  test("an older version never replaces a newer one, and of two of the same time the source's is right", async () => {
    // The destination gets other values: in a version that is newer than the source's, in an older one, in one of its time.
    for (const [id, change] of Object.entries({ 1: 1, 2: -1, 3: 0 }))
      await shop.query(
        `UPDATE \`${pipeline}\` SET \`${shop.text}\` = 'other', created_at = TIMESTAMP '2016-06-01',
           updated_at = TIMESTAMP_ADD(updated_at, INTERVAL ${change} MICROSECOND) WHERE id = ${id}`,
      );
    const [newer] = await shop.destinationRows();
    const [, ...others] = await shop.sourceRows();
    await shop.succeed(script, { FROM: "2000-01-01", TO: "2100-01-01" });
    assert.deepEqual(await shop.destinationRows(), [newer, ...others]);
    await shop.updateRows(1, 1, "newest");
    await assertSynced();
  });

  test("a SELECT that returns a key twice merges nothing, and names the key", async () => {
    await shop.updateRows(1, 3, "changed");
    {
      const twice = `from public.${pipeline} join (values (1), (2)) twice (n) on id = 2 or n = 1`;
      using _ = scratch.edit(`sql/${pipeline}.sql`, (text) => text.replace(`from public.${pipeline}`, twice));
      await assertRefuses(
        1,
        new RegExp(`sql/${pipeline}\\.sql returned the key {"id":2} more than once; nothing of this chunk was merged`),
      );
    }
    assert.deepEqual(await shop.stagingTables(), []);
    await assertSynced();
  });

  test("settings of a role that would end its sessions or change their answers", async () => {
    const settings = {
      ...{ transaction_timeout: "100ms", idle_session_timeout: "100ms", idle_in_transaction_session_timeout: "100ms" },
      ...{ statement_timeout: "1ms", lock_timeout: "1ms", default_transaction_read_only: "on", exit_on_error: "on" },
      ...{ default_transaction_isolation: "serializable", default_transaction_deferrable: "on", row_security: "on" },
      ...{ quote_all_identifiers: "on", standard_conforming_strings: "off", transform_null_equals: "on" },
    };
    for (const role of ["etl_reader", "etl_metadata"])
      for (const [name, value] of Object.entries(settings))
        await shop.admin.unsafe(`alter role ${role} in database ${shop.dataset} set ${name} = '${value}'`);
    await shop.updateRows(1, 3, "wide".repeat(2_000_000)); // a chunk, and its COPY, that take longer than 100 ms
    await assertSynced();
    for (const role of ["etl_reader", "etl_metadata"]) await shop.admin.unsafe(`alter role ${role} in database ${shop.dataset} reset all`);
    await shop.updateRows(1, 3, "narrow");
  });

  for (const [ends, says] of [
    ["pg_terminate_backend", /^error: terminating connection due to administrator command/m],
    ["pg_cancel_backend", /^error: canceling statement due to user request in: select pg_adv.* another session lock a table/m],
  ] as const)
    test(`a session or statement that the server ends (${ends}): the server's words are the error`, async () => {
      const holder = shop.connect("holder");
      await holder`select pg_advisory_lock(hashtextextended(${`etl:${pipeline}`}, 0))`;
      const run = shop.start(script, { FROM: "2026-01-01", TO: "2026-01-02" });
      await until("it waits for the lock, and is ended", async () => {
        const [row] = await shop.admin`
          select ${shop.admin(ends)}(pid) from pg_stat_activity
          where datname = current_database() and usename = 'etl_metadata' and wait_event = 'advisory'`;
        return row;
      });
      const { code, stderr } = await run.ended;
      await holder.end(); // its lock too: the tests after this one would wait for it
      assert.match(stderr, says);
      assert.equal(code, 1);
    });

  test("a run with nothing new reads no row of the table, however many it has", async () => {
    await shop.insertRows(1000, 30_000);
    await shop.succeed(script);
    await shop.admin.unsafe(`vacuum analyze ${pipeline}`);
    const read = async (): Promise<number> =>
      Number((await shop.admin`select seq_tup_read + idx_tup_fetch as rows from pg_stat_user_tables where relname = ${pipeline}`)[0]?.rows);
    const before = await read();
    await shop.succeed(script);
    await shop.admin`select pg_stat_force_next_flush()`;
    assert.ok((await read()) - before < 100, `${(await read()) - before} rows`);
    await shop.admin.unsafe(`delete from ${pipeline} where id >= 1000`);
    await shop.succeed("scripts/ops/sweep.ts", { PIPELINE: pipeline, CONFIRM: "1" });
  });

  test("a server that does not tell its history: one warning says what is not noticed, and the run succeeds", async () => {
    const functions = "function pg_control_system(), pg_walfile_name(pg_lsn), pg_current_wal_flush_lsn()";
    await shop.admin.unsafe(`revoke execute on ${functions} from public`);
    await shop.updateRows(1, 3, "without history");
    const { stderr } = await shop.succeed(script);
    const warnings = stderr.split("\n").filter((line) => line.includes("step=warning"));
    assert.equal(warnings.length, 1, stderr);
    assert.match(warnings[0] ?? "", /a restore or a failover is not noticed: permission denied for function pg_/);
    await shop.admin.unsafe(`grant execute on ${functions} to public`);
    await assertSynced();
  });

  test("a row of the future: the run warns with its key and the statement that corrects it, and a metric has the count", async () => {
    await shop.admin.unsafe(`alter table ${pipeline} disable trigger user`);
    await shop.admin.unsafe(`update ${pipeline} set updated_at = '2099-01-01' where id = 2`);
    const { stderr } = await shop.succeed(script);
    assert.match(stderr, new RegExp(`step=warning warning="1 rows of public.${pipeline} lie in the future.*" rows=1 first="id=2"`));
    const [, correct = ""] = /Run: (update .*?;)/.exec(stderr) ?? [];
    const { stdout } = await shop.run("scripts/ops/status.ts");
    assert.match(stdout.replaceAll(/\s+/g, " "), /1 rows of its source lie in the future/);
    const doctor = await shop.run("scripts/ops/doctor.ts", { PIPELINE: pipeline });
    assert.match(doctor.stdout, /^FAIL .*1 rows of public\.\w+ lie in the future, .* Run: update public/m);
    assert.equal((await shop.metrics()).etl_future_rows, 1);
    await shop.admin.unsafe(correct);
    await assertSynced();
    assert.equal((await shop.metrics()).etl_future_rows, 0);
    await shop.admin.unsafe(`alter table ${pipeline} enable trigger user`);
  });

  test("a comment after the SELECT's semicolon does no harm, and a broken contract is named", async () => {
    const contract = `schemas/bigquery/${pipeline}.json`;
    {
      using _ = scratch.edit(`sql/${pipeline}.sql`, (text) => `${text}-- the end;\n`);
      await assertSynced();
    }
    const twice = '{ "name": "Updated_At", "type": "DATE" }, { "name": "created_at"';
    for (const [broken, says] of [
      [(text: string) => text.replace("tableConstraints", "constraints"), "with schema\\.fields and tableConstraints\\.primaryKey"],
      [() => "{", ".* JSON"],
      [
        (text: string) => text.replace('{ "name": "created_at"', twice),
        '.*: field "\\w+": a name .* comes once: BigQuery does not tell A from a',
      ],
    ] as const) {
      using _ = scratch.edit(contract, broken);
      await assertRefuses(2, new RegExp(`${contract} must be a BigQuery Table resource ${says}`));
    }
  });

  if (pipeline !== "orders") return; // with SOAK=1 both would write the same files
  test("a table outside public, in capitals, its cursor of another name, grants on the SELECT's columns only: all that reads it, does", async () => {
    await shop.admin.unsafe(`create schema crm; create domain crm.moment as timestamptz; create table crm."Stores" (
      id bigint primary key, name text, secret text, "modifiedAt" crm.moment not null default clock_timestamp())`);
    const made = { TABLE: "crm.Stores", CURSOR: "modifiedAt", EVERY: "1d" };
    const { stdout } = await shop.succeed("scripts/ops/new-pipeline.ts", made);
    const statements = stdout.replace('grant select on crm."Stores"', 'grant select (id, name, "modifiedAt") on crm."Stores"');
    for (const statement of statements.split("\n").filter((line) => /^(grant|create) /.test(line))) await shop.admin.unsafe(statement);
    scratch.edit("sql/stores.sql", (text) => text.replace("  secret,\n", ""));
    scratch.editFields("stores", (fields) => fields.filter(({ name }) => name !== "secret"));
    await shop.succeed("scripts/ops/migrate.ts");
    await shop.admin`insert into crm."Stores" (id, name) select i, 'store ' || i from generate_series(1, 3) i`;
    await shop.succeed("scripts/stores.ts");
    await shop.admin`delete from crm."Stores" where id = 3`;
    await shop.succeed("scripts/ops/sweep.ts", { PIPELINE: "stores", CONFIRM: "1" });
    await shop.succeed("scripts/ops/verify.ts", { PIPELINE: "stores" });
    assert.deepEqual(await shop.query("SELECT name FROM stores ORDER BY id"), [{ name: "store 1" }, { name: "store 2" }]);
    const doctor = await shop.succeed("scripts/ops/doctor.ts", { PIPELINE: "stores" });
    assert.match(doctor.stdout, /^ok .*stores: index on modifiedAt/m);
    await shop.admin`alter table crm."Stores" disable trigger user`;
    await shop.admin`update crm."Stores" set "modifiedAt" = '2099-01-01' where id = 1`;
    const ahead = await shop.run("scripts/ops/verify.ts", { PIPELINE: "stores" });
    const correct = /Run: update crm\."Stores" set "modifiedAt" = now\(\) where "modifiedAt" > now\(\);/;
    assert.match(ahead.stderr.replaceAll('\\"', '"'), correct);
    await shop.admin`revoke select (name) on crm."Stores" from etl_reader`;
    const { stderr } = await shop.run("scripts/stores.ts");
    assert.match(stderr, /Run as a superuser: grant select \(name\) on crm\."Stores" to etl_reader;/);
  });
});
