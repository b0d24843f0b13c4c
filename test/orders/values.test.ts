// Any value Postgres can hold arrives equal, or its row is refused by name. Needs the local stack (make up).
import assert from "node:assert/strict";
import { join } from "node:path";
import { after, before, suite, test } from "node:test";
import fc from "fast-check";
import { jsonLines } from "../../shared/bigquery/types.ts";
import { openSession } from "../../shared/session.ts";
import { seed } from "../lib/random.ts";
import { type Scratch, scratchCopy } from "../lib/scratch.ts";
import { createShop, ofSteps, type Pipeline, pipelines, type Shop } from "../lib/shop.ts";
import { texts } from "../lib/texts.ts";

/** Columns that the test's tables have beyond the project's: name → type in Postgres, type in BigQuery. */
const columns: Record<string, [postgres: string, bigquery: string]> = {
  int8: ["int8", "INTEGER"],
  int4: ["int4", "INTEGER"],
  money: ["numeric(12,2)", "NUMERIC"],
  text: ["text", "STRING"],
  varchar: ["varchar(40)", "STRING"],
  char: ["char(5)", "STRING"],
  bool: ["bool", "BOOLEAN"],
  int2: ["int2", "INTEGER"],
  float4: ["float4", "FLOAT"],
  float8: ["float8", "FLOAT"],
  bytea: ["bytea", "BYTES"],
  uuid: ["uuid", "STRING"],
  enum: ["mood", "STRING"],
  inet: ["inet", "STRING"],
  cidr: ["cidr", "STRING"],
  interval: ["interval", "STRING"],
  date: ["date", "DATE"],
  time: ["time", "TIME"],
  timestamp: ["timestamp", "DATETIME"],
  timestamptz: ["timestamptz", "TIMESTAMP"],
  numeric: ["numeric(38,9)", "NUMERIC"],
  bignumeric: ["numeric(38,18)", "BIGNUMERIC"], // local-bigquery has no more digits: it refuses 39, and rounds to 18
  any_numeric: ["numeric", "NUMERIC"],
  numeric_text: ["numeric", "STRING"],
  jsonb: ["jsonb", "JSON"],
  jsonb_text: ["jsonb", "STRING"],
  json: ["json", "JSON"],
  json_text: ["json", "STRING"],
  ints: ["int4[]", "INTEGER"],
  texts: ["text[]", "STRING"],
  moneys: ["numeric(12,2)[]", "NUMERIC"],
  any_numerics: ["numeric[]", "NUMERIC"],
  moments: ["timestamptz[]", "TIMESTAMP"],
  bytes: ["bytea[]", "BYTES"],
  enums: ["mood[]", "STRING"],
  jsonbs: ["jsonb[]", "JSON"],
  // Names that our SQL has as aliases.
  line: ["text", "STRING"],
  s: ["numeric", "NUMERIC"],
  t: ["text[]", "STRING"],
  e: ["int4[]", "INTEGER"],
  n: ["int8", "INTEGER"],
  p: ["jsonb", "JSON"],
  q: ["timestamptz", "TIMESTAMP"],
};
const names = Object.keys(columns);
const isArray = (type = ""): boolean => type.endsWith("[]");

/** Such a shop, in a database whose defaults write every type in another form than BigQuery reads. */
async function createWideShop(folder: string, pipeline: Pipeline): Promise<Shop> {
  const shop = await createShop({ folder, pipeline });
  await shop.admin.unsafe("create type mood as enum ('sad', 'it''s ok', 'happy')");
  const added = names.map((name) => `add "${name}" ${columns[name]?.[0]}`);
  await shop.admin.unsafe(`alter table ${shop.table} ${added.join(", ")}`);
  const others = {
    TimeZone: "Asia/Kathmandu",
    DateStyle: "SQL, DMY",
    IntervalStyle: "sql_standard",
    bytea_output: "escape",
    extra_float_digits: "-5",
  };
  for (const [name, value] of Object.entries(others)) {
    await shop.admin.unsafe(`alter database ${shop.dataset} set ${name} = '${value}'`);
  }
  return shop;
}

