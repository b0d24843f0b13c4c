/**
 * The README's recipes, followed to the letter in a scratch copy: its snippets go into the files that the sentences before
 * them name, its commands are run there. Needs the local stack (make up).
 */
import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import { once } from "node:events";
import { existsSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { text } from "node:stream/consumers";
import { test } from "node:test";
import { type Scratch, scratchCopy } from "./lib/scratch.ts";
import { until } from "./lib/shop.ts";
import { type Env, localEnv, root } from "./stack/env.ts";

/** A fenced block of a recipe, with the sentences before it and what it is written in. */
interface Block {
  before: string;
  language: string;
  lines: string[];
}

function recipe(name: string): { prose: string; blocks: Block[] } {
  const [, section] = readFileSync(join(root, "README.md"), "utf8").split(`\n## ${name}\n`);
  const prose = (section ?? assert.fail(`the README has no section "${name}"`)).split("\n## ")[0] as string;
  const blocks = [...prose.matchAll(/((?:^(?!```).+\n)+)\n^```(\w+)\n([\s\S]*?)\n^```$/gm)].map(
    ([, before = "", language = "", content = ""]) => ({
      before: before.replaceAll("\n", " "),
      language,
      lines: content.split("\n"),
    }),
  );
  assert.equal(blocks.length, prose.match(/^```\w+$/gm)?.length, "each block has a sentence before it");
  return { prose, blocks };
}

/** Puts a snippet where the sentence before it says. */
function apply(scratch: Scratch, { before, lines }: Block): void {
  const added = lines.join("\n");
  const [, created] = /New file `(\S+)`/.exec(before) ?? [];
  if (created) {
    assert.ok(!existsSync(join(scratch.folder, created)));
    writeFileSync(join(scratch.folder, created), `${added}\n`);
    return;
  }
  const [, extended] = /At the end of `(\S+)`/.exec(before) ?? [];
  if (extended) {
    scratch.edit(extended, (content) => `${content}\n${added}\n`);
    return;
  }
  const [, file = "", how = "", mark = ""] =
    /In `(\S+)`, (after )?the line with `([^`]+)`/.exec(before) ?? assert.fail(`where does this go? ${before}`);
  scratch.edit(file, (content) => {
    const found = content.split("\n").filter((line) => line.includes(mark));
    assert.equal(found.length, 1, `${file} has one line with ${mark}`);
    const [line = ""] = found;
    if (how) return content.replace(line, () => `${line}\n${added}`);
    // A line that was edited since the README was written would lose that edit.
    for (const name of line.match(/'[^']+'/g) ?? []) assert.ok(added.includes(name), `${added}\nis without ${name}`);
    return content.replace(line, () => added);
  });
}

/** The commands of a block, without their comments. */
function commands({ language, lines }: Block): string[] {
  assert.equal(language, "bash");
  return lines.map((line) => line.replace(/\s+#.*$/, ""));
}

interface Done {
  code: number;
  output: string;
}

/** Runs a command line in the copy. Its node_modules is a link to the project's: make is kept from installing there. */
async function shell(scratch: Scratch, env: Env, command: string): Promise<Done> {
  const make = 'make() { command make -o node_modules/.package-lock.json "$@"; }';
  const { NODE_TEST_CONTEXT: _, ...rest } = env;
  const child = spawn("bash", ["-ec", `exec 2>&1; ${make}; ${command}`], { cwd: scratch.folder, env: rest });
  const [output, [code]] = await Promise.all([text(child.stdout), once(child, "close")]);
  return { code, output };
}

/** make check's parts that look at the files that a recipe touches; the others look at all code, or at what is as it was. */
async function check(scratch: Scratch, ...files: string[]): Promise<void> {
  for (const file of files) {
    const { code, output } = await shell(scratch, localEnv(), `node ${file}`);
    assert.equal(code, 0, output);
  }
}

/** The copy's own test tools: its contracts and its source tables are those that the recipe has made. */
async function tools(scratch: Scratch) {
  const { createShop } = (await import(join(scratch.folder, "test/lib/shop.ts"))) as typeof import("./lib/shop.ts");
  const { createSource } = (await import(
    join(scratch.folder, "test/data/source.ts")
  )) as typeof import("./data/source.ts");
  return { createShop, createSource };
}

await test("the recipe for a column, followed to the letter, adds it, fills it and refills its history", async () => {
  using scratch = scratchCopy(["test", "ops"]);
  const { createShop } = await tools(scratch);
  await using shop = await createShop({ pushgateway: true });
  const { prose, blocks } = recipe("Adding a column");
  const run = (command: string): Promise<Done> => shell(scratch, shop.env, command);
  const succeed = async (command: string): Promise<string> => {
    const { code, output } = await run(command);
    assert.equal(code, 0, `${command}\n${output}`);
    return output;
  };
  const channels = (): Promise<Record<string, string | null>[]> =>
    shop.query("SELECT id, channel FROM orders ORDER BY id");

  // Before: a warning and a metric, by the names that the README gives.
  await shop.insertRows(1, 4);
  await shop.admin`alter table orders add channel text default 'web'`;
  assert.match(
    await succeed("make orders"),
    /step=warning .*public\.orders has columns that are not in .* columns=channel/,
  );
  const [metric = ""] = /\betl_unknown\w+/.exec(prose) ?? [];
  assert.equal((await shop.metrics())[metric], 1);
  assert.deepEqual(await shop.destinationRows(), await shop.sourceRows());

  // 1. The edits.
  const edits = blocks.filter(({ language }) => language !== "bash");
  for (const block of edits) apply(scratch, block);
  assert.equal(edits.length, 3);
  await shop.updateRows(1, 1, "early");
  const watermark = await shop.watermark();
  const early = await run("make orders");
  assert.match(early.output, /orders\.channel: expected STRING NULLABLE .* found no such column[\s\S]*make migrate/);
  assert.notEqual(early.code, 0);
  assert.equal(await shop.watermark(), watermark);

  // 2. and 3. The commands.
  const [migration, runs] = blocks.filter(({ language }) => language === "bash").map(commands);
  const [checked, dry = "", migrate = "", ...others] = migration ?? [];
  assert.deepEqual([checked, others], ["make check", []]);
  await check(scratch, "test/check/googlesql.ts", "test/check/postgres.ts");
  const addition = /add column \S+\.orders\.channel STRING NULLABLE/;
  assert.match(prose, addition);
  assert.match(await succeed(dry), addition);
  await assert.rejects(channels(), /channel/);
  assert.match(await succeed(migrate), addition);
  const [next = "", again = "", ...more] = runs ?? [];
  assert.deepEqual(more, []);
  assert.doesNotMatch(await succeed(next), /step=warning/);
  assert.equal((await shop.metrics())[metric], 0);
  assert.deepEqual(
    await channels(),
    ["web", null, null, null].map((channel, at) => ({ id: String(at + 1), channel })),
  );
  const reached = await shop.watermark();
  await succeed(again);
  assert.equal(await shop.watermark(), reached);
  const rows = await shop.destinationRows();
  assert.deepEqual(rows, await shop.sourceRows());
  assert.deepEqual(
    rows.map(({ channel }) => channel),
    ["web", "web", "web", "web"],
  );

  // A column that is renamed, then dropped, at the source: the two expressions that the README puts in its place.
  const instead = [...prose.matchAll(/put `(.*? as status)` for `status` in `(\S+)`/g)];
  assert.equal(instead.length, 2);
  const changes = ["alter table orders rename status to state", "alter table orders drop state"];
  let now = "status";
  for (const [at, change] of changes.entries()) {
    const [, expression = "", file = ""] = instead[at] ?? [];
    await shop.admin.unsafe(change);
    scratch.edit(file, (sql) => sql.replace(`  ${now},`, `  ${expression},`));
    now = expression;
    await shop.admin`update orders set item_count = ${10 + at} where id = ${at + 1}`;
    await succeed("make orders");
  }
  assert.deepEqual(
    await shop.query("SELECT status, item_count FROM orders ORDER BY id LIMIT 3"),
    [
      ["early", "10"],
      [null, "11"],
      ["paid", "4"],
    ].map(([status, item_count]) => ({ status, item_count })),
  );
  // Or, once it is in neither file, the SQL that migrate prints.
  scratch.edit("sql/orders.sql", (sql) => sql.replace(`  ${now},\n`, ""));
  scratch.editFields("orders", (fields) => fields.filter(({ name }) => name !== "status"));
  const refused = await run(migrate);
  assert.notEqual(refused.code, 0);
  await shop.query(/ALTER TABLE \S+ DROP COLUMN status/.exec(refused.output)?.[0] ?? assert.fail(refused.output));
  await succeed(`${migrate} orders`);
  assert.deepEqual(await shop.destinationRows(), await shop.sourceRows());
});

await test("the recipe for a pipeline, followed to the letter, makes one that syncs, with its status, grant and alert", async () => {
  using scratch = scratchCopy(["test", "ops"]);
  const { createShop, createSource } = await tools(scratch);
  await using shop = await createShop({ pushgateway: true });
  const { prose, blocks } = recipe("Adding a pipeline");
  const run = async (command: string): Promise<string> => {
    const { code, output } = await shell(scratch, shop.env, command);
    assert.equal(code, 0, `${command}\n${output}`);
    return output;
  };

  // 1. to 7. The edits and the copy. `make up` runs the two SQL files in this way.
  const edits = blocks.filter(({ language }) => !["bash", "cron"].includes(language));
  for (const block of edits) apply(scratch, block);
  const [copy = [], done = []] = blocks.filter(({ language }) => language === "bash").map(commands);
  for (const command of copy) await run(command);
  // Its number is in the first paragraph: what is edited, and the crontab.
  assert.match(prose, /nine small edits/);
  assert.equal(edits.length + copy.length + 1, 9);
  const privilege = () => shop.admin`
    select has_table_privilege('etl_reader', 'public.stores', 'select') as reads,
           has_table_privilege('etl_reader', 'public.stores', 'insert, update, delete, truncate') as writes`;
  await shop.admin.unsafe(edits[0]?.lines.join("\n") ?? "");
  assert.deepEqual([...(await privilege())], [{ reads: false, writes: false }]);
  await createSource(shop.env.STACK_ADMIN_DATABASE_URL ?? "", []);
  assert.deepEqual([...(await privilege())], [{ reads: true, writes: false }]);
  const statements = readFileSync(join(scratch.folder, "sql/roles.sql"), "utf8").replaceAll(/--.*/g, "");
  assert.doesNotMatch(statements, /password/i);
  const script = readFileSync(join(scratch.folder, "scripts/stores.ts"), "utf8");
  assert.doesNotMatch(script, /users/);

  // 8. The commands.
  assert.match(await run("make"), /^ {2}make stores {2,}Sync stores to BigQuery/m);
  const [checked, first = "", ...others] = done;
  assert.deepEqual([checked, others], ["make check", []]);
  await check(scratch, "test/check/googlesql.ts", "test/check/postgres.ts", "test/alerts.test.ts");
  await shop.admin`
    insert into stores (id, name, city, opened_on)
    select i, 'Store ' || i, 'City ' || i, date '2017-01-01' + i from generate_series(1, 3) i`;
  const output = await run(first);
  assert.match(output, /create table \w+\.stores/);
  assert.match(output, /step=done rows=3 /);
  assert.match(output, /^stores +20\S+ .* succeeded /m);
  const rows = await shop.destinationRows("stores");
  assert.equal(rows.length, 3);
  assert.deepEqual(rows, await shop.sourceRows("stores"));
  assert.match((await shop.watermark("stores")) ?? "", /^20/);
  assert.equal((await shop.metrics("stores")).etl_rows, 3);

  // 9. What cron runs: a change and a new row arrive, and a run that repeats them changes nothing. The line is as test/crontab.test.ts
  // wants it of every pipeline, but without timeout here: that would not see the shell's make.
  await shop.admin`update stores set city = 'Elsewhere', opened_on = null where id = 2`;
  await shop.admin`insert into stores (id, name) values (4, 'New')`;
  const schedule = blocks.find(({ language }) => language === "cron") ?? assert.fail("no block of cron");
  apply(scratch, schedule);
  const [line = "", ...more] = schedule.lines;
  assert.deepEqual(more, []);
  const form =
    /^\d+ \d+ \* \* \* +sleep \$\(\(RANDOM \\% \(JITTER \+ 1\)\)\); (cd \/srv\/etl && )timeout -k 60 \d+h (make stores >>\/var\/log\/etl\/stores\.log 2>&1)$/;
  const [, folder = "", command = ""] = form.exec(line) ?? assert.fail(line);
  await run(`${folder}${command}`.replaceAll(/\/srv\/etl|\/var\/log\/etl/g, scratch.folder));
  assert.match(readFileSync(join(scratch.folder, "stores.log"), "utf8"), /inserted=1 updated=1 /);
  const changed = await shop.destinationRows("stores");
  assert.deepEqual(changed, await shop.sourceRows("stores"));
  assert.match(await run("make stores FROM=2000-01-01 TO=2100-01-01"), /step=done rows=4 /);
  assert.deepEqual(await shop.destinationRows("stores"), changed);

  // The interval is the crontab's: a day. check() has shown that Prometheus reads it.
  assert.match(
    readFileSync(join(scratch.folder, "ops/alerts.yml"), "utf8"),
    /- record: etl_expected_interval_seconds\n +labels: { pipeline: stores }\n +expr: vector\(86400\)\n/,
  );
});

await test("the recipe for a model, followed to the letter, publishes it; a check that finds a wrong row keeps the table as it was", async () => {
  using scratch = scratchCopy(["test", "ops", "views"]);
  const { createShop } = await tools(scratch);
  await using shop = await createShop({ pushgateway: true });
  await shop.insertRows(1, 100);
  await shop.admin`update orders set created_at = created_at + id * interval '1 day'`;
  await Promise.all([shop.succeed("scripts/orders.ts"), shop.succeed("scripts/users.ts")]);
  const { prose, blocks } = recipe("Adding a model");
  assert.equal(prose.match(/^\d\. /gm)?.length, 2);
  const edits = blocks.filter(({ language }) => language === "sql");
  for (const block of edits) apply(scratch, block);
  assert.equal(edits.length, 3);
  const [checked, make = "", ...others] = blocks
    .filter(({ language }) => language === "bash")
    .flatMap((block) => commands(block));
  assert.deepEqual([checked, others], ["make check", []]);
  await check(scratch, "test/check/googlesql.ts");

  const first = await shell(scratch, shop.env, make);
  assert.equal(first.code, 0, first.output);
  assert.match(first.output, /^weekday_orders +\d+ .*2 passed +yes$/m);
  const rows = () =>
    shop.query(`SELECT weekday, order_count, total FROM ${shop.dataset}_warehouse.weekday_orders ORDER BY weekday`);
  const published = await rows();
  const expected = await shop.admin`
    select to_char(created_at at time zone 'UTC', 'FMDay') as weekday, count(*)::text as order_count, sum(total)::text as total
    from orders group by 1 order by 1`;
  const same = (all: Record<string, unknown>[]) => all.map((row) => ({ ...row, total: Number(row.total) }));
  assert.equal(expected.length, 7);
  assert.deepEqual(same(published), same([...expected]));

  // Both checks can fail: a day too many, and orders too few.
  const faults = {
    key: ["\nGROUP BY weekday;", "\nGROUP BY weekday UNION ALL SELECT NULL, 0, 0;"],
    orders: ["FROM orders\n", "FROM orders\nWHERE id > 1\n"],
  };
  for (const [name, [now = "", wrong = ""]] of Object.entries(faults)) {
    using _edit = scratch.edit("views/weekday_orders.sql", (sql) => sql.replace(now, wrong));
    const { code, output } = await shell(scratch, shop.env, make);
    assert.notEqual(code, 0, output);
    assert.match(output, new RegExp(`views/checks/weekday_orders__${name}\\.sql`));
    assert.deepEqual(await rows(), published);
  }
});

test("users is orders, step for step: what is shown of one under kills and faults holds for both", () => {
  const steps = (pipeline: string): string =>
    readFileSync(join(root, `scripts/${pipeline}.ts`), "utf8")
      .replaceAll(pipeline, "PIPELINE")
      .replaceAll(/ {2,}/g, " ")
      .replace(/(\* schedule) \w+/, "$1");
  assert.equal(steps("users"), steps("orders"));
});

await test("the recipe for a column of the readings, followed to the letter, fills it for what is there and for what comes, as does each type's DEFAULT", async () => {
  using scratch = scratchCopy(["test", "ops"]);
  const { createSensors } = (await import(
    join(scratch.folder, "test/lib/sensors.ts")
  )) as typeof import("./lib/sensors.ts");
  await using sensors = await createSensors({ connector: false, partitions: 1 });
  const { shop } = sensors;
  const change = (op: "c" | "d", id: number, more: object) => {
    const row = { id, sensor_id: "S", metric: "m", value: 1.5, recorded_at: "2024-01-01T00:00:00.000000Z", ...more };
    const value = op === "c" ? { before: null, after: row, op } : { before: row, after: null, op };
    return { key: JSON.stringify({ id }), value: JSON.stringify(value) };
  };
  await shop.admin`alter table sensor_readings add quality smallint`;
  await sensors.produce([change("c", 1, { quality: 7 }), change("c", 2, { quality: null }), change("c", 3, {})]);
  const consumer = await sensors.consumer();
  await consumer.line(/step=warning .* columns=quality$/);
  const rows = async (columns: string): Promise<unknown[]> => {
    const query = `SELECT toInt32(id) AS id, ${columns} FROM sensor_readings FINAL ORDER BY sensor_readings.id`;
    return await (await shop.clickhouse.query({ query, format: "JSONEachRow" })).json();
  };
  await until("they are there", async () => (await rows("1")).length === 3);

  const { prose, blocks } = recipe("Adding a column of the readings");
  const [file, shellBlock, ...others] = blocks;
  assert.deepEqual(others, []);
  apply(scratch, file ?? assert.fail("no file"));
  assert.deepEqual(commands(shellBlock ?? assert.fail("no commands")), ["make check", "make migrate"]);
  await check(scratch, "test/check/clickhouse.ts");
  const migrated = await shell(scratch, shop.env, "make migrate");
  assert.equal(migrated.code, 0, migrated.output);
  assert.match(migrated.output, /step=apply what=schemas\/clickhouse\/008_quality\.sql$/m);
  // By the consumer that still runs, and by one that starts.
  await sensors.produce([change("c", 4, { quality: 9 }), change("d", 1, { quality: 7 })]);
  const expected = [
    { id: 2, quality: null },
    { id: 3, quality: null },
    { id: 4, quality: 9 },
  ];
  await until(
    "the deletion is there",
    async () => JSON.stringify(await rows("toInt32(quality) AS quality")) === JSON.stringify(expected),
  );
  consumer.child.kill("SIGTERM");
  await consumer.ended;
  await sensors.produce([change("c", 5, { quality: -1 })]);
  const { stderr } = await shop.succeed("scripts/sensors.ts", { UNTIL: "caught-up" });
  assert.doesNotMatch(stderr, /step=warning/);
  assert.deepEqual(await rows("toInt32(quality) AS quality"), [...expected, { id: 5, quality: -1 }]);

  // Each type of the table, with a value as Debezium writes it, and one of another type: NULL, or its text.
  const defaults = [...prose.matchAll(/^\| .* \| `(\w+\(.+) DEFAULT (.+)` \|$/gm)];
  const values: [unknown, unknown, unknown][] = [
    [7, "7", "x"],
    ['a "b"\n', 'a "b"\n', 7],
    [true, "true", "x"],
    ["NaN", "nan", "x"],
    ["2024-01-01T00:00:00.123456Z", "2024-01-01 00:00:00.123456", "x"],
  ];
  assert.equal(defaults.length, values.length);
  await shop.admin`alter table sensor_readings add n0 bigint, add n1 text, add n2 bool, add n3 float8, add n4 timestamptz`;
  for (const [at, [, type, expression]] of defaults.entries())
    await shop.clickhouse.command({
      query: `ALTER TABLE sensor_readings ADD COLUMN n${at} ${type} DEFAULT ${expression?.replace("'name'", `'n${at}'`)}`,
    });
  const named = (which: 0 | 2) => Object.fromEntries(values.map((value, at) => [`n${at}`, value[which]]));
  await sensors.produce([change("c", 6, named(0)), change("c", 7, named(2))]);
  await sensors.catchUp();
  const found = (await rows(values.map((_, at) => `toString(n${at}) AS n${at}`).join())) as Record<string, unknown>[];
  assert.deepEqual(found.slice(-2), [
    { id: 6, ...Object.fromEntries(values.map(([, text], at) => [`n${at}`, text])) },
    { id: 7, n0: null, n1: "7", n2: null, n3: null, n4: null },
  ]);
});
