// verify: finds every difference between source and destination, and repairs it. Needs the local stack (make up).
import assert from "node:assert/strict";
import { Readable } from "node:stream";
import { buffer } from "node:stream/consumers";
import { after, before, suite, test } from "node:test";
import fc from "fast-check";
import { pipelines } from "../../shared/pipelines.ts";
import { answer, createProxy, type Gate, type HttpProxy, hold, pass, reach, steps } from "../lib/faults.ts";
import { scratchCopy } from "../lib/scratch.ts";
import { createSensors, type Sensors } from "../lib/sensors.ts";
import { createShop, type Process, type Result, type Shop, until } from "../lib/shop.ts";

const verify = "scripts/ops/verify.ts";
type Variables = Record<string, string>;

/** What verify has counted of a pipeline, by kind. */
function counts({ stderr }: Result, pipeline: string): Variables {
  const line = new RegExp(`pipeline=${pipeline} .*step=compared (.*)`).exec(stderr)?.[1] ?? assert.fail(stderr);
  return Object.fromEntries([...line.matchAll(/(\w+)=(\S+)/g)].map(([, name = "", value = ""]) => [name, value]));
}

/** Requires that it names these differences, and no others: kind, key, columns. */
function assertFound(result: Result, expected: string[]): void {
  const lines = result.stderr.matchAll(/^ {2}(missing|extra|different|twice|unreachable) +(.*)$/gm);
  const found = [...lines].map(([, kind, what]) => `${kind} ${what}`);
  assert.deepEqual(found.sort(), [...expected].sort(), `${result.stdout}\n${result.stderr}`);
  assert.equal(result.code, expected.length ? 1 : 0, result.stderr);
}

async function finds(shop: Shop, expected: string[], variables: Variables = {}, pipeline = "orders"): Promise<Result> {
  const result = await shop.run(verify, { PIPELINE: pipeline, ...variables });
  assertFound(result, expected);
  return result;
}

const repair = { REPAIR: "1" };

const soak = process.env.SOAK === "1";