/** A copy of the project in which both pipelines sync these columns. */
function widen(scratch: Scratch): void {
  for (const pipeline of pipelines) {
    const added = names.map((name) => {
      const [type, bigquery] = columns[name] ?? [];
      const size = type?.startsWith("numeric(12,2)") ? { precision: "12", scale: "2" } : {};
      return { name, type: bigquery, mode: isArray(type) ? "REPEATED" : "NULLABLE", ...size };
    });
    const needed = { name: "needed", type: "STRING", mode: "REQUIRED" };
    scratch.editFields(pipeline, (fields) => [...fields, ...added, needed]);
    scratch.edit(`sql/${pipeline}.sql`, (text) =>
      text.replace(
        "updated_at\nfrom",
        `updated_at, ${names.map((name) => `"${name}"`)}, nullif(coalesce(text, 'there'), 'gone') as needed\nfrom`,
      ),
    );
  }
}

/** Sets columns of the pipeline's table from text, one row for each. */
async function upsert(shop: Shop, rows: Record<string, string | null>[]): Promise<void> {
  const given = [...new Set(rows.flatMap((row) => Object.keys(row)))];
  const types = await shop.admin`
    select attname as name, format_type(atttypid, atttypmod) as type from pg_attribute
    where attrelid = ${shop.table}::text::regclass and attnum > 0`;
  const cast = given.map((name) => `"${name}"::${types.find((column) => column.name === name)?.type}`);
  const set = given.map((name) => `"${name}" = excluded."${name}"`);
  await shop.admin.unsafe(
    `insert into ${shop.table} (${given.map((name) => `"${name}"`)})
     select ${cast} from jsonb_to_recordset($1::text::jsonb) r (${given.map((name) => `"${name}" text`)})
     on conflict (id) do update set ${set}`,
    [JSON.stringify(rows)],
  );
}

/**
 * Where the rows of source and destination differ: Postgres reads the destination's values as its own types, and
 * compares. (shop.sourceRows() compares JSON as JavaScript reads it, where 2^53 + 1 is 2^53.) BigQuery has no NULL arrays.
 */
async function differences(shop: Shop): Promise<unknown[]> {
  const read: Record<string, string> = {
    BYTES: "decode($, 'base64')",
    TIMESTAMP: "timestamptz '1970-01-01Z' + $::bigint / 1000000 * interval '1 s' + $::bigint % 1000000 * interval '1 us'",
  };
  const there = await shop.admin`
    select attname as name, format_type(atttypid, atttypmod) as type from pg_attribute
    where attrelid = ${shop.table}::text::regclass and attnum > 0 and not attisdropped order by attnum`;
  const came = there.map(({ name, type }) => {
    const kind = columns[name]?.[1] ?? (type.startsWith("timestamp") ? "TIMESTAMP" : "");
    const value = (text: string): string => (read[kind] ?? "$").replaceAll("$", text);
    return isArray(type)
      ? `(select coalesce(array_agg((${value("e")})::${type.slice(0, -2)} order by n), '{}') from jsonb_array_elements_text("${name}"::jsonb) with ordinality a(e, n)) as "${name}"`
      : `(${value(`"${name}"`)})::${type} as "${name}"`;
  });
  const sent = there.map(({ name, type }) => (isArray(type) ? `coalesce("${name}", '{}') as "${name}"` : `"${name}"`));
  const arrived = await shop.query(`SELECT * FROM ${shop.pipeline}`);
  const rows = await shop.admin.unsafe(
    `with arrived as materialized (
       select ${came} from jsonb_to_recordset($1::text::jsonb) r (${there.map(({ name }) => `"${name}" text`)})
     ), source as (select ${sent} from ${shop.table}),
     sent as (select id, to_jsonb(source) as row from source), came as (select id, to_jsonb(arrived) as row from arrived)
     select id::text, name, sent.row -> name as sent, came.row -> name as came
     from sent full join came using (id), jsonb_object_keys(coalesce(sent.row, came.row)) name
     where sent.row -> name is distinct from came.row -> name order by id, name limit 20`,
    [JSON.stringify(arrived)],
  );
  return [...rows];
}

