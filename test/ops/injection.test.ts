// Names and values cannot inject: hostile ones in the environment, in the data, in types, columns and files are refused with exit
// code 2, or are only what they are. A canary at the source, and one at the destination, live through all of it. Needs make up.
import assert from "node:assert/strict";
import { existsSync } from "node:fs";
import { join } from "node:path";
import { after, afterEach, before, test } from "node:test";
import { bigqueryVariables } from "../../shared/bigquery/client.ts";
import { name, readEnv, required } from "../../shared/env.ts";
import { bucketVariables } from "../../shared/events/s3.ts";
import { pipelineVariables } from "../../shared/run.ts";
import { kafkaVariables } from "../../shared/sensors/broker.ts";
import { clickhouseVariables } from "../../shared/sensors/clickhouse.ts";
import { viewsVariables } from "../../shared/views/build.ts";
import { scratchCopy } from "../lib/scratch.ts";
import { createSensors, type Sensors } from "../lib/sensors.ts";
import type { Result, Shop } from "../lib/shop.ts";

const scratch = scratchCopy();
const pwned = join(scratch.folder, "pwned");
/** Each would do harm in another place: SQL of either quote, BigQuery's backticks, a shell, a format, a path, a line of a log. */
const hostile = [
  `x'; drop table public.canary; --`,
  `x"; drop table public.canary; --`,
  "x`; DROP TABLE canary; --",
  `x\\'; drop table public.canary; --`,
  `x'); drop table public.canary; select ('`,
  `$(touch ${pwned})`,
  `\`touch ${pwned}\``,
  `; touch ${pwned};`,
  "%s%n %1$s",
  "../../../../etc/passwd",
  "x\ny=1\nerror: forged",
  "x\t\u001b[2Jx",
  "orders ",
  "ördérs‮",
  "ord\u0435rs", // a Cyrillic е
  "{orders,users}",
  "orders/*",
  "x;y",
];

let sensors: Sensors;
let shop: Shop;
before(async () => {
  sensors = await createSensors({ folder: scratch.folder });
  shop = sensors.shop;
  await shop.admin.unsafe("create table public.canary as select generate_series(1, 3) as id");
  await shop.query("CREATE TABLE canary AS SELECT 1 AS id");
  await shop.clickhouse.command({ query: "CREATE TABLE canary ENGINE = Memory AS SELECT 1 AS id" });
  await shop.insertRows(1, 3);
  await shop.succeed(shop.script);
});
after(async () => {
  await sensors?.[Symbol.asyncDispose]();
  scratch[Symbol.dispose]();
});

afterEach(async () => {
  assert.equal((await shop.admin`select from public.canary`).count, 3);
  assert.equal((await shop.query("SELECT id FROM canary")).length, 1);
  assert.equal((await shop.select("SELECT id FROM canary")).length, 1);
  assert.ok(!existsSync(pwned), "a shell ran");
});

const variables = {
  ...pipelineVariables,
  ...bigqueryVariables,
  ...bucketVariables,
  ...viewsVariables,
  ...clickhouseVariables,
  ...kafkaVariables,
  PIPELINE: required(name),
};

/** Nothing that was given stands at the beginning of a line, as if it were one of ours, and no terminal is told anything. */
const control = String.fromCharCode(27);
const assertNotForged = ({ stdout, stderr }: Result): void =>
  assert.ok(!/^(y=1|error: forged)/m.test(stderr + stdout) && !(stderr + stdout).includes(control), stderr + stdout);

/** What names something; FROM and TO are points in time. */
const naming = [
  ...(["BIGQUERY_PROJECT", "BIGQUERY_DATASET", "BIGQUERY_LOCATION", "BIGQUERY_VIEWS_DATASET", "S3_BUCKET", "AWS_REGION", "ONLY"] as const),
  ...(["CLICKHOUSE_DATABASE", "CLICKHOUSE_USER", "SENSORS_TOPIC", "SENSORS_GROUP", "KAFKA_BROKERS", "PIPELINE", "FROM", "TO"] as const),
];

test("each hostile name is refused where it is read, as a value of each variable that names something", async () => {
  for (const variable of naming)
    for (const value of hostile) {
      const before = process.env[variable];
      process.env[variable] = value;
      try {
        const says = new RegExp(`^UsageError: .*\n  ${variable} `);
        assert.throws(() => readEnv({ [variable]: variables[variable] }), says, `${variable}=${value}`);
      } finally {
        if (before === undefined) delete process.env[variable];
        else process.env[variable] = before;
      }
    }
  // By a script: exit code 2, and nothing of them looks like a line of ours.
  const value = hostile.find((one) => one.includes("forged"));
  for (const [script, named] of [
    ["scripts/orders.ts", ["BIGQUERY_PROJECT", "BIGQUERY_DATASET", "BIGQUERY_LOCATION", "FROM", "TO"]],
    ["scripts/sensors.ts", ["CLICKHOUSE_DATABASE", "CLICKHOUSE_USER", "SENSORS_TOPIC", "SENSORS_GROUP", "KAFKA_BROKERS"]],
    ["scripts/ops/rewind.ts", ["PIPELINE", "TO"]],
  ] as const) {
    const result = await shop.run(script, Object.fromEntries(named.map((name) => [name, value])));
    assert.equal(result.code, 2, `${script}: ${result.stderr}`);
    for (const name of named) assert.ok(result.stderr.includes(name), `${name}: ${result.stderr}`);
    assertNotForged(result);
  }
});