suite("every type", () => {
  /** Columns beyond the project's: name → type in Postgres, field in BigQuery. */
  const columns: Record<string, [postgres: string, field: object, values: string[]]> = {
    note: ["text", { type: "STRING" }, ["", "-", "1:a", "é", "𝄞", "a'b\\\"\n"]],
    ratio: ["float8", { type: "FLOAT" }, ["0", "-0", "1.1", "-1e-320", "5e-324", "1.7976931348623157e308", "2", "0.1"]],
    precise: ["numeric(38,9)", { type: "NUMERIC" }, ["0", "1.50", "-0.000000001", "12345678901234567890.5"]],
    wide: ["numeric(38,18)", { type: "BIGNUMERIC" }, ["1.5", "100", "-0.000000000000000001"]],
    moment: ["timestamptz", { type: "TIMESTAMP" }, ["0001-01-01 00:00:00.000001Z", "1969-12-31 23:59:59.999999Z"]],
    bytes: ["bytea", { type: "BYTES" }, ["\\x", "\\x00ff"]],
    tags: ["text[]", { type: "STRING", mode: "REPEATED" }, ["{}", '{""}', "{a,b}", '{"a,b"}']],
    sums: ["numeric(12,2)[]", { type: "NUMERIC", precision: "12", scale: "2", mode: "REPEATED" }, ["{1.50,-2}"]],
    doc: [
      "jsonb",
      { type: "JSON" },
      ["null", '{"b": 1.0, "a": [null]}', "[]", "9007199254740993", "18446744073709551615", "5e-324", "1e25", "0.1"],
    ],
    docs: ["json[]", { type: "JSON", mode: "REPEATED" }, ['{"{\\"a\\": 1}","[2]"}']],
    // The names that the statements use themselves.
    ...Object.fromEntries(["t", "s", "d", "line", "e", "n", "compared"].map((name) => [name, ["text", { type: "STRING" }, [name]]])),
  };
  const names = Object.keys(columns);
  const scratch = scratchCopy();
  let shop: Shop;
  before(async () => {
    scratch.editFields("orders", (fields) => [...fields, ...names.map((name) => ({ name, mode: "NULLABLE", ...columns[name]?.[1] }))]);
    scratch.edit("sql/orders.sql", (text) => text.replace("updated_at\nfrom", `updated_at, ${names.join(", ")}\nfrom`));
    shop = await createShop({ folder: scratch.folder });
    await shop.admin.unsafe(`alter table orders ${names.map((name) => `add ${name} ${columns[name]?.[0]}`).join(", ")}`);
    await shop.insertRows(1, 1500);
  });
  after(async () => {
    await shop?.[Symbol.asyncDispose]();
    scratch[Symbol.dispose]();
  });
  /** Sets a column of row i to its i-th value, and floats at random. */
  const fill = async (): Promise<void> => {
    const set = names.flatMap((name) => (columns[name]?.[2] ?? []).map((value, index) => ({ id: index + 1, [name]: value })));
    const bits = fc.sample(fc.bigInt({ min: -(2n ** 63n), max: 2n ** 63n - 1n }), 1000);
    const doubles = [...new Float64Array(new BigInt64Array(bits).buffer)].filter(Number.isFinite);
    set.push(...doubles.map((double, index) => ({ id: index + 100, ratio: String(double) })));
    for (const name of names)
      await shop.admin.unsafe(
        `update orders set ${name} = r.${name}::${columns[name]?.[0]}
         from jsonb_to_recordset($1::text::jsonb) r (id bigint, ${name} text) where orders.id = r.id and r.${name} is not null`,
        [JSON.stringify(set)],
      );
  };

  test("of any value, as each engine holds it, agrees: the smallest floats, microseconds, zeros behind a numeric, empty text and array", async () => {
    await fill();
    await shop.succeed("scripts/orders.ts");
    await finds(shop, []);
  });

  const changes: [change: string, columns: string][] = [
    ["note = NULL WHERE id = 1", "note"], // NULL and ''
    ["ratio = 5e-324 WHERE id = 2", "ratio"], // was -0, which BigQuery is given as 0
    ["ratio = 1.1000000000000003 WHERE id = 3", "ratio"],
    ["ratio = CAST('NaN' AS FLOAT64) WHERE id = 7", "ratio"],
    ["precise = NUMERIC '0.000000001' WHERE id = 1", "precise"],
    ["wide = BIGNUMERIC '1.500000000000000001' WHERE id = 1", "wide"],
    ["moment = TIMESTAMP '0001-01-01 00:00:00.000002+00' WHERE id = 1", "moment"],
    ["updated_at = TIMESTAMP_ADD(updated_at, INTERVAL 1 MICROSECOND) WHERE id = 4", "updated_at"],
    ["bytes = b'' WHERE id = 2", "bytes"],
    ["doc = NULL WHERE id = 2", "doc"],
    ["line = 't' WHERE id = 1", "line"],
  ];
  // At the source, behind its trigger's back: the local server updates no arrays and no JSON.
  const silent: typeof changes = [
    ["tags = '{\"a,b\"}' WHERE id = 3", "tags"],
    ["sums = '{1.50,-2.01}' WHERE id = 1", "sums"],
    [`docs = '{"{\\"a\\": 1}","[3]"}' WHERE id = 1`, "docs"],
    [`doc = '{"b": 1.0, "a": [null, null]}' WHERE id = 2`, "doc"],
    ["doc = '18446744073709551614' WHERE id = 5", "doc"],
  ];
  test("changed by the least there is, is found, with its column, and repaired", async () => {
    const expected = new Map<string, string[]>();
    await shop.admin`alter table orders disable trigger user`;
    for (const [change, column] of [...changes, ...silent]) {
      if (changes.some(([one]) => one === change)) await shop.query(`UPDATE orders SET ${change}`);
      else await shop.admin.unsafe(`update orders set ${change}`);
      const id = / id = (\d+)/.exec(change)?.[1] ?? "";
      expected.set(id, [...(expected.get(id) ?? []), column]);
    }
    const order = [...(await shop.query("SELECT * FROM orders LIMIT 1"))].flatMap((row) => Object.keys(row));
    const lines = [...expected].map(([id, of]) => {
      const sorted = [...new Set(of)].sort((a, b) => order.indexOf(a) - order.indexOf(b));
      return `different id=${id}: ${sorted.join(", ")}`;
    });
    await finds(shop, lines, { LIMIT: "100" });
    await finds(shop, [], repair);
    await shop.admin`alter table orders enable trigger user`;
  });

  test("but a JSON number that BigQuery would round: it is refused by name, by a run and by verify", async () => {
    const wide = ["12345678901234567890123456789.123456789", "18446744073709551617", "9007199254740993.0", "1e400", "1e-400"];
    const out = "out of range for type double precision";
    for (const [at, number] of wide.entries()) {
      const [column, value] = at % 2 ? ["doc", `{"a": [{"n": ${number}}]}`] : ["docs", `{"[${number}]"}`];
      await shop.admin.unsafe(
        `update orders set doc = null, docs = '{}' where id = 30; update orders set ${column} = '${value}' where id = 30`,
      );
      await shop.refused("scripts/orders.ts", 1, new RegExp(`row id=30 of orders is refused: .*(column ${column} cannot hold|${out})`));
    }
    assert.match((await shop.run(verify, { PIPELINE: "orders" })).stderr, /row id=30 of orders is refused: /);
    await shop.admin`update orders set docs = '{}' where id = 30`;
    await shop.succeed("scripts/orders.ts");
    await finds(shop, []);
  });
});