/** No string at the top: local-bigquery reads {"c":"5"} into a JSON column as the number 5, and refuses {"c":"a"}, by hand too. */
const jsons = [
  "{}",
  "[]",
  "0",
  "true",
  '{"": {"": [null, false, {"a": []}]}}',
  '{"\\u00e9\\ud83d\\ude00\\u0001\\u2028": "\\u0002\\n\\r\\t\\"\\\\\\/"}',
  '{"a b": " \\\\u0041 ", "\\\\N": "\\\\."}',
  "[9223372036854775807, -9223372036854775808, 9007199254740993, -9007199254740993]",
  "[0.1, 1e2, -1.5e-7, 1.0]",
  "[18446744073709551615, 1.7976931348623157e308, 0.30000000000000004]",
  "[".repeat(500) + "]".repeat(500),
  JSON.stringify(texts.slice(0, -1)),
];
const integers = ["0", "-1", "9223372036854775807", "-9223372036854775808", "9007199254740993", "-9007199254740993"];
const floats = ["0", "-1.5", "0.1", "1e20", "1e-7"];
const times = ["-01-01 00:00:00", "-12-31 23:59:59.999999"];
const moments = [
  ...["0001", "0099", "1899", "1969", "1970", "2017", "9999"].flatMap((year) => times.map((time) => year + time)),
  "2016-02-29 12:34:56.000001",
  "1969-12-31 23:59:59.999999",
];
const wide = `${"9".repeat(29)}.${"9".repeat(9)}`;

const edges: Record<string, string[]> = {
  int8: integers,
  int4: ["2147483647", "-2147483648"],
  money: ["9999999999.99", "-9999999999.99", "0.01", "0", "100.00"],
  created_at: moments.map((moment) => `${moment}Z`),
  text: texts,
  varchar: ["", "trailing  ", "\n"],
  char: ["", "a", "a  b", "👩"],
  bool: ["true", "false"],
  int2: ["32767", "-32768"],
  float4: [...floats, "3.4028235e38", "1e-45", "16777217"],
  float8: [...floats, "1.7976931348623157e308", "5e-324", "0.30000000000000004", "9007199254740993", "123456.789012345"],
  bytea: ["\\x", "\\x00", "\\x0102ff5c", `\\x${"00ff0a".repeat(50)}`],
  enum: ["sad", "it's ok"],
  inet: ["192.168.0.1/24", "10.0.0.1", "::1", "2001:db8::/32"],
  cidr: ["10.0.0.0/8", "2001:db8::/32"],
  interval: ["0", "1 year 2 months -3 days 04:05:06.789012", "-00:00:00.000001", "1000 years", "P1Y2M3DT4H5M6S"],
  uuid: ["00000000-0000-0000-0000-000000000000", "A0EEBC99-9C0B-4EF8-BB6D-6BB9BD380A11"],
  date: ["0001-01-01", "1969-12-31", "2016-02-29", "9999-12-31"],
  time: ["00:00:00", "23:59:59.999999", "12:00:00.000001"],
  timestamp: moments,
  timestamptz: [...moments.map((moment) => `${moment}Z`), "2017-03-12 02:30:00.123456-05:45"],
  numeric: [wide, `-${wide}`, "0.000000001", "1234567.890000000"],
  bignumeric: [`${"9".repeat(20)}.${"9".repeat(18)}`, `-0.${"0".repeat(17)}1`],
  any_numeric: ["1.50", "1e10", "12345678901234567890.123456789"],
  numeric_text: ["1.500", `${"9".repeat(60)}.${"1".repeat(60)}`, "NaN", "Infinity"],
  jsonb: jsons,
  jsonb_text: [...jsons, "null", '""', '"\\""', '{"big": 123456789012345678901234567890.123456789012345678901234567890}'],
  json: [...jsons, '{\n\t"b" : 1,\r\n "a":\n2 }'],
  json_text: [...jsons, "null", '{ "a":1,"a" : 2,\n"b":0 }'],
  ints: ["{}", "{0}", "{3,-1,2147483647,3}", "[5:6]={7,8}"],
  texts: [
    `{${texts.slice(0, -1).map((text) =>
      JSON.stringify(text)
        .replace(/\\u(....)/g, (_, hex) => String.fromCharCode(Number.parseInt(hex, 16)))
        .replace(/\\([nrt])/g, (_, c) => ({ n: "\n", r: "\r", t: "\t" })[c as "n"]),
    )}}`,
  ],
  moneys: ["{9999999999.99,-0.01,0}"],
  any_numerics: [`{${wide},0.000000001,-1e10}`],
  moments: [`{${moments.map((moment) => `"${moment}Z"`)}}`],
  bytes: ['{"\\\\x","\\\\x00ff"}'],
  enums: [`{sad,"it's ok",sad}`],
  jsonbs: [String.raw`{"{\"a\": [1, null]}","[]","12"}`],
  line: ["line"],
  s: ["1.5"],
  t: ["{a,b}"],
  e: ["{3,1,2}"],
  n: ["7"],
  p: ['{"n": 1.5}'],
  q: ["2017-01-01Z"],
};

