// Any value Postgres can hold arrives equal, or its row is refused by name. Needs the local stack (make up).
import assert from "node:assert/strict";
import { join } from "node:path";
import { after, suite, test } from "node:test";
import fc from "fast-check";
import { jsonLines } from "../../shared/bigquery/types.ts";
import { openSession } from "../../shared/session.ts";
import { anyJson, anyText, seed } from "../lib/random.ts";
import { scratchCopy } from "../lib/scratch.ts";
import { createShop, ofSteps, type Shop, type ShopOptions } from "../lib/shop.ts";
import { jsons, texts } from "../lib/texts.ts";

const integers = ["0", "-1", "9223372036854775807", "-9223372036854775808", "9007199254740993", "-9007199254740993"];
const floats = ["0", "-1.5", "0.1", "1e20", "1e-7"];
const times = ["-01-01 00:00:00", "-12-31 23:59:59.999999"];
const moments = [
  ...["0001", "0099", "1899", "1969", "1970", "2017", "9999"].flatMap((year) => times.map((time) => year + time)),
  "2016-02-29 12:34:56.000001",
  "1969-12-31 23:59:59.999999",
];
const wide = `${"9".repeat(29)}.${"9".repeat(9)}`;

/** Columns that the test's tables have beyond the project's: type in Postgres, type in BigQuery, values at the edges. */
const columns: Record<string, [postgres: string, bigquery: string, values: string[]]> = {
  int8: ["int8", "INTEGER", integers],
  int4: ["int4", "INTEGER", ["2147483647", "-2147483648"]],
  money: ["numeric(12,2)", "NUMERIC", ["9999999999.99", "-9999999999.99", "0.01", "0", "100.00"]],
  text: ["text", "STRING", texts],
  varchar: ["varchar(40)", "STRING", ["", "trailing  ", "\n"]],
  char: ["char(5)", "STRING", ["", "a", "a  b", "👩"]],
  bool: ["bool", "BOOLEAN", ["true", "false"]],
  int2: ["int2", "INTEGER", ["32767", "-32768"]],
  float4: ["float4", "FLOAT", [...floats, "3.4028235e38", "1e-45", "16777217"]],
  float8: [
    "float8",
    "FLOAT",
    [...floats, "1.7976931348623157e308", "5e-324", "0.30000000000000004", "9007199254740993", "123456.789012345"],
  ],
  bytea: ["bytea", "BYTES", ["\\x", "\\x00", "\\x0102ff5c", `\\x${"00ff0a".repeat(50)}`]],
  uuid: ["uuid", "STRING", ["00000000-0000-0000-0000-000000000000", "A0EEBC99-9C0B-4EF8-BB6D-6BB9BD380A11"]],
  enum: ["mood", "STRING", ["sad", "it's ok"]],
  inet: ["inet", "STRING", ["192.168.0.1/24", "10.0.0.1", "::1", "2001:db8::/32"]],
  cidr: ["cidr", "STRING", ["10.0.0.0/8", "2001:db8::/32"]],
  interval: ["interval", "STRING", ["0", "1 year 2 months -3 days 04:05:06.789012", "-00:00:00.000001", "1000 years", "P1Y2M3DT4H5M6S"]],
  date: ["date", "DATE", ["0001-01-01", "1969-12-31", "2016-02-29", "9999-12-31"]],
  time: ["time", "TIME", ["00:00:00", "23:59:59.999999", "12:00:00.000001"]],
  timestamp: ["timestamp", "DATETIME", moments],
  timestamptz: ["timestamptz", "TIMESTAMP", [...moments.map((moment) => `${moment}Z`), "2017-03-12 02:30:00.123456-05:45"]],
  numeric: ["numeric(38,9)", "NUMERIC", [wide, `-${wide}`, "0.000000001", "1234567.890000000"]],
  // local-bigquery has no more digits: it refuses 39, and rounds to 18.
  bignumeric: ["numeric(38,18)", "BIGNUMERIC", [`${"9".repeat(20)}.${"9".repeat(18)}`, `-0.${"0".repeat(17)}1`]],
  any_numeric: ["numeric", "NUMERIC", ["1.50", "1e10", "12345678901234567890.123456789"]],
  numeric_text: ["numeric", "STRING", ["1.500", `${"9".repeat(60)}.${"1".repeat(60)}`, "NaN", "Infinity"]],
  jsonb: ["jsonb", "JSON", jsons],
  jsonb_text: [
    "jsonb",
    "STRING",
    [...jsons, "null", '""', '"\\""', '{"big": 123456789012345678901234567890.123456789012345678901234567890}'],
  ],
  json: ["json", "JSON", [...jsons, '{\n\t"b" : 1,\r\n "a":\n2 }']],
  json_text: ["json", "STRING", [...jsons, "null", '{ "a":1,"a" : 2,\n"b":0 }']],
  ints: ["int4[]", "INTEGER", ["{}", "{0}", "{3,-1,2147483647,3}", "[5:6]={7,8}"]],
  texts: [
    "text[]",
    "STRING",
    [
      `{${texts.slice(0, -1).map((text) =>
        JSON.stringify(text)
          .replace(/\\u(....)/g, (_, hex) => String.fromCharCode(Number.parseInt(hex, 16)))
          .replace(/\\([nrt])/g, (_, c) => ({ n: "\n", r: "\r", t: "\t" })[c as "n"]),
      )}}`,
    ],
  ],
  moneys: ["numeric(12,2)[]", "NUMERIC", ["{9999999999.99,-0.01,0}"]],
  any_numerics: ["numeric[]", "NUMERIC", [`{${wide},0.000000001,-1e10}`]],
  moments: ["timestamptz[]", "TIMESTAMP", [`{${moments.map((moment) => `"${moment}Z"`)}}`]],
  bytes: ["bytea[]", "BYTES", ['{"\\\\x","\\\\x00ff"}']],
  enums: ["mood[]", "STRING", [`{sad,"it's ok",sad}`]],
  jsonbs: ["jsonb[]", "JSON", [String.raw`{"{\"a\": [1, null]}","[]","12"}`]],
  // Names that our SQL has as aliases.
  line: ["text", "STRING", ["line"]],
  s: ["numeric", "NUMERIC", ["1.5"]],
  t: ["text[]", "STRING", ["{a,b}"]],
  e: ["int4[]", "INTEGER", ["{3,1,2}"]],
  n: ["int8", "INTEGER", ["7"]],
  p: ["jsonb", "JSON", ['{"n": 1.5}']],
  q: ["timestamptz", "TIMESTAMP", ["2017-01-01Z"]],
};
const names = Object.keys(columns);
const isArray = (type = ""): boolean => type.endsWith("[]");