suite("many rows", () => {
  test("that all differ are repaired, and most of them swept, in as much memory as few rows take", async () => {
    const many = soak ? 1_000_000 : 100_000;
    await using shop = await createShop();
    await shop.insertRows(1, 10);
    await shop.succeed("scripts/orders.ts");
    const peak = ({ stderr }: Result): number => Number(/step=done .*peak_rss_mb=(\d+)/.exec(stderr)?.[1]);
    const few = peak(await finds(shop, [], repair));
    await shop.admin.unsafe(`alter table orders disable trigger user;
      insert into orders (id, user_id, status, total, created_at, updated_at)
      select i, i % 100, 'paid', i / 100.0, '2017-01-01Z', '2017-01-01Z' from generate_series(11, ${many + 10}) i`);
    const repaired = await finds(shop, [], repair);
    const { rows, repaired: written } = counts(repaired, "orders");
    assert.deepEqual({ rows, written }, { rows: String(many + 10), written: String(many) });
    await shop.admin`delete from orders where id > 10`;
    const swept = await shop.succeed("scripts/ops/sweep.ts", { PIPELINE: "orders", CONFIRM: "1" });
    assert.match(swept.stderr, new RegExp(`step=swept deleted=${many} kept=0`));
    const peaks = [few, peak(repaired), peak(swept)];
    assert.ok(Math.max(...peaks) - few <= 50, `${peaks} MB: of few rows, repaired, swept`);
  });
});

