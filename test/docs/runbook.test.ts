// ops/runbook.md: its form, its commands, and walks through what no other test walks through. Needs the local stack (make up).
import assert from "node:assert/strict";
import { execFile } from "node:child_process";
import { after, before, suite, test } from "node:test";
import { promisify } from "node:util";
import { gunzipSync } from "node:zlib";
import { GetObjectCommand } from "@aws-sdk/client-s3";
import { listObjects } from "../../shared/events/s3.ts";
import { blocksOf, missingTests, read, sectionsOf } from "../lib/documents.ts";
import { createShop, type Shop } from "../lib/shop.ts";
import { root } from "../stack/env.ts";

const runbook = read("ops/runbook.md");
const section = (name: string): string => sectionsOf(runbook).get(name) ?? assert.fail(`no section ${name}`);
const statements = (text: string): string[] => text.split(/;\n/).filter((statement) => statement.trim());

/** Runs the blocks of a section in their order, as a person would, in a shop's environment. @returns what was printed. */
async function follow(shop: Shop, text: string, change: (command: string) => string = (command) => command): Promise<string> {
  let output = "";
  for (const block of blocksOf(text)) {
    const command = change(block.text);
    if (block.language === "sql") for (const one of statements(command)) await shop.admin.unsafe(one);
    else if (block.language === "bigquery") for (const one of statements(command)) await shop.query(one);
    else if (block.language === "sh") output += await shell(shop, command);
    else assert.fail(`nobody runs ${block.language}`);
  }
  return output;
}

async function shell(shop: Shop, command: string): Promise<string> {
  const script = command.replaceAll(/^make /gm, "make --old-file=node_modules/.package-lock.json ");
  const { stdout, stderr } = await promisify(execFile)("bash", ["-ec", script], {
    cwd: root,
    env: shop.env as NodeJS.ProcessEnv,
    maxBuffer: 100 * 1024 * 1024,
  });
  return stderr + stdout;
}