/** Such a shop, in a database whose defaults write every type in another form than BigQuery reads. */
async function createWideShop(options: ShopOptions): Promise<Shop> {
  const shop = await createShop({ folder: scratch.folder, ...options });
  const added = names.map((name) => `add "${name}" ${columns[name]?.[0]}`);
  await shop.admin.unsafe(`create type mood as enum ('sad', 'it''s ok', 'happy'); alter table ${shop.table} ${added.join(", ")}`);
  const others = ["TimeZone = 'Asia/Kathmandu'", "DateStyle = 'SQL, DMY'", "IntervalStyle = 'sql_standard'"];
  for (const setting of [...others, "bytea_output = 'escape'", "extra_float_digits = -5"])
    await shop.admin.unsafe(`alter database ${shop.dataset} set ${setting}`);
  return shop;
}

/** A copy of the project that syncs these columns. */
using scratch = scratchCopy();
for (const pipeline of ofSteps) {
  const added = names.map((name) => {
    const [type, bigquery] = columns[name] ?? [];
    const size = type?.startsWith("numeric(12,2)") ? { precision: "12", scale: "2" } : {};
    return { name, type: bigquery, mode: isArray(type) ? "REPEATED" : "NULLABLE", ...size };
  });
  scratch.editFields(pipeline, (fields) => [...fields, ...added, { name: "needed", type: "STRING", mode: "REQUIRED" }]);
  const more = `${names.map((name) => `"${name}"`)}, nullif(coalesce(text, 'there'), 'gone') as needed`;
  scratch.edit(`sql/${pipeline}.sql`, (text) => text.replace("updated_at\nfrom", `updated_at, ${more}\nfrom`));
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
      ? `(select coalesce(array_agg((${value("e")})::${type.slice(0, -2)} order by n), '{}')
          from jsonb_array_elements_text("${name}"::jsonb) with ordinality a(e, n)) as "${name}"`
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

/** One row for each value, and one that has NULL everywhere. */
const edgeRows = [
  ["created_at", moments.map((moment) => `${moment}Z`)] as const,
  ...names.map((name) => [name, columns[name]?.[2] ?? []] as const),
]
  .flatMap(([name, values]) => values.map((value) => ({ [name]: value })))
  .concat({})
  .map((row, index) => ({ created_at: "2017-01-01Z", ...row, id: String(index + 1) }));

/** Values that BigQuery would change: column, value, how Postgres writes it, the field where that is another. */
const unmappable: [column: string, value: string, written?: string, of?: string][] = [
  ["any_numeric", "0.0000000001"], // BigQuery would round it to NUMERIC's nine decimals
  ["float8", "NaN"],
  ["ints", "{1,NULL}"],
  ["ints", "{{1,2},{3,4}}"],
  ["any_numerics", "{1.00,0.0000000001}"],
  ["jsonbs", '{"null"}'],
  ["jsonb", '{"n": 0.1234567890123456789}'], // neither an integer of 64 bits nor a double
  ["text", "gone", "NULL", "needed"], // an expression that is NULL, in a REQUIRED field
];

const withoutMapping = ["tsvector", "point", "xml", "money", "timetz", "int4range", "bit(3)", "macaddr", "oid", "mood_pair"];

/** What the source or BigQuery refuses by itself: the id of a row, a value of its column, in SQL, and words of the refusal. */
const refusedByEngine: [what: string, id: number, column: string, value: string, says: RegExp][] = [
  ["20,000 levels of JSON", 7, "json", "(repeat('[', 20000) || repeat(']', 20000))::json", /stack depth limit exceeded/],
  ["a row larger than BigQuery takes", 20, "text", "repeat('x', 18000000)", /maximum|too large|object size/i],
  ["a JSON number beyond FLOAT64", 5, "p", "'[1e309]'", /out of range for type double precision/],
  ["NaN in a NUMERIC", 3, "money", "'NaN'", /errors: 1/],
  ["a time before Christ", 4, "timestamp", "'0001-12-31 23:59:59 BC'", /errors: 1/],
  ["a byte that is not UTF-8", 17, "text", "'caf' || chr(233)", /invalid byte sequence for encoding/],
];
await suite("a row that the source or BigQuery refuses", async () => {
  // An old database: SQL_ASCII takes any byte, and no client is told which they are.
  const shop = await createWideShop({ encoding: "SQL_ASCII" });
  after(() => shop[Symbol.asyncDispose]());
  await shop.insertRows(1, 20);

  for (const [what, id, column, value, says] of refusedByEngine)
    test(`is named by its key, in log2(n) steps: ${what}`, async () => {
      await shop.admin.unsafe(`update ${shop.table} set "${column}" = ${value} where id = ${id}`);
      const before = await shop.watermark();
      const { code, stderr } = await shop.run(shop.script);
      await shop.admin.unsafe(`update ${shop.table} set "${column}" = null where id = ${id}`);
      assert.match(stderr, new RegExp(`error: row id=${id} of orders is refused: .*Correct it at the source, then: make orders`));
      assert.match(stderr, says);
      assert.equal(code, 1);
      assert.equal(await shop.watermark(), before);
      assert.deepEqual(await shop.stagingTables(), []);
    });

  test("passes once it is corrected", async () => {
    await shop.succeed(shop.script);
    assert.equal((await shop.query(`SELECT id FROM ${shop.pipeline}`)).length, 20);
  });
});

for (const pipeline of ofSteps) {
  await suite(pipeline, async () => {
    const shop = await createWideShop({ pipeline });
    after(() => shop[Symbol.asyncDispose]());

    test("any value Postgres can hold arrives equal, whatever the database's defaults", async () => {
      await upsert(shop, edgeRows);
      await upsert(
        shop,
        integers.slice(1).map((id) => ({ id, created_at: "2017-01-01Z" })),
      );
      await shop.succeed(shop.script);
      assert.deepEqual(await differences(shop), []);
      const apart = `SELECT COUNTIF(jsonb_text = 'null') AS json_null FROM ${pipeline}`; // differences() takes it for NULL
      assert.deepEqual(await shop.query(apart), [{ json_null: "1" }]);
    });

    test("random text, bytes and JSON arrive equal, as new rows and as changed ones", async () => {
      const row = fc.record({
        money: fc.integer().map((cents) => String(cents / 100)),
        texts: fc.array(anyText()).map((all) => `{${all.map((one) => `"${one.replace(/["\\]/g, "\\$&")}"`)}}`),
        text: fc.option(anyText()),
        jsonb: fc.option(anyJson()),
        json: anyJson(),
        json_text: anyJson(),
        bytea: fc.uint8Array({ maxLength: 90 }).map((bytes) => `\\x${Buffer.from(bytes).toString("hex")}`),
        float8: fc.double({ noNaN: true, noDefaultInfinity: true }).map(String),
        int8: fc.bigInt({ min: -(2n ** 63n), max: 2n ** 63n - 1n }).map(String),
        created_at: fc
          .date({ min: new Date("0001-01-02"), max: new Date("9999-12-30"), noInvalidDate: true })
          .map((date) => date.toISOString().replace("Z", "123Z")),
      });
      for (const rows of fc.sample(fc.array(row, { minLength: 100, maxLength: 100 }), { seed, numRuns: 2 })) {
        await upsert(
          shop,
          rows.map((values, index) => ({ ...values, id: String(100_000 + index) })),
        );
        await shop.succeed(shop.script);
        assert.deepEqual(await differences(shop), []);
      }
    });

    test("a value that BigQuery would change is refused by pipeline, primary key and column, and nothing moves", async () => {
      const { checkSource, readContract }: typeof import("../../shared/bigquery/contract.ts") = await import(
        join(scratch.folder, "shared/bigquery/contract.ts")
      );
      await using source = openSession(shop.env.SOURCE_DATABASE_URL ?? "", { application: "test", timeoutSeconds: 60 });
      const contract = readContract(pipeline);
      const columns = await checkSource({ pipeline, source, log: () => {}, metrics: {} }, contract);
      const before = (await shop.watermark()) ?? "";
      await source`select set_config('etl.from', ${before}, false), set_config('etl.to', 'infinity', false)`;
      for (const [column, value, written = value, of = column] of unmappable) {
        await upsert(shop, [{ id: "-7", created_at: "2017-01-01Z", [column]: value }]);
        const refused = source.unsafe(jsonLines(contract.fields, contract.source.select, columns));
        await assert.rejects(refused, new RegExp(`"column ${of} cannot hold ${RegExp.escape(written)}`));
        await shop.admin`delete from ${shop.admin(shop.table)} where id = -7`;
      }
      await upsert(shop, [{ id: "-7", created_at: "2017-01-01Z", float8: "NaN" }]);
      const { code, stderr } = await shop.run(shop.script);
      await shop.admin`delete from ${shop.admin(shop.table)} where id = -7`;
      assert.match(
        stderr,
        new RegExp(`error: row id=-7 of ${pipeline} is refused: .*"column float8 cannot hold NaN"\\. Correct it at the source`),
      );
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
        const expected = `expected STRING NULLABLE (schemas/bigquery/${pipeline}.json)`;
        const text = `column ${shop.table}.${name}: ${expected}, found ${named}, ${remedy}`;
        assert.ok(stderr.includes(text), `${text}\n${stderr}`);
      }
    });
  });
}
