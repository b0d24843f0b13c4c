/**
 * What arrives in ClickHouse is what the source has, whatever is done to it.
 *   SOAK=1  more of the random writers, for a minute
 */
import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { after, before, suite, test } from "node:test";
import type { Sql, TransactionSql } from "postgres";
import { seed } from "../lib/random.ts";
import { assertExact, assertSame, createSensors, endsWith, type Reading, type Sensors, startWriters } from "../lib/sensors.ts";
import { type Process, until } from "../lib/shop.ts";
import { texts } from "../lib/texts.ts";
import { root } from "../stack/env.ts";

const soak = process.env.SOAK === "1";

suite("sensors", { concurrency: 4 }, () => {
  suite("FINAL is the source, row by row", { concurrency: 1 }, () => {
    let sensors: Sensors;
    before(async () => {
      sensors = await createSensors({ bigquery: false });
      await sensors.consumer();
    });
    after(() => sensors[Symbol.asyncDispose]());

    test("after inserts, updates, deletes, moved sorting keys and changed primary keys", async () => {
      const { admin } = sensors.shop;
      await admin`alter table sensor_readings add op text default 'r', add "table" text default 'etl_heartbeat'`; // as in an envelope
      await admin`insert into sensor_readings (sensor_id, metric, value, recorded_at) select 'S' || i % 3, 'temp', i, '2024-01-01'::timestamptz + i * interval '1 s' from generate_series(1, 500) i`;
      await assertExact(sensors);
      await admin`update sensor_readings set value = -value where id % 3 = 0`;
      await admin`update sensor_readings set sensor_id = 'moved', recorded_at = recorded_at + interval '1 day' where id % 5 = 0`;
      await admin`delete from sensor_readings where id % 7 = 0`;
      await admin`update sensor_readings set id = id + 10000 where id % 11 = 0`;
      await admin`insert into sensor_readings (id, sensor_id, metric, value) values (497, 'again', null, null), (20001, null, 'x', 'NaN'), (20002, 'é', '', '-Infinity')`;
      await assertExact(sensors);
    });

    test("after each column of the sorting key moved away and back, in one transaction and in three, and stayed away in between", async () => {
      const { admin } = sensors.shop;
      const moves = [
        ["sensor_id", "'B'"],
        ["sensor_id", "null"],
        ["metric", "''"],
        ["recorded_at", "recorded_at + interval '1 microsecond'"],
      ] as const;
      await admin`insert into sensor_readings (id, sensor_id, metric, value, recorded_at) select i, 'A', 'm', 1, '2024-01-01Z' from generate_series(30000, 30039) i`;
      const move = async (at: number, id: number, steps: string, sql: Sql | TransactionSql = admin): Promise<void> => {
        const [column, other] = moves[at] ?? moves[0];
        const there = `update sensor_readings set ${column} = ${other}, value = value + 1 where id = `;
        const back = `update sensor_readings set ${column} = old.${column}, value = sensor_readings.value + 1 from (select 'A' as sensor_id, 'm' as metric, '2024-01-01Z'::timestamptz as recorded_at) old where id = `;
        for (const step of steps.split(" ")) await sql.unsafe(`${step === "there" ? there : back}${30_000 + 10 * at + id}`);
      };
      for (const at of moves.keys()) {
        await admin.begin((sql) => move(at, 1, "there back", sql));
        await move(at, 2, "there back there back there back");
        await move(at, 3, "there back there");
        await move(at, 4, "there");
      }
      await assertExact(sensors);
      for (const at of moves.keys()) await move(at, 4, "back");
      await admin`delete from sensor_readings where id between 30000 and 30039 and id % 10 = 3`;
      await assertExact(sensors);
    });

    test("after transactions of many rows, and without those that were rolled back, whole or to a savepoint", async () => {
      const { admin } = sensors.shop;
      const fill = (sql: Sql | TransactionSql, first: number, sensor: string) =>
        sql`insert into sensor_readings (id, sensor_id, metric, value, recorded_at) select ${first}::int + i, ${sensor}, 'many', i, '2024-04-01'::timestamptz + i * interval '1 s' from generate_series(1, 2000) i`;
      await admin.begin(async (sql) => {
        await fill(sql, 60_000, "many");
        await sql`savepoint one`;
        await sql`update sensor_readings set value = -1 where metric = 'many'`;
        await fill(sql, 70_000, "never");
        await sql`rollback to savepoint one`;
        await sql`update sensor_readings set value = value * 2, sensor_id = 'more' where metric = 'many' and id % 2 = 0`;
        await sql`delete from sensor_readings where metric = 'many' and id % 10 = 0`;
      });
      const nothing = admin.begin(async (sql) => {
        await fill(sql, 80_000, "never");
        await sql`delete from sensor_readings where sensor_id <> 'never'`;
        throw new Error("rolled back");
      });
      await assert.rejects(nothing, /rolled back/);
      await assertExact(sensors);
      const all = await sensors.readings();
      assert.equal(all.filter(({ metric }) => metric === "many").length, 1800);
      assert.ok(!all.some(({ sensor_id }) => sensor_id === "never"));
    });

    test("with large texts: an update of another column keeps them, one of their own changes them", async () => {
      const { admin } = sensors.shop;
      // md5 has nothing that Postgres could compress: these are stored beside the row, and an unchanged one is not in the WAL.
      const text = (bytes: number) =>
        admin`(select string_agg(md5(random()::text), '') from generate_series(1, ${Math.ceil(bytes / 32)}::int))`;
      const sizes = [3_200, 100_000, 1_000_000];
      for (const [at, size] of sizes.entries()) {
        await admin`insert into sensor_readings (id, sensor_id, metric, value, recorded_at) values (${90_000 + at}, ${text(size)}, 'wide', 1, '2024-05-01Z')`;
        await admin`insert into sensor_readings (id, sensor_id, metric, value, recorded_at) values (${90_010 + at}, 'wide', ${text(size / 2)}, 1, '2024-05-01Z')`;
      }
      const large = admin`id between 90000 and 90020`;
      const before = await admin`select id, md5(sensor_id || metric) as sum from sensor_readings where ${large} order by id`;
      assert.equal(before.length, 6);
      await admin`update sensor_readings set value = 2 where ${large}`;
      await admin`update sensor_readings set recorded_at = recorded_at + interval '1 s' where ${large} and id % 2 = 0`;
      await assertExact(sensors);
      const same = await admin`select id, md5(sensor_id || metric) as sum from sensor_readings where ${large} order by id`;
      assert.deepEqual([...same], [...before]);
      await admin`update sensor_readings set sensor_id = sensor_id || 'é', metric = 'M' || metric where ${large}`;
      await assertExact(sensors);
      await admin`delete from sensor_readings where ${large}`;
      await assertExact(sensors);
    });

    test("with every number, text, time and id that Postgres has and ClickHouse can hold", async () => {
      const { admin } = sensors.shop;
      const columns = { sensor_id: ["a", null, ...texts], metric: ["a", null, ...texts], value: numbers, recorded_at: times };
      const types: Record<string, string> = { value: "float8", recorded_at: "timestamptz" };
      let id = 100_000;
      for (const [column, values] of Object.entries(columns))
        for (const value of values) {
          const other = values[0] ?? null;
          const $1 = `$1::text::${types[column] ?? "text"}`;
          const beside = column === "metric" ? "sensor_id" : "metric"; // the deletion of a row without any is a dead letter
          // Inserted, and as the values after and before an update.
          for (const first of [value, other, value])
            await admin.unsafe(`insert into sensor_readings (id, ${column}, ${beside}) values (${id++}, ${$1}, 'x')`, [first]);
          await admin.unsafe(`update sensor_readings set ${column} = ${$1} where id = ${id - 2}`, [value]);
          await admin.unsafe(`update sensor_readings set ${column} = ${$1} where id = ${id - 1}`, [other]);
        }
      for (const one of ids) await admin`insert into sensor_readings (id, sensor_id, metric) values (${one}, 'id', 'a')`;
      await admin`update sensor_readings set value = 1 where sensor_id = 'id'`;
      await assertExact(sensors);
      const [negative] = (await sensors.readings()).filter(({ value }) => value === "-0");
      assert.ok(negative, "the zero's sign");
      await admin`update sensor_readings set sensor_id = 'ID' where sensor_id = 'id'`;
      await admin`delete from sensor_readings where id between 100000 and ${id} and id % 2 = 0`;
      await assertExact(sensors);
      await admin`delete from sensor_readings where sensor_id = 'ID'`;
      await assertExact(sensors);
    });

    test("after several applications changed the same rows at once, at random", async (t) => {
      const writers = startWriters(sensors, seed, soak ? 8 : 4);
      await until("they have written", () => writers.committed() >= (soak ? 20_000 : 400), 300).finally(writers.stop);
      t.diagnostic(`${writers.committed()} transactions`);
      await assertExact(sensors);
    });

    test("of two epochs' messages the later epoch's win, whatever their offsets", async () => {
      const { clickhouse } = sensors.shop;
      const change = (epoch: number, offset: number, value: number): string => {
        const after = { id: 1, sensor_id: "epochs", metric: "m", value, recorded_at: "2024-01-01T00:00:00.000000Z" };
        return JSON.stringify({
          topic: "t",
          epoch,
          offset,
          key: '{"id":1}',
          value: JSON.stringify({ op: "c", after }),
        });
      };
      for (const message of [change(2, 0, 22), change(1, 1_000_000, 11), change(1, 2 ** 40, 12)])
        await clickhouse.command({ query: `INSERT INTO sensor_landing FORMAT JSONEachRow ${message}` });
      const rows = await sensors.shop.select("SELECT value FROM sensor_readings FINAL WHERE sensor_id = 'epochs'");
      assert.deepEqual(rows, [{ value: 22 }]);
    });
  });

  suite("dead-lettered", { concurrency: 1 }, () => {
    let sensors: Sensors;
    let consumer: Process;
    before(async () => {
      sensors = await createSensors({ bigquery: false });
      consumer = await sensors.consumer();
    });
    after(() => sensors[Symbol.asyncDispose]());
    const deadLetters = async (of: RegExp): Promise<string[]> =>
      (await sensors.deadLetters())
        .filter(({ reason }) => of.test(reason))
        .map(({ key, reason }) => `${JSON.parse(key ?? "{}").id} ${reason}`)
        .sort();

    test("a time that ClickHouse cannot hold is dead-lettered with its reason, and never arrives as another", async () => {
      const { admin } = sensors.shop;
      await admin`insert into sensor_readings (id, sensor_id, value, recorded_at) select i, 'good', i, '2024-01-01Z' from generate_series(1, 20) i`;
      for (const [at, time] of beyond.entries()) {
        await admin`insert into sensor_readings (id, sensor_id, recorded_at) values (${1000 + at}, 'beyond', ${time}::text::timestamptz)`;
        await admin`update sensor_readings set recorded_at = ${time}::text::timestamptz where id = ${1 + at}`;
      }
      await sensors.drained();
      const dead = [...beyond.keys()].flatMap((at) => [1 + at, 1000 + at]);
      const reason = "after.recorded_at is no time that DateTime64 holds";
      assert.deepEqual(await deadLetters(/./), dead.map((id) => `${id} ${reason}`).sort());
      // They are gone, since they are no longer what they were; once they have a time again, they are back.
      assertSame(
        await sensors.readings(),
        (await sensors.source()).filter(({ id }) => !dead.includes(Number(id))),
      );
      await admin`update sensor_readings set recorded_at = '2024-02-02Z' where not isfinite(recorded_at) or recorded_at not between '2000-01-01' and '2100-01-01'`;
      await sensors.drained();
      assertSame(await sensors.readings(), await sensors.source());
    });

    test("a column that is retyped while a consumer runs stops it, and what came meanwhile: no row is hours off, none is twice", async () => {
      const { admin } = sensors.shop;
      const rows = await sensors.readings();
      await admin`alter table sensor_readings alter recorded_at type timestamp using recorded_at at time zone 'America/New_York'`;
      await admin`insert into sensor_readings (id, sensor_id, recorded_at) values (100, 'new', '2024-01-01 12:00')`;
      await admin`update sensor_readings set value = -1 where id <= 3`;
      const retyped = /column public\.sensor_readings\.recorded_at: expected one for DateTime64.*, found timestamp without time zone/;
      await endsWith(consumer, 2, [retyped]);
      await admin`alter table sensor_readings alter recorded_at type timestamptz using recorded_at at time zone 'America/New_York'`;
      await sensors.catchUp();
      assertSame(await sensors.readings(), rows);
      const side = (id: number): string => (id === 100 ? "after" : "before");
      assert.deepEqual(
        await deadLetters(/is no text$/),
        [1, 100, 2, 3].map((id) => `${id} ${side(id)}.recorded_at is no text`),
      );
    });

    test("a TRUNCATE becomes a dead letter that names make resnapshot: the rows stay, and what comes after it arrives", async () => {
      const { admin } = sensors.shop;
      const before = await sensors.readings();
      await admin`truncate sensor_readings`;
      await admin`insert into sensor_readings (id, sensor_id, value, recorded_at) values (1, 'after', 1, '2024-01-02Z')`;
      await sensors.consumer();
      await sensors.drained();
      assert.match((await deadLetters(/^TRUNCATE/)).join("\n"), /^undefined TRUNCATE: .*make resnapshot.*$/);
      // Two of them have the id 1: what is inserted after a TRUNCATE does not meet the row that was there.
      const form = (rows: Reading[]): string[] => rows.map((row) => JSON.stringify(row)).sort();
      assert.deepEqual(form(await sensors.readings()), form([...before, ...(await sensors.source())]));
    });
  });

  test("of a partitioned table each change arrives, also of a partition that is new; an old row that is only a key is a dead letter", async () => {
    await using sensors = await createSensors({ bigquery: false, connector: false });
    const { admin } = sensors.shop;
    await admin
      .unsafe(`
      drop table sensor_readings;
      create table sensor_readings (
        id bigint generated by default as identity, sensor_id text, metric text, value float8, recorded_at timestamptz not null,
        made date not null default '2024-01-01', primary key (id, recorded_at, made)) partition by range (recorded_at);
      create table part_0 partition of sensor_readings default;
      create table part_1 partition of sensor_readings for values from ('2024-01-01Z') to ('2024-02-01Z');
      grant select on sensor_readings to etl_reader;`)
      .simple();
    await admin.unsafe(readFileSync(join(root, "sql/replication.sql"), "utf8")).simple();
    await admin`create table part_2 partition of sensor_readings for values from ('2024-02-01Z') to ('2024-03-01Z')`;
    await sensors.connector();
    await sensors.consumer();
    await admin`
      insert into sensor_readings (id, sensor_id, metric, value, recorded_at)
      select i, 'S' || i % 3, 'm', i, '2024-01-01Z'::timestamptz + i * interval '1 h' from generate_series(1, 1200) i`;
    await admin`update sensor_readings set value = -value where id % 3 = 0`;
    await admin`update sensor_readings set recorded_at = recorded_at + interval '1 minute', sensor_id = 'moved' where id % 5 = 0`;
    await admin`update sensor_readings set recorded_at = '2024-02-20Z' where id between 1 and 9`; // to the other partition
    for (let round = 0; round < 3; round++) await admin`update sensor_readings set made = made + 1 where id % 2 = 0`;
    await admin`delete from sensor_readings where id % 7 = 0`;
    await sensors.drained();
    assert.deepEqual(await sensors.deadLetters(), []);
    assertSame(await sensors.readings(), await sensors.source());

    // A row without values is exact too; what was there before a change could be another row's key, as far as the message tells.
    await admin`insert into sensor_readings (id, recorded_at) values (5001, '2024-01-05Z')`;
    await admin`delete from sensor_readings where id = 5001`;
    await admin`drop event trigger etl_identify_partition`; // it would put this right at once
    await admin.begin(async (sql) => {
      await sql`alter table part_1 replica identity default`;
      await sql`delete from sensor_readings where id = 101`;
      await sql`alter table part_1 replica identity full`;
    });
    await sensors.drained();
    const dead = await sensors.deadLetters();
    assert.deepEqual(dead.map(({ key, reason }) => [JSON.parse(key ?? "").id, /^before has only its key: /.test(reason)]).sort(), [
      [101, true],
      [5001, true],
    ]);
    await admin`alter table part_1 replica identity default`;
    const partial = /table part_1: its changes lack the old row\. Run as its owner: alter table part_1 replica identity full;/;
    await endsWith(sensors.shop.start("scripts/sensors.ts"), 2, [partial]);
    assert.equal((await sensors.readings()).length, (await sensors.source()).length + 1);
  });
});