test("each what-if names the tests that walk through it, and they exist", () => {
  const titles = [...runbook.slice(runbook.indexOf("# What if …")).matchAll(/^(?:## (.*)|# (Erasing.*))$/gm)].map(
    ([, a, b]) => a ?? b ?? "",
  );
  assert.ok(titles.length >= 9, titles.join());
  for (const title of titles) {
    const [, list = ""] = /^Walked through by.*:\n\n((?:- .*\n?)+)/m.exec(section(title)) ?? assert.fail(title);
    const named = [...list.matchAll(/^- (\S+): (.*)$/gm)].map(([, file = "", names = ""]) => ({
      file,
      names: names.split("; "),
    }));
    assert.ok(named.length, title);
    assert.deepEqual(missingTests(named), [], title);
  }
});

suite("its commands and walks", () => {
  let shop: Shop;
  before(async () => {
    shop = await createShop({ clickhouse: true });
    await shop.insertRows(1, 200);
    await shop.insertRows(1, 100, "users");
    for (const pipeline of ["orders", "users"]) await shop.succeed(`scripts/${pipeline}.ts`);
  });
  after(() => shop?.[Symbol.asyncDispose]());
  const assertEqual = async (): Promise<void> => assert.deepEqual(await shop.destinationRows(), await shop.sourceRows());

  test("each shell block is what bash reads, and what is to be pasted is in a block that says its language", async () => {
    for (const { language, text } of blocksOf(runbook)) if (language === "sh") await promisify(execFile)("bash", ["-n", "-c", text]);
    for (const [, code = ""] of runbook.replaceAll(/^```[\s\S]*?^```$/gm, "").matchAll(/`([^`\n]+)`/g))
      assert.doesNotMatch(code, /^(select|insert|update|delete|drop|rollback|alter) .* /i);
  });

  test("each SQL statement parses, and its tables and columns exist", async () => {
    const known: string[] = [];
    for (const { language, text } of blocksOf(runbook)) {
      if (language === "sh") continue;
      known.push(language);
      for (const statement of statements(text)) {
        if (language === "sql") {
          const command = statement.replace("PID", "0");
          await shop.admin.unsafe(`explain ${command}`).catch(async (error: { code?: string; message: string }) => {
            // What cannot be explained is tried: there is no such prepared transaction.
            if (error.code === "42601") await assert.rejects(shop.admin.unsafe(command), /does not exist/, statement);
            else throw new Error(`${statement}: ${error.message}`);
          });
        } else if (language === "bigquery")
          await shop.query(statement.replaceAll("raw.", `${shop.dataset}.`).replace("THAT TIME", "2017-01-01 00:00:00+00"));
        else if (language === "clickhouse") {
          const query = statement.replace("= PARTITION", "= 0").replace("= OFFSET", "= 0");
          await shop.clickhouse.query({ query, format: "JSONEachRow" }).then((answer) => answer.json());
        } else assert.fail(`a block in no language that is known: ${language}`);
      }
    }
    assert.deepEqual([...new Set(known)].sort(), ["bigquery", "clickhouse", "sql"]);
  });

  test("a watermark set ahead by hand: of the clock, a run stops and says so; less far, rows are missing; the rewind brings them", async () => {
    const { script } = shop;
    const steps = section("The watermark was set by hand to a wrong value");
    await shop.admin`update etl.watermarks set watermark = now() + interval '1 day' where pipeline = 'orders'`;
    const says = /it was set back, or that ahead. Next: correct it, or ops\/runbook\.md, .* make rewind PIPELINE=orders/;
    await shop.refused(script, 1, says);
    const status = await shop.run("scripts/ops/status.ts");
    assert.match(status.stdout, /^orders: the clock of source database \w+ says \S+, which is before the watermark/m);
    assert.equal(status.code, 1);
    await follow(shop, steps);
    await assertEqual();

    await shop.updateRows(1, 5, "between");
    await shop.admin`update etl.watermarks set watermark = clock_timestamp() where pipeline = 'orders'`;
    await shop.succeed(script);
    assert.notDeepEqual(await shop.destinationRows(), await shop.sourceRows(), "nobody can tell");
    await follow(shop, steps);
    await assertEqual();
  });

  test("a destination table that was dropped: the run says so and moves nothing; the steps bring all of it back", async () => {
    await shop.query("DROP TABLE orders");
    const before = await shop.watermark();
    await shop.refused(shop.script, 2, /destination table \S+\.orders does not exist\. Run: make migrate/);
    assert.equal(await shop.watermark(), before);
    await follow(shop, section("A destination table was dropped"));
    await assertEqual();
    assert.equal((await shop.destinationRows()).length, 200);
  });

  test("one person's data is erased from raw tables, views and the archive, and does not come back", async () => {
    const day = "2017-01-18";
    const { admin } = shop;
    await shop.insertEvents(day, 60);
    await shop.insertEvents("2017-01-19", 10);
    await shop.succeed("scripts/ops/backfill-events.ts", { FROM: day, TO: "2017-01-20" });
    await admin`insert into orders (id, user_id, store_id, status, item_count, total, discount, created_at)
      select 1000 + i, i % 100, 1, 'paid', 1, 10, 0, '2017-01-02Z'::timestamptz + i * interval '1 day' from generate_series(0, 149) i`;
    await admin`update orders set status = 'completed'`; // what the models' checks know
    await shop.succeed("scripts/orders.ts");
    await shop.succeed("scripts/views.ts", { ONLY: "lifetime_value" });
    const warehouse = shop.env.BIGQUERY_VIEWS_DATASET;
    const model = () => shop.query(`SELECT user_id FROM ${warehouse}.lifetime_value ORDER BY user_id`);
    const archived = async (): Promise<string[]> => {
      const { client, name: Bucket, prefix } = shop.bucket;
      const lines: string[] = [];
      for await (const { key: Key } of listObjects(shop.bucket, `${prefix}events/`)) {
        const { Body } = await client.send(new GetObjectCommand({ Bucket, Key }));
        const bytes = (await Body?.transformToByteArray()) ?? new Uint8Array();
        if (Key.endsWith(".gz")) lines.push(...gunzipSync(bytes).toString().trim().split("\n"));
      }
      return lines;
    };
    const ofThem = (lines: string[]): number => lines.filter((line) => JSON.parse(line).user_id === 42).length;
    assert.deepEqual([ofThem(await archived()), (await archived()).length], [1, 70]);
    assert.ok((await model()).some(({ user_id }) => user_id === "42"));

    // The source has purged the day: the harder case. The command stands in the text, not in a block.
    await admin`delete from events where created_at < '2017-01-19Z'`;
    const steps = section("Erasing one person's data");
    const [restore] = /make restore-events FROM=\S+ TO=[\d-]+/.exec(steps) ?? assert.fail();
    await shell(shop, restore);
    const output = await follow(shop, steps, (command) =>
      command.replaceAll("raw.", `${shop.dataset}.`).replace(/^make views$/m, "make orders users\nmake views ONLY=lifetime_value"),
    );
    assert.match(output, /step=done .*failed=0/);

    const nowhere = async (): Promise<void> => {
      assert.deepEqual([ofThem(await archived()), (await archived()).length], [0, 69]);
      const counts = await shop.query(
        `SELECT (SELECT COUNT(*) FROM orders WHERE user_id = 42) AS orders, (SELECT COUNT(*) FROM users WHERE id = 42) AS users`,
      );
      assert.deepEqual(counts, [{ orders: "0", users: "0" }]);
      assert.equal((await admin`select from etl.events_restored where user_id = 42`).count, 0);
      const users = await model();
      assert.ok(users.length > 50 && !users.some(({ user_id }) => user_id === "42"), `${users.length} users`);
    };
    await nowhere();
    // Nor after everything was read again.
    for (const PIPELINE of ["orders", "users"]) {
      await shop.succeed("scripts/ops/rewind.ts", { PIPELINE, TO: "0001-01-01" });
      await shop.succeed(`scripts/${PIPELINE}.ts`);
    }
    await shop.succeed("scripts/views.ts", { ONLY: "lifetime_value" });
    await nowhere();
    await assertEqual();
  });
});