/** One row for each value, and one that has NULL everywhere. */
const edgeRows = Object.entries(edges)
  .flatMap(([name, values]) => values.map((value) => ({ [name]: value })))
  .concat({})
  .map((row, index) => ({ created_at: "2017-01-01Z", ...row, id: String(index + 1) }));

/** Values that have no place at the destination: column, value, how Postgres writes it, the field where that is another. */
const homeless: [column: string, value: string, written?: string, of?: string][] = [
  ["money", "NaN"],
  ["any_numeric", "-Infinity"],
  ["any_numeric", "0.0000000001"], // BigQuery would round it to NUMERIC's nine decimals
  ["any_numeric", "1e29", `1${"0".repeat(29)}`],
  ["float8", "NaN"],
  ["float4", "-Infinity"],
  ["date", "infinity"],
  ["date", "10000-01-01"],
  ["time", "24:00:00"],
  ["timestamp", "-infinity"],
  ["timestamp", "0001-12-31 23:59:59 BC"],
  ["created_at", "infinity"],
  ["created_at", "10000-01-01Z", "10000-01-01 00:00:00+00"],
  ["ints", "{1,NULL}"],
  ["ints", "{{1,2},{3,4}}"],
  ["moneys", "{1.00,NaN}"],
  ["moments", '{"0001-12-31 23:59:59+00 BC"}'],
  ["jsonbs", '{"null"}'],
  ["jsonb", '{"n": 0.1234567890123456789}'], // neither an integer of 64 bits nor a double
  ["json", "[18446744073709551616]"],
  ["p", `[1e309]`, `[1${"0".repeat(198)}`],
  ["jsonb", "[".repeat(501) + "]".repeat(501), "[".repeat(200)],
  ["text", "gone", "NULL", "needed"], // an expression that is NULL, in a REQUIRED field
];

const withoutMapping = ["tsvector", "point", "xml", "money", "timetz", "int4range", "bit(3)", "macaddr", "oid", "mood_pair"];

