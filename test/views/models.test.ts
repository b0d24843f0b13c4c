/**
 * The models of views/ and their checks, on the local BigQuery server (make up): on a small fixture (test/fixtures/views/orders.txt names
 * its awkward cases; beside it is what each model makes of it, computed by hand), on all the real data against other SQL in Postgres, and
 * with faults.
 */
import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { after, before, suite, test } from "node:test";
import { type Model, readModels } from "../../shared/views/models.ts";
import { changeSource } from "../data/change.ts";
import { loadData } from "../data/load.ts";
import { createShop, type Shop } from "../lib/shop.ts";

type Row = Record<string, string | null>;
const fixtures = join(import.meta.dirname, "../fixtures/views");
const read = (file: string): string => readFileSync(file, "utf8");

const models = readModels(["orders", "users"]);
const names = models.map(({ name }) => name);

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

/** Builds the models, each statement as it stands in its file. */
async function build(shop: Shop): Promise<void> {
  for (const { file, sql } of models) await shop.query(sql).catch((error: Error) => assert.fail(`${file}: ${error.message}`));
}

/** The twelve answers by other SQL, in Postgres, from the source. */
async function answers(shop: Shop): Promise<Map<string, Row[]>> {
  const queryOf = (name: string): string => read(join(fixtures, `postgres/${name}.sql`));
  const sql = shop.connect("answers");
  await sql.unsafe(queryOf("_calendar"));
  const found = new Map<string, Row[]>();
  for (const name of names) {
    // Later ones may read an answer; what Postgres computed, not what is compared.
    await sql
      .unsafe(`create temp table answer_${name} as ${queryOf(name)}`)
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

async function assertChecksPass(shop: Shop, of = names): Promise<void> {
  const own = models.filter(({ name }) => of.includes(name)).flatMap(({ checks }) => checks);
  const selects = own.map(({ name, sql }): [string, string] => [name, sql]);
  for (const [name, rows] of await offending(shop, selects)) assert.equal(rows, 0, name);
}

/** A check for offending(), in which a table is replaced by a changed copy: `change` is a SELECT in which $ is the table. */
function planted(sql: string, into: string, change: string): string {
  const fault = `WITH ${into} AS (${change.replaceAll("$", `built_${into}`)})`;
  return /^WITH\b/m.test(sql) ? sql.replace(/^WITH\b/m, `${fault},`) : sql.replace(/^SELECT\b/m, `${fault}\nSELECT`);
}

const twice = "SELECT * FROM $ UNION ALL (SELECT * FROM $ LIMIT 1)";
const without = (rows: string): string => `SELECT * FROM $ WHERE NOT (${rows})`;
const set = (rows: string, column: string, value: string): string =>
  `SELECT * REPLACE (IF(${rows}, ${value}, ${column}) AS ${column}) FROM $`;

/** Its columns and their types, of those that have a description. */
const columnsOf = ({ sql }: Model): Record<string, string> =>
  Object.fromEntries(
    [...sql.matchAll(/^ {2}(\w+) (INT64|NUMERIC|DATE|STRING) OPTIONS \(description = "/gm)].map((found) => found.slice(1)),
  );

const more: Record<string, (column: string) => string> = {
  INT64: (column) => `${column} + 1`,
  NUMERIC: (column) => `${column} + NUMERIC '0.01'`,
  DATE: (column) => `DATE_ADD(${column}, INTERVAL 7 DAY)`,
  STRING: (column) => `CONCAT(${column}, 'x')`,
};

/** What can be wrong with a model's table: a column that is more by the least in one row, a row that is gone, twice or without key. */
function faultsOf(model: Model, rows: Row[]): Record<string, string> {
  const columns = columnsOf(model);
  // The columns that make a row one of its kind are those that its first check counts by.
  const counted = model.checks.find(({ name }) => name === `${model.name}__key`)?.sql ?? "";
  const key = /GROUP BY (.*)/.exec(counted)?.[1]?.split(", ") ?? assert.fail(model.name);
  const is = (row: Row = {}): string => key.map((column) => `${column} = CAST('${row[column]}' AS ${columns[column]})`).join(" AND ");
  const sorted = rows.toSorted((a, b) => (String(a[key[0] ?? ""]) < String(b[key[0] ?? ""]) ? -1 : 1));
  const middle = (of: Row[]): Row | undefined => of[Math.floor(of.length / 2)];
  const faults: Record<string, string> = { twice };
  for (const column of key) faults[`no ${column}`] = set(is(sorted[0]), column, "NULL");
  for (const [at, row] of [sorted[0], middle(sorted), sorted.at(-1)].entries()) faults[`gone ${at}`] = without(is(row));
  for (const [column, type] of Object.entries(columns)) {
    const known = sorted.filter((row) => row[column] !== null);
    const some = known.filter((row) => row[column] !== "0");
    faults[column] = set(is(middle(some) ?? middle(known)), column, more[type]?.(column) ?? "");
  }
  return faults;
}

/** Faults of their own: a week that is not over yet, and orders that no longer are what the model was made of. */
const special: [check: string, into: string, change: string][] = [
  ["weekly_revenue__over", "weekly_revenue", set("week = DATE '2021-02-08'", "week", "DATE_TRUNC(CURRENT_DATE(), WEEK(MONDAY))")],
  ["weekly_revenue__statuses", "orders", set("id = 9", "status", "'cancelled'")],
  ["weekly_revenue__statuses", "orders", set("id = 9", "status", "NULL")],
  ["weekly_revenue__orders", "orders", set("id = 12", "status", "'returned'")],
];

/** Columns that no check knows to the least: a range, or nothing, is what raw orders say of them without the model's own SQL. */
const loose = [
  ...["discount_dependence as_of_week", "weekly_baskets single_item_count", "weekly_baskets items_per_basket"],
  ...["weekly_baskets median_basket", "weekly_baskets largest_basket", "weekly_users won_back_users", "churned_users order_count"],
  ...["churned_users segment", "weekly_summary revenue_change", "weekly_summary discount_share", "weekly_summary known_income_share"],
];

suite("the models", { concurrency: true }, () => {
  test("each has a header, descriptions, and at least two checks with a header", () => {
    assert.equal(names.length, 12);
    for (const model of models) {
      assert.match(model.sql, /^-- \S.*\n(--.*\n)*-- Grain: (.*\n--)*.*\nCREATE/, model.file);
      const list = /^CREATE OR REPLACE TABLE \w+ \(\n((?: {2}.*\n)+)\)/m.exec(model.sql)?.[1] ?? "";
      assert.equal(
        Object.keys(columnsOf(model)).length,
        list.trim().split("\n").length,
        `${model.file}: each column has a type and a description`,
      );
      assert.ok(model.checks.length >= 2, `${model.name} has ${model.checks.length} checks`);
      for (const { file, name, sql } of model.checks) {
        assert.match(sql, /^-- \S.*\n(--.*\n)*(WITH|SELECT)\b/, file);
        assert.ok(name.startsWith(`${model.name}__`), `${file} is run with ${model.name}`);
      }
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
          const [built, expected] = [await rowsOf(shop, name), canonical(table(`${name}.txt`))];
          const some = /^# Left out: the rows without an order\.$/m.test(read(join(fixtures, `${name}.txt`)));
          const present = built.filter((row) => !some || (row.order_count ?? row.active_users) !== "0");
          assert.deepEqual(canonical(present), expected, name);
          assert.deepEqual(canonical(other.get(name) ?? []), canonical(built), `${name} in Postgres`);
        }),
      );
    });

    test("no check finds anything", () => assertChecksPass(shop));

    test("each check finds a fault, and none is unseen: a column more by the least in one row, a row gone, twice, without key", async () => {
      const [unseen, silent] = [new Set<string>(), new Set<string>()];
      for (const model of models) {
        const faults = faultsOf(model, await rowsOf(shop, model.name));
        const left = new Set(Object.keys(faults));
        for (const check of model.checks) {
          const finds = async (of: string[]): Promise<string[]> => {
            const found = await offending(
              shop,
              of.map((fault) => [fault, planted(check.sql, model.name, faults[fault] ?? "")]),
            );
            return of.filter((fault) => found.get(fault));
          };
          // What no check before it has found, if it names that; where it finds none of these, all that it names.
          const mentions = (fault: string): boolean => !(fault in columnsOf(model)) || new RegExp(`\\b${fault}\\b`).test(check.sql);
          const ofKeys = check.name.endsWith("__key");
          const named = Object.keys(faults).filter((fault) => /^(twice|no )/.test(fault) === ofKeys && mentions(fault));
          const now = await finds(named.filter((fault) => left.has(fault)));
          for (const fault of now) left.delete(fault);
          if (!now.length && !(await finds(named)).length) silent.add(check.name);
        }
        for (const fault of left) unseen.add(`${model.name} ${fault}`);
      }
      const others = special.map(([name, into, change], at): [string, string] => {
        const { sql } = models.flatMap(({ checks }) => checks).find((check) => check.name === name) ?? assert.fail(name);
        return [`${name} ${at}`, planted(sql, into, change)];
      });
      for (const [named, rows] of await offending(shop, others)) {
        assert.ok(rows, named);
        silent.delete(named.split(" ")[0] ?? "");
      }
      assert.deepEqual([[...silent], [...unseen]], [[], loose]);
    });

    test("with orders of one week only, and without any, no week is complete: no rows, and no check finds any", async () => {
      await shop.query("DELETE FROM orders WHERE DATE(created_at) NOT BETWEEN '2020-12-07' AND '2020-12-13'");
      await shop.query(models[0]?.sql ?? "");
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
