/**
 * The READMEs' recipes, followed to the letter in a scratch copy: the blocks go where their attributes say (test/lib/documents.ts), the
 * commands are run there. Needs the local stack (make up).
 */
import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import { createHash } from "node:crypto";
import { once } from "node:events";
import { existsSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { text } from "node:stream/consumers";
import { test } from "node:test";
import { type Block, blocksOf, commandsOf, read, readmes, sectionsOf } from "../lib/documents.ts";
import { type Scratch, scratchCopy } from "../lib/scratch.ts";
import { createShop, until } from "../lib/shop.ts";
import { type Env, localEnv, root } from "../stack/env.ts";

/** The blocks of a recipe, and the section that has them. */
function recipe(name: string) {
  const sections = readmes.flatMap((file) => [...sectionsOf(read(file)).values()]);
  const found = sections.filter((text) => blocksOf(text).some(({ attributes }) => attributes.recipe === name));
  assert.equal(found.length, 1, `one section has the recipe ${name}`);
  const [prose = ""] = found;
  const blocks = blocksOf(prose);
  assert.ok(blocks.every(({ attributes }) => attributes.recipe === name));
  const commands = blocks.filter(({ language }) => language === "sh").map(commandsOf);
  const shown = (language: string) => blocks.find((block) => block.language === language && !block.attributes.file)?.text;
  return {
    prose,
    edits: blocks.filter(({ attributes }) => attributes.file),
    commands,
    diff: shown("diff"),
    sql: shown("sql"),
  };
}

/** Puts a block where its attributes say. */
function apply(scratch: Scratch, { attributes: { file = "", at, after, replace }, text }: Block): void {
  const added = text.replace(/\n$/, "");
  const mark = after ?? replace;
  if (!at && !mark) {
    assert.ok(!existsSync(join(scratch.folder, file)));
    writeFileSync(join(scratch.folder, file), text);
    return;
  }
  scratch.edit(file, (content) => {
    if (!mark) return `${content}\n${text}`;
    const found = content.split("\n").filter((line) => line.includes(mark));
    assert.equal(found.length, 1, `${file} has one line with ${mark}`);
    const [line = ""] = found;
    if (after) return content.replace(line, () => `${line}\n${added}`);
    // A line that was edited since the recipe was written would lose that edit.
    for (const name of line.match(/'[^']+'/g) ?? []) assert.ok(added.includes(name), `${added}\nis without ${name}`);
    return content.replace(line, () => added);
  });
}

/**
 * Runs a command line in the copy, and requires this exit code: make's own is 2. @returns what it printed.
 * Its node_modules is a link to the project's: make is kept from installing there.
 */
async function shell(scratch: Scratch, env: Env, command: string, expected = 0): Promise<string> {
  const make = 'make() { command make -o node_modules/.package-lock.json "$@"; }';
  const { NODE_TEST_CONTEXT: _, ...rest } = env;
  const child = spawn("bash", ["-ec", `exec 2>&1; ${make}; ${command}`], { cwd: scratch.folder, env: rest });
  const [output, [code]] = await Promise.all([text(child.stdout), once(child, "close")]);
  assert.equal(code, expected, `${command}\n${output}`);
  return output;
}

/** make check's parts that look at the files that a recipe touches; the others look at all code, or at what is as it was. */
const check = (scratch: Scratch, ...files: string[]): Promise<string[]> =>
  Promise.all(files.map((file) => shell(scratch, localEnv(), `node ${file}`)));

/** The copy's own test tools: its contracts and its source tables are those that the recipe has made. */
const tools = async (scratch: Scratch) => (await import(join(scratch.folder, "test/lib/shop.ts"))) as typeof import("../lib/shop.ts");

await test("the recipe for a column, followed to the letter, adds it, fills it and refills its history", async () => {
  using scratch = scratchCopy(["test", "ops"]);
  const { createShop } = await tools(scratch);
  await using shop = await createShop({ pushgateway: true });
  const { prose, diff, commands } = recipe("column");
  const run = (command: string, code?: number): Promise<string> => shell(scratch, shop.env, command, code);
  const channels = (): Promise<Record<string, string | null>[]> => shop.query("SELECT id, channel FROM orders ORDER BY id");

  // Before: a warning and a metric, by the names that the recipe gives.
  await shop.insertRows(1, 4);
  await shop.admin.unsafe(
    "alter table orders add channel text default 'web'; comment on column orders.channel is 'Where it was ordered: web, app or till.'",
  );
  assert.match(await run("make orders"), /step=warning .*public\.orders has columns that are not in .* columns=channel/);
  const [metric = ""] = /\betl_unknown\w+/.exec(prose) ?? [];
  assert.equal((await shop.metrics())[metric], 1);
  assert.deepEqual(await shop.destinationRows(), await shop.sourceRows());

  // What is written, as the dry run shows it; twice is once.
  const [[write = "", ...migration] = [], runs] = commands;
  const shown = await run(`DRY_RUN=1 ${write}`);
  for (const line of (diff ?? "").trim().split("\n")) assert.ok(shown.split("\n").includes(line), `${line}\n${shown}`);
  await run(write);
  const again = await run(write);
  assert.deepEqual([again.match(/step=kept/g)?.length, again.match(/step=wrote/g)], [3, null]);
  await shop.updateRows(1, 1, "early");
  const watermark = await shop.watermark();
  assert.match(await run("make orders", 2), /orders\.channel: expected STRING NULLABLE .* found no such column[\s\S]*make migrate/);
  assert.equal(await shop.watermark(), watermark);

  // 2. and 3. The commands.
  const [checked, dry = "", migrate = "", ...others] = migration;
  assert.deepEqual([checked, others], ["make check", []]);
  await check(scratch, "test/check/googlesql.ts", "test/check/postgres.ts");
  const addition = /add column \S+\.orders\.channel STRING NULLABLE/;
  assert.match(prose, addition);
  assert.match(await run(dry), addition);
  await assert.rejects(channels(), /channel/);
  assert.match(await run(migrate), addition);
  const [next = "", all = "", ...more] = runs ?? [];
  assert.deepEqual(more, []);
  assert.doesNotMatch(await run(next), /step=warning/);
  assert.equal((await shop.metrics())[metric], 0);
  assert.deepEqual(
    await channels(),
    ["web", null, null, null].map((channel, at) => ({ id: String(at + 1), channel })),
  );
  const reached = await shop.watermark();
  await run(all);
  assert.equal(await shop.watermark(), reached);
  const rows = await shop.destinationRows();
  assert.deepEqual(rows, await shop.sourceRows());
  assert.deepEqual(
    rows.map(({ channel }) => channel),
    ["web", "web", "web", "web"],
  );

  // A column that is masked, then renamed, then dropped at the source: the expressions that the README puts in its place.
  const masking = sectionsOf(read("schemas/README.md")).get("Leaving out or masking a column");
  const instead = [...`${masking}${prose}`.matchAll(/put\s+`(.*? as status)`\s+for\s+`status` in `(\S+)`/g)];
  assert.equal(instead.length, 3);
  const changes = ["select", "alter table orders rename status to state", "alter table orders drop state"];
  let now = "status";
  for (const [at, change] of changes.entries()) {
    const [, expression = "", file = ""] = instead[at] ?? [];
    await shop.admin.unsafe(change);
    scratch.edit(file, (sql) => sql.replace(`  ${now},`, `  ${expression},`));
    now = expression;
    await shop.admin`update orders set item_count = ${10 + at} where id = ${at + 1}`;
    await run("make orders");
  }
  assert.deepEqual(
    await shop.query("SELECT status, item_count FROM orders ORDER BY id LIMIT 3"),
    [
      [createHash("sha256").update("early").digest("hex"), "10"],
      ["paid", "11"],
      [null, "12"],
    ].map(([status, item_count]) => ({ status, item_count })),
  );
  // Or, once it is in neither file, the SQL that migrate prints.
  scratch.edit("sql/orders.sql", (sql) => sql.replace(`  ${now},\n`, ""));
  scratch.editFields("orders", (fields) => fields.filter(({ name }) => name !== "status"));
  const refused = await run(migrate, 2);
  await shop.query(/ALTER TABLE \S+ DROP COLUMN status/.exec(refused)?.[0] ?? assert.fail(refused));
  await run(`${migrate} orders`);
  assert.deepEqual(await shop.destinationRows(), await shop.sourceRows());
});

await test("the recipe for a pipeline: make new-pipeline, from a table made a minute ago to rows, status and alert; then verify is clean", async () => {
  using scratch = scratchCopy(["test"]);
  await using shop = await createShop({ folder: scratch.folder, pushgateway: true });
  const { sql, commands } = recipe("pipeline");
  const run = (command: string, code?: number): Promise<string> => shell(scratch, shop.env, command, code);
  const [[write = ""] = [], [sync = ""] = []] = commands;
  await shop.admin.unsafe(`
    create schema crm;
    create type crm.kind as enum ('shop', 'depot');
    create domain crm.zip as varchar(10);
    create table crm.stores (
      id bigint, small smallint, whole int not null, price numeric(12,2), amount numeric, huge numeric(60,20), ratio real,
      score float8, open boolean, name text, code varchar(5), fixed char(3), ref uuid, kind crm.kind, ip inet, net cidr, took interval,
      day date, at time, local timestamp, seen timestamptz, doc jsonb, raw json, photo bytea, tags text[], zip crm.zip, "order" int,
      place point, "Odd Name" text);
    comment on table crm.stores is 'One row per store.';
    comment on column crm.stores.name is 'Its name "on the sign".'`);

  // Refused, with what to run, until it has a key and a cursor.
  const refused = await run(write, 2);
  const remedies = ["it needs a key", "it needs a cursor"].map(
    (fault) => new RegExp(`${fault}.* Run: (.*;)`).exec(refused)?.[1] ?? assert.fail(refused),
  );
  for (const remedy of remedies) await shop.admin.unsafe(remedy.replace("(…)", "(id)"));
  assert.match(await run(write.replace("crm.stores", "status"), 2), /the source has no table public\.status/);

  assert.match(await run(`NAME=storesEU ${write}`, 2), /NAME must begin with .* small letters/); // a label of BigQuery's jobs too

  // A dry run writes nothing; a repeated one adds nothing, and leaves what was edited.
  const dry = await run(`DRY_RUN=1 ${write}`);
  assert.match(dry, /^\+ {6}\{ "name": "name", "type": "STRING", "mode": "NULLABLE", "description": "Its name \\"on the sign\\"\." \},$/m);
  assert.match(dry, /^\+ {2}-- Left out: place, since no field has such a name and type, point\. To sync it: place::text as place/m);
  assert.ok(!existsSync(join(scratch.folder, "sql/stores.sql")));
  const written = await run(write);
  scratch.edit("sql/stores.sql", (text) => text.replace("  whole,", "  whole, -- edited"));
  const again = await run(write);
  assert.deepEqual([again.match(/step=kept/g)?.length, again.match(/step=wrote/g)], [written.match(/step=wrote/g)?.length, null]);
  assert.match(readFileSync(join(scratch.folder, "sql/stores.sql"), "utf8"), /edited/);

  // The statement of the superuser: what the README shows, and the trigger.
  const statements = written.split("\n").filter((line) => /^(grant|create) /.test(line));
  assert.deepEqual(statements.slice(0, -1), sql?.trim().split("\n"));
  for (const statement of statements) await shop.admin.unsafe(statement);
  await shop.admin`
    insert into crm.stores (id, small, whole, price, amount, huge, ratio, score, open, name, code, fixed, ref, kind, ip, net, took, day, at,
      local, seen, doc, raw, photo, tags, zip, "order")
    select i, i, i, i / 3.0, 1e20, 1e30, i / 3.0, i / 3.0, i = 1, 'Store ' || i, 'c' || i, 'f', gen_random_uuid(), 'shop', '10.0.0.1',
      '10.0.0.0/8', '1 day 2 hours', '2017-01-01', '12:30', now(), now(), '{"a": [1, null]}', '{"b": "\\u00e9"}', '\\x00ff', '{x,y}', '12345', i
    from generate_series(1, 3) i`;
  const output = await run(sync);
  assert.match(output, /create table \w+\.stores/);
  assert.match(output, /step=done rows=3 /);
  assert.match(output, /^stores +20\S+ .* succeeded /m);
  await shop.admin`update crm.stores set name = 'Elsewhere' where id = 2`;
  assert.match(await run("make stores"), /inserted=0 updated=1 /);
  assert.match(await run("make verify PIPELINE=stores"), /step=compared rows=3 new=0 missing=0 extra=0 different=0 twice=0 unreachable=0 /);
  const [row] = await shop.query("SELECT name, kind, took, TO_JSON_STRING(doc) AS doc, `order`, zip FROM stores WHERE id = 1");
  assert.deepEqual(row, {
    name: "Store 1",
    kind: "shop",
    took: "P1DT2H",
    doc: '{"a":[1,null]}',
    order: "1",
    zip: "12345",
  });
  assert.equal((await shop.metrics("stores")).etl_rows, 1);

  // make check, and what cron and Prometheus need. It is there in `make`, too.
  await check(scratch, "test/check/googlesql.ts", "test/check/postgres.ts", "test/ops/alerts.test.ts");
  assert.match(await run("make"), /^ {2}make stores {2,}Sync stores to BigQuery/m);
  const file = (name: string): string => readFileSync(join(scratch.folder, name), "utf8");
  assert.match(file("ops/crontab"), /^\d+ 3 {2}\* \* \* {2}sleep .* timeout -k 60 2h make stores >>\/var\/log\/etl\/stores\.log 2>&1$/m);
  const minutes = [...file("ops/crontab").matchAll(/^(\d+) /gm)].map(([, minute]) => minute);
  assert.ok(new Set(minutes).size === minutes.length && minutes.every((minute) => Number(minute) % 2));
  assert.match(file("ops/alerts.yml"), /labels: \{ pipeline: stores \}\n +expr: vector\(86400\)\n/);
  const steps = (pipeline: string): string => file(`scripts/${pipeline}.ts`).replace(/\/\*\*[\s\S]*?\*\//, "");
  assert.equal(steps("stores"), steps("orders").replaceAll("orders", "stores"));
});

await test("the recipe for a model, followed to the letter, publishes it; a check that finds a wrong row keeps the table as it was", async () => {
  using scratch = scratchCopy(["test", "ops", "views"]);
  const { createShop } = await tools(scratch);
  await using shop = await createShop({ pushgateway: true });
  await shop.insertRows(1, 100);
  await shop.admin`update orders set created_at = created_at + id * interval '1 day'`;
  await Promise.all([shop.succeed("scripts/orders.ts"), shop.succeed("scripts/users.ts")]);
  const { prose, edits, commands } = recipe("model");
  assert.equal(prose.match(/^\d\. /gm)?.length, 2);
  for (const block of edits) apply(scratch, block);
  assert.equal(edits.length, 3);
  const [checked, make = "", ...others] = commands.flat();
  assert.deepEqual([checked, others], ["make check", []]);
  await check(scratch, "test/check/googlesql.ts");

  assert.match(await shell(scratch, shop.env, make), /^weekday_orders +\d+ +2 .* yes$/m);
  const rows = () => shop.query(`SELECT weekday, order_count, total FROM ${shop.dataset}_warehouse.weekday_orders ORDER BY weekday`);
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
    assert.match(await shell(scratch, shop.env, make, 2), new RegExp(`views/checks/weekday_orders__${name}\\.sql`));
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
  const { createSensors } = (await import(join(scratch.folder, "test/lib/sensors.ts"))) as typeof import("../lib/sensors.ts");
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
  const rows = (columns: string): Promise<unknown[]> =>
    shop.select(`SELECT toInt32(id) AS id, ${columns} FROM sensor_readings FINAL ORDER BY sensor_readings.id`);
  await until("they are there", async () => (await rows("1")).length === 3);

  const { prose, edits, commands } = recipe("readings-column");
  for (const block of edits) apply(scratch, block);
  assert.deepEqual(commands, [["make check", "make migrate"]]);
  await check(scratch, "test/check/clickhouse.ts");
  assert.match(await shell(scratch, shop.env, "make migrate"), /step=apply what=schemas\/clickhouse\/010_quality\.sql$/m);
  // By the consumer that still runs, and by one that starts.
  await sensors.produce([change("c", 4, { quality: 9 }), change("d", 1, { quality: 7 })]);
  const expected = [
    { id: 2, quality: null },
    { id: 3, quality: null },
    { id: 4, quality: 9 },
  ];
  await until("the deletion is there", async () => JSON.stringify(await rows("toInt32(quality) AS quality")) === JSON.stringify(expected));
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