const numbers = [
  ...["1", null, "0", "-0", "NaN", "Infinity", "-Infinity", "5e-324", "2.2250738585072014e-308", "1.7976931348623157e308", "0.1", "-1.5"],
  ...["0.30000000000000004", "9223372036854775808", "-9223372036854775809", "2e19", "1e20", "1e21", "1e22", "1e23", "1e-7", "8.41e21"],
  ...["9007199254740993", "123456789.12345679", "4.35", "9.5367431640625e-7"],
];

const times = [
  ...["2024-01-01Z", "2024-06-30 23:59:59.999999Z", "2024-06-30 12:00:00.1Z", "2024-06-30 12:00:00.123456+05:30", "2024-02-29 23:59:59.5Z"],
  ...["1970-01-01Z", "1969-12-31 23:59:59.000001Z", "1900-01-01 00:00:00+01", "1899-12-31 23:59:59.999999Z", "2106-02-07 06:28:16Z"],
  ...["2262-04-11 23:47:16.854776Z", "2299-12-31 23:59:59.999999Z", "2300-01-01Z", "9999-12-31 23:59:59.999999Z", "0001-01-01Z"],
  ...["1582-10-10Z", "1700-02-28 23:59:59.999999Z"],
];

const beyond = [
  "10000-01-01Z",
  "294276-12-31 23:59:59.999999Z",
  "0001-01-01 00:00:00+01",
  "0044-03-15 12:00:00Z BC",
  "infinity",
  "-infinity",
];

const ids = ["9223372036854775807", "-9223372036854775808", "9007199254740993", "-9007199254740993", "0", "-1"];