test("a bucket's prefix is only a prefix, whatever is in it", async () => {
  await shop.insertEvents("2017-01-01", 3);
  const value = `x'; drop table public.canary; -- x\`"\\y$(touch ${pwned})%s %2e%2e é‮a b+c&d=e?f#g`;
  const prefix = { FROM: "2017-01-01", TO: "2017-01-02", S3_PREFIX: `${shop.env.S3_PREFIX}${value}` };
  await shop.succeed("scripts/ops/backfill-events.ts", prefix);
  const { stderr } = await shop.succeed("scripts/ops/verify-events.ts", prefix);
  assert.match(stderr, /days=1|verified|done/);
});

test("values of rows are values: every hostile text arrives as it is", async () => {
  for (const [index, value] of hostile.entries()) await shop.admin`insert into orders (id, status) values (${100 + index}, ${value})`;
  await shop.succeed(shop.script);
  assert.deepEqual(await shop.destinationRows(), await shop.sourceRows());
  for (const value of hostile)
    await shop.admin`insert into events (type, payload, created_at) values (${value}, ${shop.admin.json({ [value]: value })}, '2017-02-01')`;
  await shop.succeed("scripts/ops/backfill-events.ts", { FROM: "2017-02-01", TO: "2017-02-02" });
  await shop.succeed("scripts/ops/restore-events.ts", { FROM: "2017-02-01", TO: "2017-02-02" });
  const { count } = await shop.admin`
    select from etl.events_restored r join events e using (id) where (r.type, r.payload) is not distinct from (e.type, e.payload) and e.created_at = '2017-02-01'`;
  assert.equal(count, hostile.length);
});

test("readings whose texts are hostile arrive as they are, and hostile messages become dead letters as they are", async () => {
  for (const value of hostile) await shop.admin`insert into sensor_readings (sensor_id, metric, value) values (${value}, ${value}, 1)`;
  await sensors.produce(hostile.map((value) => ({ key: value, value })));
  const consumer = await sensors.consumer();
  await sensors.equal();
  consumer.child.kill("SIGTERM");
  assertNotForged(await consumer.ended);
  assert.deepEqual((await sensors.deadLetters()).map(({ value }) => value).sort(), [...hostile].sort());
  const letters = await shop.succeed("scripts/ops/dead-letters.ts");
  assertNotForged(letters);
  await shop.succeed("scripts/ops/replay-dead-letters.ts");
});

test("columns, types and a table's applications with hostile names are only names", async () => {
  const quoted = async (name: string): Promise<string> =>
    (await shop.admin<{ quoted: string }[]>`select quote_ident(${name}) as quoted`)[0]?.quoted ?? "";
  for (const value of [`${hostile[0]}"`, `${hostile[10]}${hostile[11]}`]) {
    const name = await quoted(value.slice(0, 60));
    await shop.admin.unsafe(`alter table orders add ${name} text`);
    await shop.admin.unsafe(`create type ${name} as enum ('a')`);
    await shop.admin.unsafe(`alter table orders alter status type ${name} using 'a'`);
    await shop.admin.unsafe(`update orders set item_count = 1 where id = 1`);
    const holder = shop.connect(value.slice(0, 60));
    await holder.begin(async (transaction) => {
      await transaction`select 1`;
      const result = await shop.succeed(shop.script);
      assert.match(result.stderr, /has columns that are not in/);
      assert.match(result.stderr, /step=done rows=[1-9]/); // read with that type
      assertNotForged(result);
      assertNotForged(await shop.run("scripts/ops/status.ts"));
      assertNotForged(await shop.run("scripts/ops/doctor.ts", { PIPELINE: "events" }));
    });
    await holder.end();
    await shop.admin.unsafe(`alter table orders alter status type text`);
    await shop.admin.unsafe(`drop type ${name}; alter table orders drop ${name}`);
  }
  await shop.admin.unsafe("update orders set item_count = 2");
  await shop.succeed(shop.script);
  assert.deepEqual(await shop.destinationRows(), await shop.sourceRows());
});

test("a contract whose field has a hostile name is refused with exit code 2", async () => {
  using _ = scratch.edit("schemas/bigquery/orders.json", (text) =>
    text.replace('"name": "store_id"', `"name": ${JSON.stringify(hostile[1])}`),
  );
  const result = await shop.run("scripts/orders.ts");
  assert.equal(result.code, 2, result.stderr);
  assert.match(result.stderr, /schemas\/bigquery\/orders\.json must be a BigQuery Table resource/);
  assertNotForged(result);
});