suite("a shop's orders", () => {
  let shop: Shop;
  before(async () => {
    shop = await createShop({ clickhouse: true, pushgateway: true });
    await shop.insertRows(1, 2500);
    await shop.succeed("scripts/orders.ts");
  });
  after(() => shop?.[Symbol.asyncDispose]());
  const sync = () => shop.succeed("scripts/orders.ts");
  /** Behind the trigger's back: source and destination then differ, and no cursor tells. */
  const silently = (sql: string) =>
    shop.admin.unsafe(`alter table orders disable trigger user; ${sql}; alter table orders enable trigger user`);
  /** As it starts, with a proxy before BigQuery in which `gate` is at the first request of `step`, or, after `others` of them, at the next. */
  const startHeld = async (script: string, variables: Variables, step: RegExp, gate: Gate, others = 0): Promise<[Process, HttpProxy]> => {
    const proxy = await createProxy(shop.env.BIGQUERY_ENDPOINT);
    proxy.fault(step, pass, others);
    proxy.fault(step, gate, 1);
    const run = shop.start(script, { PIPELINE: "orders", BIGQUERY_ENDPOINT: proxy.url, ...variables });
    await reach(run, gate.reached);
    return [run, proxy];
  };
  /** Its statements: the comparison; with REPAIR=1 then the MERGE and the comparison again, twice where a key was. */
  const statements = /^POST \/bigquery.+\/jobs$/;
  const [merge, secondMerge] = [1, 3];

  test("missing, extra, twice, swapped and changed rows are found, in one pass, and repaired; the metric says how many, and when all agreed", async () => {
    await shop.query("DELETE FROM orders WHERE id = 7");
    await shop.query("INSERT INTO orders (id, created_at, updated_at) VALUES (9000001, TIMESTAMP '2017-01-01', TIMESTAMP '2017-01-01')");
    await shop.query("INSERT INTO orders SELECT * FROM orders WHERE id = 900");
    await shop.query("UPDATE orders SET total = IF(id = 1500, 15.01, 15.00) WHERE id IN (1500, 1501)"); // each has the other's
    await silently("update orders set status = '' where id = 8; update orders set status = null where id = 9");
    await shop.query("UPDATE orders SET status = NULL WHERE id = 8");
    await shop.query("UPDATE orders SET status = '' WHERE id = 9");
    const expected = ["missing id=7", "extra id=9000001", "twice id=900", "different id=1500: total", "different id=1501: total"];
    expected.push("different id=8: status", "different id=9: status");
    const result = await finds(shop, expected);
    const { missing, extra, different, twice } = counts(result, "orders");
    assert.deepEqual({ missing, extra, different, twice }, { missing: "1", extra: "1", different: "4", twice: "1" });
    assert.match(result.stderr, /^error: 7 rows of orders differ:$/m);
    const before = await shop.metrics();
    assert.equal(before.etl_verify_differences, 7);
    assert.equal(before.etl_verify_last_success_timestamp_seconds, undefined);
    const few = await shop.run(verify, { PIPELINE: "orders", LIMIT: "2" });
    assert.match(few.stderr, /\n {2}… and 2 more \(LIMIT=\)\nNext: make verify PIPELINE=orders REPAIR=1$/);

    const after = counts(await finds(shop, [], repair), "orders");
    assert.deepEqual([after.missing, after.extra, after.different, after.twice, after.repaired], ["0", "0", "0", "0", "9"]);
    assert.deepEqual(await shop.destinationRows(), await shop.sourceRows());
    assert.deepEqual(await shop.stagingTables(), []);
    const metrics = await shop.metrics();
    assert.equal(metrics.etl_verify_differences, 0);
    const [run] = await shop.admin`
      select state, extract(epoch from started_at)::float8 as begun from etl.runs order by started_at desc limit 1`;
    assert.equal(run?.state, "succeeded");
    assert.ok((metrics.etl_verify_last_success_timestamp_seconds ?? 0) >= run?.begun);
  });

  test("rows at or past the watermark are the next run's, on either side", async () => {
    await shop.updateRows(1, 10, "since the watermark");
    await shop.insertRows(3001, 3003);
    await shop.admin`delete from orders where id = 3003`;
    assert.equal(counts(await finds(shop, []), "orders").new, "12");
    await sync();
    assert.equal(counts(await finds(shop, []), "orders").new, "0");
  });

  test("what changes before it reads the source, or between source and destination, is no difference, whether a whole run brings it or not", async () => {
    for (const [step, from] of [
      [steps.createStaging, 3100],
      [statements, 3200],
    ] as const) {
      const gate = hold();
      const [run, proxy] = await startHeld(verify, {}, step, gate);
      await using _proxy = proxy;
      for (const brought of [true, false]) {
        const first = from + (brought ? 0 : 10);
        await shop.updateRows(first - 2000, first - 1995, "meanwhile");
        await shop.insertRows(first, first + 5);
        // Of those that are synced, one that is deleted before it reads the source is a true difference.
        await shop.admin`delete from orders where id in (${step === statements ? first - 1994 : first}, ${first})`;
        if (brought) await sync();
      }
      gate.release();
      assertFound(await run.ended, []);
      await sync();
      await shop.succeed("scripts/ops/sweep.ts", { PIPELINE: "orders" });
    }
    await finds(shop, []);
  });

  test("what a sweep removes between source and destination is compared again", async () => {
    const gate = hold();
    const [run, proxy] = await startHeld(verify, {}, statements, gate);
    await using _proxy = proxy;
    await shop.admin`delete from orders where id = 35`;
    assert.match((await shop.succeed("scripts/ops/sweep.ts", { PIPELINE: "orders" })).stderr, /step=swept deleted=1/);
    gate.release();
    const result = await run.ended;
    assertFound(result, []);
    assert.match(result.stderr, /step=again because="rows are missing, which a sweep/);
  });

  test("a row whose updated_at lies in the future is unreachable, until the statement that verify prints has run", async () => {
    await silently("update orders set updated_at = '2099-01-01', status = 'future' where id = 36");
    await sync();
    const { stderr } = await finds(shop, ["unreachable id=36"], repair);
    assert.match(stderr, /^Next: make orders \(rows of the future/m);
    const statement = /no run reads them before\. Run: (.+?;)/.exec(stderr)?.[1] ?? "";
    await shop.admin.unsafe(statement);
    await sync();
    await finds(shop, []);
  });

  test("a repair waits for the lock, and says who holds it", async () => {
    await shop.query("UPDATE orders SET total = total + 0.01 WHERE id = 40");
    const lock = shop.connect("etl:orders run=somebody");
    await lock`select pg_advisory_lock(hashtextextended('etl:orders', 0))`;
    const run = shop.start(verify, { PIPELINE: "orders", ...repair });
    await run.line(/step=waiting because="another run holds the lock" holder="etl:orders run=somebody"/);
    await finds(shop, ["different id=40: total"]); // who only reads needs no lock
    await lock.end();
    assertFound(await run.ended, []);
  });

  test("killed between the two MERGEs of a repair, which deletes what is twice at first, the same command repairs it", async () => {
    await shop.query("DELETE FROM orders WHERE id BETWEEN 50 AND 60");
    await shop.query("UPDATE orders SET item_count = -1 WHERE id BETWEEN 61 AND 70");
    await shop.query("INSERT INTO orders SELECT * FROM orders WHERE id = 71");
    const [run, proxy] = await startHeld(verify, repair, statements, hold(), secondMerge);
    await using _proxy = proxy;
    run.child.kill("SIGKILL");
    await run.ended;
    // Its lock goes with its session.
    assert.equal(counts(await finds(shop, [], repair), "orders").repaired, "1");
    assert.deepEqual(await shop.destinationRows(), await shop.sourceRows());
  });

  test("a repair that has lost its lock replaces and deletes nothing that a run brought meanwhile", async () => {
    await shop.query("UPDATE orders SET total = total + 1 WHERE id IN (80, 81, 82)");
    await shop.query("INSERT INTO orders SELECT * REPLACE (9000080 AS id) FROM orders WHERE id = 80");
    await shop.query("INSERT INTO orders SELECT * FROM orders WHERE id = 82");
    const gate = hold();
    const [run, proxy] = await startHeld(verify, repair, statements, gate, merge);
    await using _proxy = proxy;
    const change = "SET status = 'newer', updated_at = CURRENT_TIMESTAMP()";
    await shop.query(`UPDATE orders ${change} WHERE id IN (80, 82, 9000080)`);
    gate.release();
    const result = await run.ended;
    assertFound(result, []);
    const { repaired, new: fresh } = counts(result, "orders");
    assert.deepEqual({ repaired, fresh }, { repaired: "1", fresh: "3" });
    await sync(); // the watermark passes them
    await finds(shop, ["different id=80: status, total, updated_at", "twice id=82", "extra id=9000080"]);
    await finds(shop, [], repair);
  });

  test("a source that was restored from an older backup is noticed, and after make rewind its rows win", async () => {
    const backup = await shop.sourceRows();
    const [{ at } = { at: "" }] = await shop.admin`select now()::text as at`;
    await shop.updateRows(100, 102, "after the backup");
    await shop.insertRows(5001, 5002);
    await sync();
    // The backup, loaded into the same server.
    await silently("delete from orders where id > 5000");
    for (const row of backup.filter(({ id }) => Number(id) >= 100 && Number(id) <= 102))
      await silently(
        `update orders set status = '${row.status}', updated_at = 'epoch'::timestamptz + ${row.updated_at} * interval '1 us' where id = ${row.id}`,
      );
    const changed = [100, 101, 102].map((id) => `different id=${id}: status, updated_at`);
    await finds(shop, [...changed, "extra id=5001", "extra id=5002"]);
    await shop.succeed("scripts/ops/rewind.ts", { PIPELINE: "orders", TO: at.replace(" ", "T").replace(/\+00$/, "Z") });
    await sync();
    await finds(shop, [], repair);
    assert.deepEqual(await shop.destinationRows(), await shop.sourceRows());
  });

  test("a source that is another server than the watermark's is said, and nothing is repaired from it", async () => {
    await shop.query("DELETE FROM orders WHERE id = 110");
    await shop.admin`update etl.watermarks set server = server || '0' where pipeline = 'orders'`;
    const says = /is another one than the watermark \S+ was taken from .* Next: ops\/runbook\.md.+make rewind PIPELINE=orders TO=…/;
    try {
      assert.match((await finds(shop, ["missing id=110"])).stderr, says);
      const { stderr } = await shop.refused(verify, 2, /error: nothing was written or deleted: /, { PIPELINE: "orders", ...repair });
      assert.match(stderr, says);
    } finally {
      await shop.admin`update etl.watermarks set server = rtrim(server, '0') where pipeline = 'orders'`;
    }
    await finds(shop, [], repair);
  });

  test("without PIPELINE all are verified, one that fails does not keep the others from it; what cannot be is refused", async () => {
    const users = await shop.run(verify);
    assert.match(users.stderr, /users: users has no watermark: it has never run, and nothing of it is synced\. Next: make users/);
    assert.deepEqual([counts(users, "orders").different, counts(users, "sensors").different], ["0", "0"]);
    assert.equal(users.code, 1);
    const refused: [Variables, RegExp][] = [
      [
        { PIPELINE: "events" },
        new RegExp(`PIPELINE must be one of ${pipelines().join(", ")}, sensors \\(of events: make verify-events FROM=… TO=…\\)`),
      ],
      [
        { PIPELINE: "sensors", ...repair },
        /REPAIR=1 is not available for sensors: a change in Kafka could overwrite the repair\. Next: make resnapshot/,
      ],
    ];
    for (const [variables, says] of refused) await shop.refused(verify, 2, says, variables);
  });

  test("a destination that cannot be read is no agreement", async () => {
    await using proxy = await createProxy(shop.env.BIGQUERY_ENDPOINT);
    proxy.fault(steps.anything, answer(403, { reason: "accessDenied" }));
    const variables = { PIPELINE: "orders", BIGQUERY_ENDPOINT: proxy.url };
    await shop.refused(verify, 1, /cannot read the destination table/, variables);
  });
});

suite("readings", () => {
  let sensors: Sensors;
  before(async () => {
    sensors = await createSensors();
    const { admin } = sensors.shop;
    await admin`
      insert into sensor_readings (id, sensor_id, metric, value, recorded_at)
      select i, 'S' || i % 7, 'm', i / 7.0, '2024-01-01Z'::timestamptz + i * interval '1 s' from generate_series(1, 3000) i`;
    const values = ["NaN", "-0", "0", "Infinity", "-Infinity", "5e-324", null];
    for (const [index, value] of values.entries())
      await admin`
        insert into sensor_readings (id, sensor_id, metric, value, recorded_at)
        values (${-1 - index}, ${index % 2 ? null : ""}, ${index % 2 ? "é" : null}, ${value}::text::float8, '1969-12-31 23:59:59.999999Z')`;
    await sensors.catchUp();
    await until("all is there", async () => {
      if ((await sensors.readings()).length === 3007) return true;
      await sensors.catchUp();
      return false;
    });
  });
  after(() => sensors?.[Symbol.asyncDispose]());
  const find = (expected: string[]) => finds(sensors.shop, expected, {}, "sensors");
  /** Puts a row into ClickHouse that no message of the topic can beat, beside the row's own `sensor`. */
  const put = (id: number, values: string, deleted = 0) =>
    sensors.shop.clickhouse.command({
      query: `INSERT INTO sensor_readings (id, sensor_id, metric, value, recorded_at, _version, _deleted) SELECT id, ${values}, bitShiftLeft(toUInt64(9), 48), ${deleted} FROM sensor_readings FINAL WHERE id = ${id}`,
    });

  const tables = async (): Promise<string[]> => {
    const query = "SELECT name FROM system.tables WHERE database = currentDatabase() AND name LIKE 'verify%'";
    return (await sensors.shop.select<{ name: string }>(query)).map(({ name }) => name);
  };

  test("of every kind of value agree, young ones and those of the future too; the tables of a killed verify go with the next", async () => {
    const { admin, clickhouse } = sensors.shop;
    await admin`
      insert into sensor_readings (id, sensor_id, recorded_at)
      values (5001, 'young', now()), (5002, 'future', '9999-12-31 23:59:59.999999Z'), (5003, 'old', '0001-01-01Z')`;
    await until("they are there", async () => {
      await sensors.catchUp();
      return (await sensors.readings()).length === 3010;
    });
    await clickhouse.command({ query: "CREATE TABLE verify_source ENGINE = Memory AS SELECT 1 AS id" });
    assert.equal(counts(await find([]), "sensors").rows, "3010");
    assert.deepEqual(await tables(), []);
  });

  test("that differ for the moment, and that change once more, after the source was read again, are none that differ, arrived or not", async () => {
    const { shop } = sensors;
    const update = (id: number, value: number) => shop.admin`update sensor_readings set value = ${value} where id = ${id}`;
    await using proxy = await createProxy(shop.env.CLICKHOUSE_URL);
    const still = hold();
    // A statement is the request's body.
    proxy.fault(/^POST/, async ({ request, send, reply }) => {
      const body = await buffer(request);
      if (body.includes("_still ENGINE"))
        await still({ request: Readable.from([body]), send: async () => {}, reply: async () => {} } as never);
      await reply(await send(body));
    });
    for (const id of [19, 20]) await update(id, -2);
    await shop.admin`delete from sensor_readings where id = 18`;
    const run = shop.start(verify, { PIPELINE: "sensors", CLICKHOUSE_URL: proxy.url });
    await run.line(/step=again because="what differs may be on its way" differences=3/);
    const consumer = await sensors.consumer();
    await reach(run, still.reached); // all that was committed has arrived
    await update(20, -3);
    await until("it has arrived", async () => (await sensors.readings()).some(({ id, value }) => id === "20" && value === "-3"));
    consumer.child.kill("SIGTERM");
    await consumer.ended;
    await update(19, -3);
    still.release();
    const result = await run.ended;
    assertFound(result, []);
    assert.equal(counts(result, "sensors").new, "3");
    await sensors.catchUp();
  });

  test("that differ are found, to the bit, by id and column, with the command that repairs them", async () => {
    const consumer = await sensors.consumer();
    await put(-2, "sensor_id, metric, 0., recorded_at"); // -0
    await put(-1, "sensor_id, metric, NULL, recorded_at"); // NaN
    await put(21, "sensor_id, metric, value, recorded_at", 1);
    await put(22, "'other', metric, value, recorded_at"); // beside the one under its own sorting key
    await put(5002, "sensor_id, metric, 5., recorded_at"); // in the future
    await sensors.shop.clickhouse.command({
      query: "INSERT INTO sensor_readings (id, sensor_id, recorded_at, _version) VALUES (9000, 'extra', '2024-01-01 00:00:00', 1)",
    });
    const { stderr } = await find([
      "different id=-2: value",
      "different id=-1: value",
      "missing id=21",
      "twice id=22",
      "different id=5002: value",
      "extra id=9000",
    ]);
    assert.match(stderr, /^Next: make dead-letters \(changes that were dead-lettered are missing\), else make resnapshot$/m);
    consumer.child.kill("SIGTERM");
    await consumer.ended;
  });
});