using scratch = scratchCopy();
widen(scratch);
for (const pipeline of ofSteps) {
  await suite(pipeline, async () => {
    const shop = await createWideShop(scratch.folder, pipeline);
    after(() => shop[Symbol.asyncDispose]());

    test("any value Postgres can hold arrives equal, whatever the database's defaults", async () => {
      await upsert(shop, edgeRows);
      await upsert(
        shop,
        integers.slice(1).map((id) => ({ id, created_at: "2017-01-01Z" })),
      );
      await shop.succeed(shop.script);
      assert.deepEqual(await differences(shop), []);
    });

    test("NULL and '', and jsonb's null in a STRING, stay apart", async () => {
      const apart = `SELECT COUNTIF(text = '') AS blank, COUNTIF(text IS NULL) AS none, COUNTIF(jsonb_text = 'null') AS json_null FROM ${shop.pipeline}`;
      assert.deepEqual(await shop.query(apart), [
        {
          blank: "1",
          none: String(edgeRows.length + integers.length - 1 - texts.length),
          json_null: "1",
        },
      ]);
    });

    test("random text, bytes and JSON arrive equal, as new rows and as changed ones", async () => {
      const text = fc.string({ unit: "binary", maxLength: 20 }).map((value) => value.replaceAll("\0", "\u0001"));
      const json = fc
        .oneof(fc.array(fc.jsonValue({ stringUnit: "binary" })), fc.dictionary(text, fc.jsonValue({ stringUnit: "binary" })))
        .map((value) => JSON.stringify(value).replaceAll("\\u0000", "\\u0002"));
      const row = fc.record({
        money: fc.integer().map((cents) => String(cents / 100)),
        texts: fc.array(text).map((all) => `{${all.map((one) => `"${one.replace(/["\\]/g, "\\$&")}"`)}}`),
        text: fc.option(text),
        jsonb: fc.option(json),
        json: json,
        json_text: json,
        bytea: fc.uint8Array({ maxLength: 90 }).map((bytes) => `\\x${Buffer.from(bytes).toString("hex")}`),
        float8: fc.double({ noNaN: true, noDefaultInfinity: true }).map(String),
        int8: fc.bigInt({ min: -(2n ** 63n), max: 2n ** 63n - 1n }).map(String),
        created_at: fc
          .date({ min: new Date("0001-01-02"), max: new Date("9999-12-30"), noInvalidDate: true })
          .map((date) => date.toISOString().replace("Z", "123Z")),
      });
      for (const rows of fc.sample(fc.array(row, { minLength: 150, maxLength: 150 }), { seed, numRuns: 3 })) {
        await upsert(
          shop,
          rows.map((values, index) => ({ ...values, id: String(100_000 + index) })),
        );
        await shop.succeed(shop.script);
        assert.deepEqual(await differences(shop), []);
      }
    });

    test("a value without a place is refused by pipeline, primary key and column, and nothing moves", async () => {
      const { checkSource, readContract }: typeof import("../../shared/bigquery/contract.ts") = await import(
        join(scratch.folder, "shared/bigquery/contract.ts")
      );
      await using source = openSession(shop.env.SOURCE_DATABASE_URL ?? "", { application: "test", timeoutSeconds: 60 });
      const contract = readContract(pipeline);
      const columns = await checkSource({ pipeline, source, log: () => {}, metrics: {} }, contract);
      const before = (await shop.watermark()) ?? "";
      await source`select set_config('etl.from', ${before}, false), set_config('etl.to', 'infinity', false)`;
      for (const [column, value, written = value, of = column] of homeless) {
        await upsert(shop, [{ id: "-7", created_at: "2017-01-01Z", [column]: value }]);
        const refused = source.unsafe(jsonLines(contract, contract.source.select, columns));
        await assert.rejects(refused, new RegExp(`"etl refuses column ${of} of ${pipeline}, row id=-7: ${RegExp.escape(written)}`));
        await shop.admin`delete from ${shop.admin(shop.table)} where id = -7`;
      }
      await upsert(shop, [{ id: "-7", created_at: "2017-01-01Z", money: "NaN" }]);
      const { code, stderr } = await shop.run(shop.script);
      await shop.admin`delete from ${shop.admin(shop.table)} where id = -7`;
      assert.ok(stderr.includes(`column money of ${pipeline}, row id=-7: NaN, which its field cannot hold.`), stderr);
      assert.equal(code, 1);
      const [run] = await shop.admin`select state, error from etl.runs order by started_at desc limit 1`;
      assert.equal(run?.state, "failed");
      assert.match(run?.error, /row id=-7/);
      assert.equal(await shop.watermark(), before);
      assert.deepEqual(await shop.query(`SELECT id FROM ${pipeline} WHERE id = -7`), []);
    });

    test("a type that has no safe mapping, and an array where the field holds one value, are refused by column and type", async () => {
      const odd = [...withoutMapping, "text[]"].map((type, index) => ({ name: `odd_${index}`, type }));
      await shop.admin.unsafe("create type mood_pair as (a mood, b mood)");
      await shop.admin.unsafe(`alter table ${shop.table} ${odd.map(({ name, type }) => `add ${name} ${type}`).join(", ")}`);
      scratch.editFields(pipeline, (fields) => [...fields, ...odd.map(({ name }) => ({ name, type: "STRING" }))]);
      scratch.edit(`sql/${pipeline}.sql`, (sql) => sql.replace("as needed\n", `as needed, ${odd.map(({ name }) => name)}\n`));
      await shop.succeed("scripts/ops/migrate.ts");
      const { code, stderr } = await shop.run(shop.script);
      assert.equal(code, 2);
      for (const { name, type } of odd) {
        const remedy =
          type === "text[]"
            ? "which it cannot hold"
            : `which has no safe mapping. Select it as a type that has one, for example "${name}"::text`;
        const named = type.replace("timetz", "time with time zone");
        const text = `column ${shop.table}.${name}: expected STRING NULLABLE (schemas/bigquery/${pipeline}.json), found ${named}, ${remedy}`;
        assert.ok(stderr.includes(text), `${text}\n${stderr}`);
      }
    });
  });
}

