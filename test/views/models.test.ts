/**
 * The models of views/ and their checks, on the local BigQuery server (make up): on a small fixture with the awkward cases
 * (test/fixtures/views/orders.txt names them), on the whole real data set against other SQL in Postgres, and with faults.
 */
import assert from "node:assert/strict";
import { globSync, readFileSync } from "node:fs";
import { basename, join } from "node:path";
import { after, before, suite, test } from "node:test";
import { changeSource } from "../data/change.ts";
import { loadData } from "../data/load.ts";
import { createShop, type Shop } from "../lib/shop.ts";
import { root } from "../stack/env.ts";

type Row = Record<string, string | null>;
const fixtures = join(import.meta.dirname, "../fixtures/views");
const read = (file: string): string => readFileSync(file, "utf8");
const sqlFiles = (folder: string): Map<string, string> =>
  new Map(
    globSync(join(folder, "*.sql"))
      .sort()
      .map((file) => [basename(file, ".sql"), read(file)]),
  );

const checks = sqlFiles(join(root, "views/checks"));
const steps = inOrder([...sqlFiles(join(root, "views"))]);
const models = new Map(steps.flat());
const names = [...models.keys()];

/** The models in steps: each reads only the models of steps before its own. */
function inOrder(files: [string, string][]): [string, string][][] {
  const steps: [string, string][][] = [];
  for (let waiting = files; waiting.length > 0; ) {
    const blocked = ([name, sql]: [string, string]): boolean => {
      const words = new Set(sql.replace(/--.*|"[^"]*"|'[^']*'/g, "").match(/\w+/g));
      return waiting.some(([other]) => other !== name && words.has(other));
    };
    steps.push(waiting.filter((file) => !blocked(file)));
    waiting = waiting.filter(blocked);
    assert.ok(steps.at(-1)?.length, "the models form a circle");
  }
  return steps;
}

/** The model that a check is about: its file is MODEL__what.sql. */
const modelOf = (check: string): string => check.split("__")[0] ?? "";

/** A table of a fixture: the first line names the columns, two spaces or more between them; "-" is NULL, "# …" a comment. */
function table(file: string): Row[] {
  const lines = read(join(fixtures, file))
    .split("\n")
    .map((line) => line.replace(/#.*/, "").trim())
    .filter(Boolean)
    .map((line) => line.split(/ {2,}/));
  const [columns = [], ...rows] = lines;
  return rows.map((values) => {
    assert.equal(values.length, columns.length, `${file}: ${values.join("  ")}`);
    return Object.fromEntries(columns.map((column, at) => [column, values[at] === "-" ? null : (values[at] as string)]));
  });
}

/** One form for what both servers write: 1.50 and 1.5 are the same number. */
const canonical = (rows: Iterable<Row>): string[] =>
  Array.from(rows, (row) =>
    Object.entries(row)
      .map(([column, value]) => {
        const text = value === null ? "-" : String(value);
        return `${column}=${/^-?\d+\.\d+$/.test(text) ? text.replace(/\.?0+$/, "") : text}`;
      })
      .join("  "),
  ).sort();

/** Puts a table of the fixture into the source. */
async function insert(shop: Shop, into: string): Promise<void> {
  const rows = table(`${into}.txt`).map((row) => (row.created_at ? { ...row, created_at: `${row.created_at}+00` } : row));
  const columns = shop.admin(Object.keys(rows[0] ?? {}));
  await shop.admin`
    insert into ${shop.admin(into)} (${columns})
    select ${columns} from json_populate_recordset(null::${shop.admin(into)}, ${JSON.stringify(rows)}::text::json)`;
}

/** Builds the models, each statement as it stands in its file; those that need no more than what is there go side by side. */
async function build(shop: Shop): Promise<void> {
  for (const step of steps) {
    await Promise.all(
      step.map(([name, sql]) => shop.query(sql).catch((error: Error) => assert.fail(`views/${name}.sql: ${error.message}`))),
    );
  }
}

/** The twelve answers by other SQL, in Postgres, from the source. */
async function answers(shop: Shop): Promise<Map<string, Row[]>> {
  const queries = sqlFiles(join(fixtures, "postgres"));
  const sql = shop.connect("answers");
  await sql.unsafe(queries.get("_calendar") ?? "");
  const found = new Map<string, Row[]>();
  for (const name of names) {
    // Later ones may read an answer; what Postgres computed, not what is compared.
    await sql
      .unsafe(`create temp table answer_${name} as ${queries.get(name)}`)
      .catch((error: Error) => assert.fail(`postgres/${name}.sql: ${error.message}`));
    const rows = await sql.unsafe(`select * from answer_${name}`);
    const columns = rows.columns.map((column) => `"${column.name}"::text`);
    found.set(
      name,
      (await sql.unsafe(`select ${columns.join()} from answer_${name}`)).map((row) => ({ ...row }) as Row),
    );
  }
  return found;
}

const rowsOf = (shop: Shop, name: string): Promise<Row[]> => shop.query(`SELECT * FROM ${name}`);

/**
 * Runs checks, many in one query that names each table once (in the local server a table's name costs more than its rows).
 * @returns how many rows each finds.
 */
async function offending(shop: Shop, selects: [name: string, sql: string][]): Promise<Map<string, number>> {
  const found = new Map<string, number>();
  for (let at = 0; at < selects.length; at += 16) {
    const counts = selects.slice(at, at + 16).map(([name, sql]) => {
      const select = sql.trim().replace(/;$/, "");
      return `SELECT '${name}' AS name, (SELECT COUNT(*) FROM (\n${select}\n)) AS found`;
    });
    const words = new Set(counts.join("\n").match(/\w+/g));
    const tables = [...names, "orders", "users"].filter((name) => words.has(name));
    const built = tables.map(
      (name) =>
        `built_${name} AS (SELECT * FROM \`${shop.env.BIGQUERY_PROJECT}\`.${shop.dataset}.${name}), ${name} AS (SELECT * FROM built_${name})`,
    );
    const query = `WITH ${built.join(",\n")}\n${counts.join("\nUNION ALL\n")}`;
    for (const row of await shop.query(query)) found.set(row.name as string, Number(row.found));
  }
  assert.equal(found.size, selects.length);
  return found;
}

/** Whether no check finds anything. */
async function assertChecksPass(shop: Shop, of = names): Promise<void> {
  const found = await offending(
    shop,
    [...checks].filter(([check]) => of.includes(modelOf(check))),
  );
  assert.deepEqual(
    [...found].filter(([, rows]) => rows > 0),
    [],
  );
}

/** A check for offending(), in which a table is replaced by a changed copy: `change` is a SELECT in which $ is the table. */
function planted(check: string, into: string, change: string): string {
  const sql = checks.get(check) ?? "";
  const fault = `WITH ${into} AS (${change.replaceAll("$", `built_${into}`)})`;
  return /^WITH\b/m.test(sql) ? sql.replace(/^WITH\b/m, `${fault},`) : sql.replace(/^SELECT\b/m, `${fault}\nSELECT`);
}

const twice = "SELECT * FROM $ UNION ALL (SELECT * FROM $ LIMIT 1)";
const without = (rows: string): string => `SELECT * FROM $ WHERE NOT (${rows})`;
/** Sets columns, in some rows: set("week = '2021-01-11'", "revenue = revenue + 1"). */
const set = (rows: string, ...columns: string[]): string => {
  const values = columns.map((assignment) => assignment.replace(/^(\w+) = (.*)$/, `IF(${rows}, $2, $1) AS $1`));
  return `SELECT * REPLACE (${values.join(", ")}) FROM $`;
};
/** Adds copies of some rows, changed. */
const more = (rows: string, ...columns: string[]): string => {
  const values = columns.map((assignment) => assignment.replace(/^(\w+) = (.*)$/, "$2 AS $1"));
  return `SELECT * FROM $ UNION ALL SELECT * REPLACE (${values.join(", ")}) FROM $ WHERE ${rows}`;
};
const week = (monday: string): string => `week = DATE '${monday}'`;

/** The columns that make a row one of its kind. */
const keys: Record<string, string[]> = {
  weekly_revenue: ["week"],
  weekly_store_revenue: ["week", "store_id"],
  weekly_baskets: ["week"],
  weekly_users: ["week"],
  repeat_rate: ["week"],
  cohort_retention: ["cohort_week", "weeks_since"],
  lifetime_value: ["user_id"],
  rfm_segments: ["user_id"],
  income_band_revenue: ["week", "income_band"],
  discount_dependence: ["user_id"],
  churned_users: ["user_id"],
  weekly_summary: ["week"],
};

/** What each check must find, planted in its model's table, or in the table named before the colon. */
const faults: Record<string, string[]> = {
  weekly_revenue__weeks: [without(week("2021-01-18")), set(week("2021-01-18"), "week = DATE '2021-01-19'")],
  weekly_revenue__span: [
    without(week("2020-12-07")),
    without(week("2021-02-08")),
    more(week("2021-02-08"), "week = DATE '2021-02-15'"),
    more(week("2021-02-08"), "week = DATE '2020-11-30'"),
    without("TRUE"),
  ],
  weekly_revenue__over: [more(week("2021-02-08"), "week = DATE_TRUNC(CURRENT_DATE(), WEEK(MONDAY))")],
  weekly_revenue__statuses: [`orders:${set("id = 9", "status = 'cancelled'")}`, `orders:${set("id = 9", "status = NULL")}`],
  weekly_revenue__orders: [
    set(week("2020-12-28"), "revenue = revenue + NUMERIC '0.01'"),
    set(week("2020-12-28"), "order_count = order_count + 1"),
    set(week("2020-12-28"), "returned_count = 1"),
    set(week("2020-12-28"), "gross_revenue = gross_revenue - NUMERIC '0.01'"),
    set(week("2020-12-28"), "refunds = NUMERIC '0.01'"),
    set(week("2021-01-18"), "discount = NUMERIC '0.01'"),
    `orders:${set("id = 12", "total = total - NUMERIC '0.01'")}`,
    `orders:${set("id = 12", "status = 'returned'")}`,
  ],
  weekly_store_revenue__weeks: [
    without(`store_id = 2 AND ${week("2021-01-18")}`),
    without(`store_id = 1 AND ${week("2021-02-08")}`),
    more(`store_id = 2 AND ${week("2021-01-18")}`, "store_id = 4", "week = DATE '2021-02-08'"),
  ],
  weekly_store_revenue__orders: [
    without(`store_id = 2 AND ${week("2020-12-07")}`),
    set(`store_id = 2 AND ${week("2020-12-28")}`, "revenue = revenue + NUMERIC '0.01'"),
    set(`store_id = 2 AND ${week("2020-12-28")}`, "gross_revenue = gross_revenue + NUMERIC '0.01'"),
    set(`store_id = 2 AND ${week("2020-12-28")}`, "refunds = NUMERIC '0.01'"),
    set(`store_id = 2 AND ${week("2020-12-28")}`, "order_count = 0"),
    set(`store_id = 2 AND ${week("2020-12-28")}`, "returned_count = 1"),
  ],
  weekly_store_revenue__total: [
    set(`store_id = 2 AND ${week("2020-12-28")}`, "revenue = revenue - NUMERIC '0.01'"),
    set(`store_id = 2 AND ${week("2020-12-28")}`, "revenue_share = NUMERIC '0.1534'"),
    without(week("2020-12-28")),
  ],
  weekly_baskets__weeks: [without(week("2021-01-18")), more(week("2021-01-18"), "week = DATE '2021-02-15'")],
  weekly_baskets__orders: [
    set(week("2020-12-28"), "basket_value = basket_value + NUMERIC '0.01'"),
    set(week("2020-12-28"), "basket_value = NULL"),
    set(week("2020-12-28"), "order_count = order_count + 1"),
    set(week("2020-12-28"), "basket_count = basket_count - 1"),
    set(week("2020-12-28"), "no_charge_count = 1"),
    set(week("2021-01-18"), "item_count = 1"),
  ],
  weekly_baskets__sizes: [
    set(week("2020-12-28"), "median_basket = NUMERIC '50.06'"),
    set(week("2020-12-28"), "largest_basket = NUMERIC '21.66'"),
    set(week("2020-12-28"), "single_item_count = 4"),
    set(week("2020-12-28"), "no_charge_count = 4"),
    set(week("2020-12-28"), "basket_count = 4"),
  ],
  weekly_users__weeks: [without(week("2021-01-18")), more(week("2021-01-18"), "week = DATE '2021-02-15'")],
  weekly_users__active: [
    set(week("2020-12-28"), "active_users = 4", "new_users = 2"),
    set(week("2020-12-28"), "new_users = 2"),
    set(week("2020-12-28"), "won_back_users = 3"),
  ],
  weekly_users__new_once: [set(week("2020-12-28"), "new_users = 2", "returning_users = 1"), without(week("2020-12-28"))],
  repeat_rate__weeks: [without(week("2021-02-01")), more(week("2021-02-01"), "week = DATE '2021-01-18'")],
  repeat_rate__orders: [
    set(week("2021-02-01"), "user_count = 8", "repeat_share = NUMERIC '0.25'"),
    set(week("2021-02-01"), "repeat_count = 3", "repeat_share = NUMERIC '0.4286'"),
    set(week("2021-02-01"), "repeat_share = NUMERIC '0.2858'"),
    set(week("2021-02-01"), "repeat_share = NULL"),
  ],
  cohort_retention__weeks: [
    without("cohort_week = DATE '2020-12-21' AND weeks_since = 3"),
    without("cohort_week = DATE '2020-12-21' AND weeks_since = 7"),
    without("cohort_week = DATE '2020-12-21' AND weeks_since = 0"),
    set("cohort_week = DATE '2020-12-21'", "weeks_since = weeks_since + 1"),
  ],
  cohort_retention__sizes: [
    without("cohort_week = DATE '2020-12-21'"),
    set("cohort_week = DATE '2020-12-21' AND weeks_since = 3", "cohort_size = 3"),
    set("cohort_week = DATE '2020-12-21' AND weeks_since = 1", "active_users = 3", "retention = NUMERIC '1.5'"),
    set("cohort_week = DATE '2020-12-21' AND weeks_since = 0", "active_users = 1", "retention = NUMERIC '0.5'"),
    set("cohort_week = DATE '2020-12-21' AND weeks_since = 1", "retention = NUMERIC '0.5001'"),
    set("cohort_week = DATE '2020-12-21' AND weeks_since = 1", "retention = NULL"),
  ],
  cohort_retention__orders: [
    set("cohort_week = DATE '2020-12-21' AND weeks_since = 1", "revenue = revenue + NUMERIC '0.01'"),
    set("cohort_week = DATE '2020-12-21' AND weeks_since = 1", "active_users = 2"),
    without(week("2020-12-28")),
  ],
  lifetime_value__orders: [
    without("user_id = 5"),
    more("user_id = 5", "user_id = 7"),
    set("user_id = 4", "revenue = revenue + NUMERIC '0.01'"),
    set("user_id = 4", "gross_revenue = gross_revenue + NUMERIC '0.01'"),
    set("user_id = 3", "refunds = refunds - NUMERIC '0.01'"),
    set("user_id = 4", "order_count = 4"),
    set("user_id = 4", "first_order_on = DATE '2020-12-22'"),
    set("user_id = 8", "last_order_on = DATE '2021-02-22'"),
  ],
  lifetime_value__averages: [
    set("user_id = 4", "as_of_week = DATE '2021-02-15'", "weeks_known = 9"),
    set("user_id = 4", "weeks_known = 9"),
    set("user_id = 4", "revenue_per_week = NUMERIC '14.64'"),
    set("user_id = 4", "average_order = NUMERIC '39.04'"),
    set("user_id = 4", "average_order = NULL"),
  ],
  rfm_segments__users: [
    without("user_id = 5"),
    more("user_id = 5", "user_id = 7"),
    set("user_id = 3", "frequency = 2"),
    set("user_id = 4", "monetary = monetary + NUMERIC '0.01'"),
    set("user_id = 4", "recency_days = 14"),
    set("user_id = 4", "as_of_week = DATE '2021-02-15'"),
  ],
  rfm_segments__money: [set("user_id = 4", "monetary = monetary + NUMERIC '0.01'"), without("user_id = 9")],
  rfm_segments__scores: [
    set("user_id = 9", "monetary_score = 1"), // its tie with user 8 is broken
    set("user_id = 9", "frequency_score = 2"),
    set("user_id = 2", "recency_score = 3"),
    set("user_id = 2", "recency_score = 6"),
    set("user_id = 3", "frequency_score = 0"),
    set("user_id = 2", "recency_score = NULL"),
  ],
  rfm_segments__segments: [
    set("user_id = 1", "segment = 'vip'"),
    set("user_id = 1", "segment = 'champions'"),
    set("user_id = 4", "segment = 'loyal'"),
    set("user_id = 3", "segment = 'at risk'"),
    set("user_id = 10", "segment = 'lost'"),
    set("user_id = 10", "segment = NULL"),
  ],
  income_band_revenue__weeks: [
    without(`income_band = '15-24K' AND ${week("2021-01-18")}`),
    without(week("2021-02-08")),
    more("income_band = '15-24K'", "income_band = '16-24K'"),
  ],
  income_band_revenue__orders: [
    set(`income_band = '250K+' AND ${week("2020-12-28")}`, "revenue = revenue + NUMERIC '0.01'"),
    set(`income_band = '250K+' AND ${week("2020-12-28")}`, "gross_revenue = gross_revenue + NUMERIC '0.01'"),
    set(`income_band = '250K+' AND ${week("2020-12-28")}`, "refunds = NUMERIC '0.01'"),
    set(`income_band = '250K+' AND ${week("2020-12-28")}`, "order_count = 2"),
    set(`income_band = 'unknown' AND ${week("2021-01-04")}`, "active_users = 1"),
  ],
  income_band_revenue__total: [
    set(`income_band = '250K+' AND ${week("2020-12-28")}`, "revenue = revenue + NUMERIC '0.01'"),
    set(`income_band = '250K+' AND ${week("2020-12-28")}`, "revenue_share = NUMERIC '0.1534'"),
    set(`income_band = '15-24K' AND ${week("2021-01-18")}`, "order_count = 1"),
    without(week("2020-12-28")),
  ],
  discount_dependence__orders: [
    without("user_id = 3"),
    more("user_id = 5", "user_id = 7"),
    set("user_id = 1", "revenue = revenue + NUMERIC '0.01'"),
    set("user_id = 1", "discount = discount + NUMERIC '0.01'"),
    set("user_id = 1", "basket_count = 6"),
    set("user_id = 1", "discounted_count = 4"),
  ],
  discount_dependence__classes: [
    set("user_id = 1", "dependence = 'none'"),
    set("user_id = 1", "dependence = 'medium'"),
    set("user_id = 1", "dependence = 'high'"),
    set("user_id = 9", "dependence = 'low'"),
    set("user_id = 9", "dependence = 'some'"),
    set("user_id = 9", "dependence = NULL"),
    set("user_id = 5", "dependence = 'low'"),
    set("user_id = 1", "discount_share = NUMERIC '0.0517'"),
    set("user_id = 1", "discount_share = NULL"),
  ],
  churned_users__orders: [
    without("user_id = 8"),
    more("user_id = 8", "user_id = 9", "last_order_on = DATE '2020-12-21'"),
    set("user_id = 8", "revenue = revenue + NUMERIC '0.01'"),
    set("user_id = 8", "last_order_on = DATE '2020-12-19'"),
  ],
  churned_users__weeks: [
    set("user_id = 10", "weeks_gone = 9"),
    set("user_id = 10", "weeks_gone = NULL"),
    set("user_id = 10", "churned_week = DATE '2021-02-01'"),
    set("user_id = 8", "weeks_gone = 7", "churned_week = DATE '2021-02-15'", "last_order_on = DATE '2020-12-21'"),
    set("user_id = 8", "segment = NULL"),
  ],
  weekly_summary__weeks: [
    without(week("2021-01-18")),
    more(week("2021-01-18"), "week = DATE '2021-02-15'"),
    set(week("2020-12-28"), "iso_week = '2021-W53'"),
  ],
  weekly_summary__orders: [
    set(week("2020-12-28"), "revenue = revenue + NUMERIC '0.01'"),
    set(week("2020-12-28"), "refunds = NUMERIC '0.01'"),
    set(week("2020-12-28"), "order_count = 4"),
    set(week("2020-12-28"), "active_users = 4"),
    set(week("2021-01-04"), "store_count = 2"),
  ],
  weekly_summary__agrees: [
    set(week("2020-12-28"), "new_users = 2"),
    set(week("2021-02-01"), "repeat_share = NULL"),
    set(week("2021-02-01"), "basket_value = NUMERIC '7.01'"),
    set(week("2021-02-01"), "items_per_basket = NULL"),
    set(week("2021-01-04"), "retention_4_weeks = NULL"),
    set(week("2020-12-28"), "discount_share = NUMERIC '1.01'"),
    set(week("2020-12-28"), "known_income_share = NUMERIC '-0.01'"),
  ],
  weekly_summary__churn: [set(week("2021-02-08"), "churned_count = 2"), without(week("2021-02-08"))],
};
for (const [model, columns] of Object.entries(keys)) {
  faults[`${model}__key`] = [twice, ...columns.map((column) => set("TRUE", `${column} = NULL`))];
}

suite("the models", { concurrency: true }, () => {
  test("each has a header, at least two checks with one, and no column named like a table", () => {
    assert.equal(names.length, 12);
    for (const [file, sql] of [...models, ...checks]) assert.match(sql, /^-- \S.*\n(--.*\n)*(CREATE|WITH|SELECT)\b/, file);
    for (const [name, sql] of models) {
      assert.match(sql, new RegExp(`\nCREATE OR REPLACE TABLE ${name} \\(\n`));
      assert.match(sql, /\n-- Grain: /, name);
      const own = [...checks].filter(([check]) => modelOf(check) === name);
      assert.ok(own.length >= 2, `${name} has ${own.length} checks`);
      // What names a table is taken for a table when the order is found.
      for (const table of [...names, "orders", "users"]) assert.doesNotMatch(sql, new RegExp(`(^  |AS )${table}\\b`, "m"));
    }
    // A check belongs to the last model that it names, which is the one that its file names.
    for (const [check, sql] of checks) {
      const code = sql.replace(/--.*/g, "");
      const named = names.filter((name) => new RegExp(`\\b${name}\\b`).test(code));
      assert.equal(named.at(-1), modelOf(check), check);
    }
  });

  suite("on the fixture", { concurrency: 1 }, () => {
    let shop: Shop;
    before(async () => {
      shop = await createShop();
      await insert(shop, "orders");
      await insert(shop, "users");
      await Promise.all(["scripts/orders.ts", "scripts/users.ts"].map((script) => shop.succeed(script)));
      await build(shop);
    });
    after(() => shop[Symbol.asyncDispose]());

    test("each gives the rows computed by hand, and so does the other SQL", async () => {
      const other = await answers(shop);
      await Promise.all(
        names.map(async (name) => {
          const expected = canonical(table(`${name}.txt`));
          assert.deepEqual(canonical(await rowsOf(shop, name)), expected, name);
          assert.deepEqual(canonical(other.get(name) ?? []), expected, `${name} in Postgres`);
        }),
      );
    });

    test("each table and each column has a description, and the columns are those of the SELECT, in its order", async () => {
      await Promise.all(
        [...models].map(async ([name, sql]) => {
          const { description, schema, timePartitioning, clustering } = await shop.api(`/datasets/${shop.dataset}/tables/${name}`);
          const fields: { name: string; description?: string }[] = schema.fields;
          assert.ok(description, name);
          for (const field of fields) assert.ok(field.description, `${name}.${field.name}`);
          const select = sql.slice(sql.indexOf("\nAS\n") + 4).replace(/;\s*$/, "");
          const [row = {}] = await shop.query(`SELECT * FROM (${select}) LIMIT 1`);
          assert.deepEqual(
            fields.map((field) => field.name),
            Object.keys(row),
          );
          const [, by] = /^CLUSTER BY (.*)$/m.exec(sql) ?? [];
          assert.deepEqual(clustering?.fields, by?.split(", "), name);
          const month = { type: "MONTH", field: "week" };
          assert.deepEqual(timePartitioning, name === "weekly_store_revenue" ? month : undefined, name);
        }),
      );
    });

    test("no check finds anything", () => assertChecksPass(shop));

    for (const name of names) {
      test(`the checks of ${name} find each fault that is planted`, async () => {
        const own = [...checks.keys()].filter((check) => modelOf(check) === name);
        const cases = own.flatMap((check) =>
          (faults[check] ?? assert.fail(`no fault is planted for ${check}`)).map((fault, at): [string, string] => {
            const [, into = name, change = ""] = /^(?:(\w+):)?(.*)$/.exec(fault) ?? [];
            return [`${check} ${at + 1}`, planted(check, into, change)];
          }),
        );
        const found = await offending(shop, cases);
        const missed = [...found].filter(([, rows]) => rows === 0).map(([fault]) => fault);
        assert.deepEqual(missed, []);
      });
    }

    test("with orders of one week only, and without any, no week is complete: no rows, and no check finds any", async () => {
      await shop.query("DELETE FROM orders WHERE DATE(created_at) NOT BETWEEN '2020-12-07' AND '2020-12-13'");
      await shop.query(models.get("weekly_revenue") ?? "");
      assert.deepEqual(await rowsOf(shop, "weekly_revenue"), []);
      await shop.query("DELETE FROM orders WHERE TRUE");
      await build(shop);
      await Promise.all(names.map(async (name) => assert.deepEqual(await rowsOf(shop, name), [], name)));
      await assertChecksPass(shop, ["weekly_revenue", "lifetime_value", "weekly_summary"]);
    });
  });

  suite("on all the real data, with some orders returned, some placed and some users moved to another band", () => {
    let shop: Shop;
    before(async () => {
      shop = await createShop();
      const admin = shop.env.STACK_ADMIN_DATABASE_URL ?? "";
      await loadData(admin, { only: ["orders", "users"] });
      await changeSource(admin, { orders: 3000, users: 50, newOrders: 100 });
      await Promise.all(["scripts/orders.ts", "scripts/users.ts"].map((script) => shop.succeed(script)));
      await build(shop);
    });
    after(() => shop[Symbol.asyncDispose]());

    test("each equals the answer that other SQL gives in Postgres, row by row and to the cent", async () => {
      const expected = await answers(shop);
      for (const name of names) {
        const rows = canonical(expected.get(name) ?? []);
        assert.ok(rows.length > 40, `${name} has ${rows.length} rows`);
        const built = canonical(await rowsOf(shop, name));
        if (built.join("\n") === rows.join("\n")) continue;
        const [here, there] = [new Set(built), new Set(rows)];
        const differing = [...built.filter((row) => !there.has(row)), ...rows.filter((row) => !here.has(row))];
        assert.fail(`${name}: ${differing.length} rows differ, such as\n${differing.sort().slice(0, 6).join("\n")}`);
      }
    });

    test("no check finds anything", () => assertChecksPass(shop));
  });
});
