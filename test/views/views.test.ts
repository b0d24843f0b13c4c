// make views: order, build, checks, guards, publishing. With small models of its own; those of views/ have test/views/models.test.ts.
import assert from "node:assert/strict";
import { mkdirSync, rmSync, writeFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { buffer } from "node:stream/consumers";
import { afterEach, test } from "node:test";
import { tablesRead } from "../../shared/views/models.ts";
import { assertNoSessions, createProxy, ending, hold, lastRun, loseAnswer, pass, reach, steps, withhold } from "../lib/faults.ts";
import { random } from "../lib/random.ts";
import { scratchCopy } from "../lib/scratch.ts";
import { createShop, type Result, until } from "../lib/shop.ts";
import type { Env } from "../stack/env.ts";

const script = "scripts/views.ts";
using scratch = scratchCopy(["ops"]);
await using shop = await createShop({ folder: scratch.folder, pushgateway: true });
const warehouse = `${shop.dataset}_warehouse`;
await shop.insertRows(1, 100);
await shop.insertRows(1, 20, "users");
await Promise.all([shop.succeed("scripts/orders.ts"), shop.succeed("scripts/users.ts")]);
/** So that no test depends on how long those before it took. */
const freshen = (): Promise<unknown> => shop.admin`update etl.watermarks set watermark = now()`;
afterEach(freshen);

/** The models and checks that there are: { a: "SELECT …", "checks/a__key": "SELECT …" }; a model may leave its CREATE out. */
function models(files: Record<string, string>): void {
  rmSync(join(scratch.folder, "views"), { recursive: true, force: true });
  for (const [name, sql] of Object.entries(files)) {
    const file = join(scratch.folder, "views", `${name}.sql`);
    mkdirSync(dirname(file), { recursive: true });
    writeFileSync(file, /^(SELECT|WITH)/.test(sql) && !name.includes("/") ? `CREATE OR REPLACE TABLE ${name}\nAS\n${sql};\n` : sql);
  }
}

const get = (path: string) => shop.api(`/datasets${path}`);
const rowsOf = (name: string) => shop.query(`SELECT * FROM ${warehouse}.${name} AS t ORDER BY TO_JSON_STRING(t)`);
/** All that there is of a published table: also its etag and when it was last written to. */
const published = async (...names: string[]) =>
  await Promise.all(names.map(async (name) => [await get(`/${warehouse}/tables/${name}`), await rowsOf(name)]));
const builds = async (): Promise<string[]> => {
  const { datasets } = await get("?all=true");
  const ids: string[] = datasets.map((one: { datasetReference: { datasetId: string } }) => one.datasetReference.datasetId);
  return ids.filter((id) => id.startsWith(`${warehouse}_build_`));
};
const run = (variables?: Env): Promise<Result> => shop.run(script, variables);
async function fails(code: number, says: (string | RegExp)[], variables?: Env): Promise<Result> {
  const result = await run(variables);
  for (const part of says)
    assert.match(result.stderr, typeof part === "string" ? new RegExp(part.replaceAll(/[()[\].*?$|]/g, "\\$&")) : part);
  assert.equal(result.code, code, result.stderr);
  return result;
}
/** model → metric → value; the pipeline's own are under "". */
async function metrics(): Promise<Record<string, Record<string, number>>> {
  const values: Record<string, Record<string, number>> = {};
  const text = await (await fetch(`${shop.env.PUSHGATEWAY_URL}/metrics`)).text();
  for (const [, name = "", labels = "", value] of text.matchAll(/^(etl_\w+)\{(.*)\} (\S+)$/gm)) {
    assert.match(labels, /^instance="",job="etl",(model="\w+",)?pipeline="\w+"$/);
    if (!labels.includes('pipeline="views"')) continue;
    const model = /model="(\w+)"/.exec(labels)?.[1] ?? "";
    values[model] = { ...values[model], [name]: Number(value) };
  }
  return values;
}
const jobPost = /^POST .+\/jobs$/;

await test("the tables that a model reads are found behind FROM and JOIN, not in comments, strings, columns or aliases", () => {
  const known = ["a", "b", "c", "d", "orders"];
  const reads = (sql: string): string => tablesRead(sql, known).join();
  assert.equal(reads("SELECT x FROM a -- FROM b\n# FROM b\n/* FROM b\nJOIN c */ WHERE y = 'it''s FROM b'"), "a");
  assert.equal(
    reads(`SELECT "FROM b", '''\n' FROM c''', r"\\" FROM \`a\` join b USING (x) CROSS JOIN\n-- the c\nc AS q, UNNEST(d) AS e`),
    "a,b,c",
  );
  assert.equal(reads("SELECT count(*) AS orders, d, a.b FROM a WHERE c IN (1, 2) GROUP BY d, c ORDER BY orders, b"), "a");
  assert.equal(
    reads("WITH q AS (SELECT * FROM a), z AS (SELECT 1) SELECT (SELECT max(c) FROM c), d FROM (b LEFT JOIN q ON f(x, d)) JOIN orders"),
    "a,b,c,orders",
  );
  assert.equal(reads("SELECT EXTRACT(WEEK FROM x), d FROM (SELECT b, c FROM a UNION ALL SELECT b, d FROM orders)"), "a,orders");
  assert.equal(reads("SELECT * FROM x.a JOIN `x.b` JOIN `x`.c JOIN orders_2 JOIN d"), "d");
});

await test("each model is built after what it reads, checked, and published without an expiry, with descriptions, partitioning and clustering", async () => {
  models({
    zero: `-- What: a day.
CREATE OR REPLACE TABLE zero (
  day DATE OPTIONS (description = "The day; its 'key'."),
  store_id INT64 OPTIONS (description = "The store."),
  order_count INT64
)
PARTITION BY day CLUSTER BY store_id OPTIONS (description = "Orders; a day and store.")
AS
WITH days AS (SELECT DATE(created_at) AS day, store_id FROM orders)
SELECT day, store_id, COUNT(*) AS order_count FROM days GROUP BY day, store_id;
`,
    first: "SELECT SUM(order_count) AS orders, (SELECT COUNT(*) FROM users) AS users FROM zero",
    "checks/zero__key": "-- Twice.\nSELECT day FROM zero GROUP BY day, store_id HAVING COUNT(*) > 1;",
    "checks/total": "SELECT orders FROM first WHERE orders != (SELECT COUNT(*) FROM orders)",
  });
  // What is put into a dataset like this gets an expiry, also by a copy.
  await shop.api(`/datasets/${warehouse}`, "PATCH", { defaultTableExpirationMs: "3600000" });
  const old = `${warehouse}_build_20200101_000000_abcdef`;
  await shop.api("/datasets", "POST", { datasetReference: { datasetId: old }, labels: { etl_pipeline: "views" } });
  assert.deepEqual(await builds(), [old]);

  for (const version of ["the first", "the second"]) {
    const { stderr, stdout } = await shop.succeed(script);
    assert.deepEqual(await rowsOf("first"), [{ orders: "100", users: "20" }]);
    const table = await get(`/${warehouse}/tables/zero`);
    assert.equal(table.expirationTime, undefined, version);
    assert.deepEqual(table.timePartitioning, { type: "DAY", field: "day" });
    assert.deepEqual(table.clustering, { fields: ["store_id"] });
    assert.equal(table.description, "Orders; a day and store.");
    const about = table.schema.fields.map(({ description }: { description?: string }) => description);
    assert.deepEqual(about, ["The day; its 'key'.", "The store.", undefined]);
    assert.deepEqual(await builds(), [`${warehouse}_build_${(await lastRun(shop)).run_id}`], "those of earlier runs are dropped");
    assert.match(
      stdout,
      /^MODEL +ROWS +CHECKS +BYTES_BILLED +SECONDS +PUBLISHED\nzero +10 +1 +[1-9]\S+ +\S+ +yes\nfirst +1 +1 +[1-9]\S+ +\S+ +yes\n$/,
    );
    const { state, rows } = await lastRun(shop);
    assert.deepEqual([state, rows], ["succeeded", 11]);
    assert.match(stderr, /step=model model=zero rows=10 .*\n.*step=model model=first rows=1 .*\n.*step=done rows=11 /);
    const timePartitioning = { type: "DAY", field: "day", expirationMs: "3600000" }; // as a dataset's default may set it
    await shop.api(`/datasets/${warehouse}/tables/zero`, "PATCH", { timePartitioning });
  }
  const pushed = await metrics();
  assert.deepEqual(Object.keys(pushed).sort(), ["", "first", "zero"]);
  assert.equal(pushed[""]?.etl_rows, 11);
  assert.ok(pushed[""]?.etl_last_success_timestamp_seconds);
  assert.equal(pushed.zero?.etl_model_rows, 10);
  for (const what of ["last_success_timestamp_seconds", "bytes", "duration_seconds"])
    assert.notEqual(pushed.zero?.[`etl_model_${what}`], undefined, what);
});

await test("a check that fails publishes nothing of its model and of what needs it: byte-equal to before; the others go on, exit 1, and the build is kept, expiring", async () => {
  const files = {
    good: "SELECT 1 AS v",
    bad: "SELECT 1 AS v, 'x' AS id",
    reads_bad: "SELECT v FROM bad",
    far: "SELECT v FROM reads_bad",
    "checks/bad__one": "SELECT id FROM bad WHERE v = 2",
    "checks/bad__two": "SELECT id, v FROM bad WHERE v = 2",
    "checks/good__bad": "SELECT 1 FROM good WHERE v > 2",
  };
  models(files);
  await shop.succeed(script);
  const kept = ["bad", "reads_bad", "far"];
  const [before, succeeded] = [await published(...kept), await metrics()];
  models(Object.fromEntries(Object.entries(files).map(([name, sql]) => [name, sql.replace("1 AS v", "2 AS v")])));
  const { stdout, stderr } = await fails(1, [
    "error: 3 of 4 models failed; their published tables stay as they were",
    'bad: views/checks/bad__one.sql returned 1 rows, for example {"id":"x"}; views/checks/bad__two.sql returned 1 rows, for example {"id":"x","v":2}',
    "reads_bad: it needs bad",
    "far: it needs reads_bad",
    /Their rows are in dataset \w+\. Correct the models, then run: make views/,
  ]);
  assert.deepEqual(await published(...kept), before);
  assert.deepEqual(await rowsOf("good"), [{ v: "2" }]);
  assert.match(stdout, /^bad +0 +2 +\S+ +\S+ +no: views\/checks\/bad__one\.sql returned 1 rows/m);
  assert.match(stdout, /^far +0 +0 +0 +\S+ +no: it needs reads_bad$/m);
  const left = /rows are in dataset (\w+)/.exec(stderr)?.[1];
  const { expirationTime, creationTime } = await get(`/${left}/tables/bad`);
  assert.ok(Number(expirationTime) > Number(creationTime));
  const pushed = await metrics();
  assert.ok((pushed[""]?.etl_last_failure_timestamp_seconds ?? 0) > (pushed[""]?.etl_last_success_timestamp_seconds ?? 0));
  for (const name of kept)
    assert.equal(pushed[name]?.etl_model_last_success_timestamp_seconds, succeeded[name]?.etl_model_last_success_timestamp_seconds, name);
  assert.match((await lastRun(shop)).error ?? "", /3 of 4 models failed/);
});

await test("a syntax error, a missing table, a name with a dataset, a table behind a comma and a check that cannot run are told with their file; the others are published", async () => {
  models({
    good: "SELECT 3 AS v",
    syntax: "SELECT v,\n  FROM WHERE good",
    missing: "SELECT * FROM nowhere",
    qualified: `SELECT COUNT(*) AS n FROM ${shop.dataset}.orders`,
    comma: "SELECT COUNT(*) AS n FROM users, orders",
    unchecked: "SELECT 1 AS v",
    "checks/good__orders": "SELECT v FROM good JOIN orders ON id < 0",
    "checks/unchecked": "SELECT nope FROM unchecked",
  });
  await fails(1, [
    /syntax: views\/syntax\.sql: .*syntax/i,
    /missing: views\/missing\.sql: .*nowhere/,
    `qualified: views/qualified.sql: it read ${shop.dataset}.orders. Name each table behind FROM or JOIN, without a dataset`,
    /comma: views\/comma\.sql: it read \w+_build_\w+\.orders\. Name each table behind FROM or JOIN, without a dataset/,
    /unchecked: views\/checks\/unchecked\.sql: .*nope/,
  ]);
  assert.deepEqual(await rowsOf("good"), [{ v: "3" }]);
  for (const name of ["syntax", "missing", "qualified", "comma", "unchecked"])
    assert.equal(await get(`/${warehouse}/tables/${name}`), undefined, name);
});

await test("two statements, another table's name, no CREATE, a check of nothing, an unknown ONLY: all at once, exit 2, before anything is built", async () => {
  models({
    good: "SELECT 4 AS v",
    two: "CREATE OR REPLACE TABLE two AS SELECT ';' AS v; -- one;\nDROP TABLE good;",
    named: "CREATE OR REPLACE TABLE good AS SELECT 5 AS v",
    dataset: "CREATE OR REPLACE TABLE raw.dataset AS SELECT 5 AS v",
    plain: "CREATE TABLE plain AS SELECT 1 AS v",
    "checks/nothing": "SELECT id FROM orders",
    "checks/deletes": "DELETE FROM good WHERE true",
  });
  const before = await published("good");
  const { stderr } = await fails(
    2,
    [
      ...["two", "named", "dataset", "plain"].map(
        (name) => `views/${name}.sql must hold one statement: CREATE OR REPLACE TABLE ${name} … AS SELECT …, without a dataset`,
      ),
      "views/checks/nothing.sql reads no model",
      "views/checks/deletes.sql must hold one statement: a SELECT",
      "ONLY=nope: there is no views/nope.sql. There are: dataset, good, named, plain, two",
    ],
    { ONLY: "nope" },
  );
  assert.equal(stderr.match(/^ {2}/gm)?.length, 7, stderr);
  models({
    c: "SELECT * FROM a",
    a: "SELECT * FROM b JOIN good",
    b: "SELECT * FROM c",
    good: "SELECT 4 AS v",
    beside: "SELECT * FROM a",
  });
  await fails(2, ["models read one another in a circle: views/a.sql, views/b.sql, views/beside.sql, views/c.sql"]);
  assert.deepEqual(await published("good"), before);
});

await test("a published table keeps what is its own: row access policies, policy tags, labels and descriptions that the file has none of; columns are added", async () => {
  const create = (columns: string, select: string): Record<string, string> => ({
    own: `CREATE OR REPLACE TABLE own (${columns}) CLUSTER BY id OPTIONS (description = "Own.") AS SELECT ${select}`,
  });
  models(create('id INT64 OPTIONS (description = "The id."), secret STRING', "1, 'a'"));
  await shop.succeed(script);
  const table = `/${warehouse}/tables/own`;
  const policyTags = { names: ["projects/p/locations/us/taxonomies/1/policyTags/2"] };
  const { schema } = await get(table);
  const described = { ...schema.fields[1], description: "By hand.", policyTags };
  await shop.api(`/datasets${table}`, "PATCH", { labels: { team: "shop" }, schema: { fields: [schema.fields[0], described] } });
  const policy = { policyId: "all", projectId: shop.env.BIGQUERY_PROJECT, datasetId: warehouse, tableId: "own" };
  const filter = { filterPredicate: "TRUE", grantees: ["allAuthenticatedUsers"] };
  await shop.api(`/datasets${table}/rowAccessPolicies`, "POST", { rowAccessPolicyReference: policy, ...filter });
  const policies = await get(`${table}/rowAccessPolicies`);
  assert.equal(policies.rowAccessPolicies.length, 1);

  models(
    create('id INT64 OPTIONS (description = "The id, again."), added INT64 OPTIONS (description = "New."), secret STRING', "2, 3, 'b'"),
  );
  await shop.succeed(script);
  assert.deepEqual(await rowsOf("own"), [{ id: "2", secret: "b", added: "3" }]);
  const now = await get(table);
  assert.deepEqual(
    now.schema.fields.map(({ name, description, policyTags }: Record<string, unknown>) => [name, description, policyTags]),
    [
      ["id", "The id, again.", undefined],
      ["secret", "By hand.", policyTags],
      ["added", "New.", undefined],
    ],
  );
  assert.deepEqual([now.labels, now.clustering, now.expirationTime], [{ team: "shop" }, { fields: ["id"] }, undefined]);
  assert.deepEqual(await get(`${table}/rowAccessPolicies`), policies);

  const before = await published("own");
  for (const [columns, select, lost] of [
    ["id INT64, secret STRING", "2, 'c'", "column added INTEGER"],
    ["id INT64, added INT64, secret INT64", "2, 3, 4", "column secret STRING"],
  ] as const) {
    models(create(columns, select));
    await fails(1, [
      `own: views/own.sql no longer has ${lost} of the published ${warehouse}.own. Run: DROP TABLE ${warehouse}.own (its access policies go with it); then: make views ONLY=own`,
    ]);
    assert.deepEqual([await published("own"), await get(`${table}/rowAccessPolicies`)], [before, policies]);
  }
  models({ own: "SELECT 2 AS id, 3 AS added, 'b' AS secret" });
  await fails(1, ['own: views/own.sql no longer has PARTITION BY or CLUSTER BY {"cluster":["id"]} of the published']);
  await shop.query(`DROP TABLE ${warehouse}.own`);
  await shop.succeed(script, { ONLY: "own" });
});

await test("no rows, or fewer than half of the published ones, are not published without ALLOW_SHRINK=1", async () => {
  const numbers = (count: number): string => `SELECT n FROM UNNEST(GENERATE_ARRAY(1, ${count})) AS n`;
  models({ shrinks: numbers(10), empties: numbers(10), halves: numbers(10) });
  await shop.succeed(script);
  const before = await published("shrinks", "empties");
  models({ shrinks: numbers(4), empties: numbers(0), halves: numbers(5), never: numbers(0) });
  await fails(1, [
    `shrinks: views/shrinks.sql: it has 4 rows, and the published ${warehouse}.shrinks 10. If that is right: make views ONLY=shrinks ALLOW_SHRINK=1`,
    `empties: views/empties.sql: it has 0 rows, and the published ${warehouse}.empties 10`,
    `never: views/never.sql: it has 0 rows, and the published ${warehouse}.never 0`,
  ]);
  assert.deepEqual(await published("shrinks", "empties"), before);
  assert.equal((await rowsOf("halves")).length, 5);
  await shop.succeed(script, { ALLOW_SHRINK: "1" });
  assert.deepEqual([(await rowsOf("shrinks")).length, (await rowsOf("empties")).length], [4, 0]);
});

await test("ONLY builds that model and what it and its checks need; the pipeline's metrics stay as they are", async () => {
  const files = (version: number): Record<string, string> => ({
    top: `SELECT ${version} AS v, b.v AS below FROM below AS b`,
    below: `SELECT ${version} AS v`,
    beside: `SELECT ${version} AS v`,
    other: `SELECT ${version} AS v`,
    "checks/top__beside": "SELECT 1 FROM top JOIN beside USING (v) WHERE below != v",
  });
  models(files(1));
  await shop.succeed(script);
  const [before, other] = [(await metrics())[""], await published("other")];
  models(files(2));
  const { stdout } = await shop.succeed(script, { ONLY: "top" });
  assert.deepEqual(stdout.match(/^\w+/gm), ["MODEL", "below", "beside", "top"]);
  assert.deepEqual([...(await rowsOf("top")), ...(await rowsOf("beside"))], [{ v: "2", below: "2" }, { v: "2" }]);
  assert.deepEqual(await published("other"), other);
  const after = await metrics();
  assert.deepEqual(after[""], before);
  assert.ok((after.top?.etl_model_last_success_timestamp_seconds ?? 0) > (after.other?.etl_model_last_success_timestamp_seconds ?? 0));
});

await test("what a run is billed is logged and pushed, for each model and in all; no statement may be billed more than MAX_BYTES_BILLED", async () => {
  models({ billed: "SELECT COUNT(*) AS v FROM orders", "checks/billed__v": "SELECT v FROM billed WHERE v = 0" });
  await shop.succeed(script);
  await using proxy = await createProxy(shop.env.BIGQUERY_ENDPOINT);
  // biome-ignore lint/suspicious/noExplicitAny: the API's own JSON
  const asked: any[] = [];
  proxy.fault(jobPost, async ({ request, send, reply }) => {
    const body = await buffer(request);
    asked.push(JSON.parse(body.toString()).configuration);
    await reply(await send(body));
  });
  const { stdout, stderr: log } = await shop.succeed(script, { BIGQUERY_ENDPOINT: proxy.url });
  const least = 10 * 2 ** 20; // what BigQuery bills for a table, however small: of model, check and publishing, where the table exists
  assert.match(stdout, new RegExp(`^billed +1 +\\d +${3 * least} `, "m"));
  for (const step of ["model model=billed", "done"]) assert.match(log, new RegExp(`step=${step} .*bytes_billed=${3 * least} `));
  const pushed = await metrics();
  assert.deepEqual([pushed.billed?.etl_model_bytes, pushed[""]?.etl_bytes_billed], [3 * least, 3 * least]);
  const limits = asked.flatMap(({ query }) => query?.maximumBytesBilled ?? []);
  assert.deepEqual(limits, Array(3).fill("100000000000"));
  assert.ok(asked.every(({ dryRun, labels }) => !dryRun && labels.etl_pipeline === "views" && labels.etl_run));

  models({ billed: "SELECT COUNT(*) + 1 AS v FROM orders CROSS JOIN (SELECT 1 AS one FROM users)" });
  const before = await published("billed");
  const { stderr } = await fails(
    1,
    [/billed: views\/billed\.sql: .*bytes billed.* Let it read less, or run: make views ONLY=billed MAX_BYTES_BILLED=20971520$/m],
    { MAX_BYTES_BILLED: String(least) },
  );
  assert.match(stderr, /step=model model=billed .*bytes_billed=0 /);
  assert.deepEqual(await published("billed"), before);
  await shop.succeed(script, { ONLY: "billed", MAX_BYTES_BILLED: "20971520" });
});

await test("orders or users that are older than two of their intervals are refused by name; with ALLOW_STALE=1 a warning", async () => {
  models({ stale: "SELECT COUNT(*) AS v FROM orders", unaffected: "SELECT COUNT(*) AS v FROM users" });
  await shop.admin`update etl.watermarks set watermark = now() - interval '2 hours 1 minute' where pipeline = 'orders'`;
  await fails(1, [
    /error: orders is stale: its watermark is 2h 1m old, its interval in ops\/alerts\.yml 1h 0m\. Nothing was built\. Next: make orders users, then make views; or make views ALLOW_STALE=1/,
  ]);
  assert.equal(await get(`/${warehouse}/tables/stale`), undefined);
  await shop.succeed(script, { ONLY: "unaffected" });
  const { stderr } = await shop.succeed(script, { ALLOW_STALE: "1" });
  assert.match(stderr, /step=warning warning="orders is stale: /);
  await shop.admin`update etl.watermarks set watermark = now() - interval '2 hours' + interval '1 minute' where pipeline = 'orders'`;
  await shop.admin`update etl.watermarks set watermark = now() - interval '2 days 1 minute' where pipeline = 'users'`;
  await fails(1, ["error: users is stale: "]);
  models({ stale: "SELECT COUNT(*) AS v FROM orders" });
  await shop.admin`update etl.watermarks set pipeline = 'aside' where pipeline = 'orders'`;
  await fails(1, [
    "error: orders is stale: its watermark is missing, its interval in ops/alerts.yml 1h 0m. Nothing was built. Next: make orders, then make views",
  ]);
  await shop.admin`update etl.watermarks set pipeline = 'orders' where pipeline = 'aside'`;
});

await test("an interval of ops/alerts.yml that cannot be read, or is not there, is refused: nothing would be stale", async () => {
  models({ stale: "SELECT COUNT(*) AS v FROM orders" });
  const rules = (change: (text: string) => string): Disposable => scratch.edit("ops/alerts.yml", change);
  {
    using _ = rules((text) => text.replace("expr: vector(3600)", "expr: 60 * vector(60)"));
    await fails(1, [
      "error: ops/alerts.yml: write each etl_expected_interval_seconds as: labels: { pipeline: NAME }, expr: vector(SECONDS)",
    ]);
  }
  using _ = rules((text) => text.replace("{ pipeline: orders }", "{ pipeline: other }"));
  await fails(1, [/error: orders is stale: its watermark is \S+ old, its interval in ops\/alerts\.yml 0s\. /]);
});

await test("a run of orders in the middle of a build changes nothing in it; models that do not need one another go side by side", async () => {
  models({
    early: "SELECT COUNT(*) AS orders, MAX(id) AS last FROM orders",
    late: "SELECT COUNT(*) AS orders, MAX(o.id) AS last, MAX(early.orders) AS early FROM orders AS o CROSS JOIN early",
    other: "SELECT COUNT(*) AS v FROM users",
  });
  await using proxy = await createProxy(shop.env.BIGQUERY_ENDPOINT);
  const gate = withhold();
  proxy.fault(/^GET .+\/jobs\/\w+_early_build_1$/, gate, 1);
  const going = shop.start(script, { BIGQUERY_ENDPOINT: proxy.url });
  await reach(going, gate.reached);
  let beside = "";
  going.line(/step=model model=other rows=1/).then((line) => {
    beside = line;
  });
  await until("the other model is published", () => beside);
  await shop.insertRows(101, 150);
  await shop.updateRows(1, 50, "changed");
  const synced = await shop.succeed("scripts/orders.ts");
  assert.match(synced.stderr, /step=done rows=100 /);
  gate.release();
  assert.equal((await ending(going)).code, 0);
  assert.deepEqual(await rowsOf("late"), [{ orders: "100", last: "100", early: "100" }]);
  await shop.succeed(script);
  assert.deepEqual(await rowsOf("late"), [{ orders: "150", last: "150", early: "150" }]);
});

await test("two runs at once: the second says who holds the lock, exits 0; ONLY waits for it; SIGTERM cancels the job and leaves all as it was", async () => {
  models({ locked: "SELECT 1 AS v" });
  await shop.succeed(script);
  models({ locked: "SELECT 2 AS v" });
  const before = await published("locked");
  await using proxy = await createProxy(shop.env.BIGQUERY_ENDPOINT);
  const gate = hold();
  proxy.fault(/^GET .+\/jobs\/\w+_locked_build_1$/, gate);
  const going = shop.start(script, { BIGQUERY_ENDPOINT: proxy.url });
  await reach(going, gate.reached);
  const { run_id } = await lastRun(shop);
  const second = await shop.succeed(script);
  assert.match(
    second.stderr,
    new RegExp(`step=skipped because="another run holds the lock" holder=${run_id} host=\\S+ pid=${going.child.pid} .*since=\\S+$`),
  );
  const waits = shop.start(script, { ONLY: "locked" });
  await waits.line(new RegExp(`step=waiting because="another run holds the lock" holder=${run_id} `));
  assert.deepEqual(await published("locked"), before);
  going.child.kill("SIGTERM");
  const stopped = await ending(going);
  assert.equal(stopped.code, 1);
  assert.match(stopped.stderr, /error: stopped by SIGTERM\. No chunk is half applied; each published table is whole, .*Next: make views$/);
  assert.ok(proxy.requests.some((line) => /_locked_build_1\/cancel$/.test(line)));
  assert.equal((await ending(waits)).code, 0);
  assert.deepEqual(await rowsOf("locked"), [{ v: "2" }]);
});

await test("an answer that gets lost is asked for again: nothing is built or published twice over, or not at all", async () => {
  models({ lost: "SELECT COUNT(*) AS v FROM users", "checks/lost": "SELECT v FROM lost WHERE v = 0" });
  await using proxy = await createProxy(shop.env.BIGQUERY_ENDPOINT);
  const dataset = /^POST .+\/datasets$/;
  proxy.fault(dataset, loseAnswer, 1);
  proxy.fault(/_publish_\d$/, loseAnswer, 1);
  proxy.fault(jobPost, loseAnswer, 1);
  await shop.succeed(script, { BIGQUERY_ENDPOINT: proxy.url });
  assert.deepEqual(await rowsOf("lost"), [{ v: "20" }]);
  assert.equal(proxy.requests.filter((line) => dataset.test(line)).length, 2); // the second is told that it is there
});

await test("killed with SIGKILL at random points, every published table is whole, the old or the new one; a re-run completes; what is left expires", async () => {
  const write = (version: number): void =>
    models({
      k1: `CREATE OR REPLACE TABLE k1 (version INT64 OPTIONS (description = "v"), n INT64) CLUSTER BY n OPTIONS (description = "k") AS SELECT ${version}, n FROM UNNEST(GENERATE_ARRAY(1, 500)) AS n`,
      k2: `SELECT ${version} AS version, n FROM k1`,
      k3: `SELECT ${version} AS version, n FROM UNNEST(GENERATE_ARRAY(1, 500)) AS n`,
      "checks/k1": "SELECT n FROM k1 GROUP BY n HAVING COUNT(*) > 1",
      "checks/k2": `SELECT n FROM k2 WHERE version != ${version}`,
    });
  write(0);
  await using whole = await createProxy(shop.env.BIGQUERY_ENDPOINT);
  await shop.succeed(script, { BIGQUERY_ENDPOINT: whole.url });
  const [below, requests] = [random(), whole.requests.length];
  const versions: Record<string, number> = { k1: 0, k2: 0, k3: 0 };
  const look = async (version: number): Promise<void> => {
    for (const name of Object.keys(versions)) {
      const [row] = await shop.query(
        `SELECT COUNT(*) AS n, COUNT(DISTINCT n) AS d, MIN(version) AS v, MAX(version) AS w FROM ${warehouse}.${name}`,
      );
      assert.deepEqual([row?.n, row?.d, row?.v], ["500", "500", row?.w], `${name} is not whole: ${JSON.stringify(row)}`);
      assert.ok(Number(row?.v) >= (versions[name] ?? 0) && Number(row?.v) <= version, `${name} went back to ${row?.v}`);
      versions[name] = Number(row?.v);
    }
    const table = await get(`/${warehouse}/tables/k1`);
    assert.deepEqual([table.expirationTime, table.description, table.clustering], [undefined, "k", { fields: ["n"] }]);
  };
  const kills = process.env.SOAK ? 50 : 6;
  for (let version = 1; version <= kills; version++) {
    write(version);
    await using proxy = await createProxy(shop.env.BIGQUERY_ENDPOINT);
    const [before, gate] = [below(requests), below(2) ? hold() : withhold()];
    proxy.fault(steps.anything, pass, before);
    proxy.fault(steps.anything, gate, 1);
    const going = shop.start(script, { BIGQUERY_ENDPOINT: proxy.url });
    await Promise.race([gate.reached, going.ended]); // which may have fewer
    going.child.kill("SIGKILL");
    await ending(going);
    await look(version);
    await assertNoSessions(shop);
  }
  for (const build of await builds()) {
    const { defaultTableExpirationMs } = await get(`/${build}`);
    assert.equal(defaultTableExpirationMs, String(24 * 3_600_000));
    for (const { tableReference } of (await get(`/${build}/tables`)).tables ?? []) {
      const table = await get(`/${build}/tables/${tableReference.tableId}`);
      assert.ok(!table || Number(table.expirationTime) > 0, `${build}.${tableReference.tableId}`);
    }
  }
  write(kills + 1);
  await shop.succeed(script);
  await look(kills + 1);
  assert.deepEqual(versions, { k1: kills + 1, k2: kills + 1, k3: kills + 1 });
});