/** What the source or BigQuery refuses by itself: a value of a column, in SQL, and words of the refusal. */
const refusedByEngine: [what: string, column: string, value: string, says: RegExp][] = [
  ["20,000 levels of JSON", "json", "(repeat('[', 20000) || repeat(']', 20000))::json", /stack depth limit exceeded/],
  ["a row larger than BigQuery takes", "text", "repeat('x', 18000000)", /maximum|too large|object size/i],
  ["a byte that is not UTF-8", "text", "'caf' || chr(233)", /invalid byte sequence for encoding/],
];
await suite("a row that the source or BigQuery refuses", () => {
  const scratch = scratchCopy(); // the other suite has changed its own
  let shop: Shop;
  before(async () => {
    widen(scratch);
    // An old database: SQL_ASCII takes any byte, and no client is told which they are.
    shop = await createShop({ folder: scratch.folder, encoding: "SQL_ASCII" });
    await shop.admin.unsafe("create type mood as enum ('sad', 'it''s ok', 'happy')");
    const added = names.map((name) => `add "${name}" ${columns[name]?.[0]}`);
    await shop.admin.unsafe(`alter table ${shop.table} ${added.join(", ")}`);
    await shop.insertRows(1, 250);
  });
  after(async () => {
    await shop?.[Symbol.asyncDispose]();
    scratch[Symbol.dispose]();
  });

  for (const [what, column, value, says] of refusedByEngine)
    test(`is named by its key, in log2(n) steps: ${what}`, async () => {
      await shop.admin.unsafe(`update ${shop.table} set "${column}" = ${value} where id = 170`);
      const before = await shop.watermark();
      const { code, stderr } = await shop.run(shop.script);
      await shop.admin.unsafe(`update ${shop.table} set "${column}" = null where id = 170`);
      assert.match(stderr, /error: row id=170 of orders is refused: .*Correct it at the source, then: make orders/);
      assert.match(stderr, says);
      assert.equal(code, 1);
      assert.equal(await shop.watermark(), before);
      assert.deepEqual(await shop.stagingTables(), []);
    });

  test("passes once it is corrected", async () => {
    await shop.succeed(shop.script);
    assert.equal((await shop.query(`SELECT id FROM ${shop.pipeline}`)).length, 250);
  });
});
