// What a second pair of eyes broke once: each of these lost, doubled or hung something, or said nothing useful.
import assert from "node:assert/strict";
import { writeFileSync } from "node:fs";
import { join } from "node:path";
import { after, before, test } from "node:test";
import { scratchCopy } from "./lib/scratch.ts";
import { createShop, type Shop, stepsOfPipeline, until } from "./lib/shop.ts";

const scratch = scratchCopy();
after(() => scratch[Symbol.dispose]());

stepsOfPipeline((pipeline) => {
  const script = `scripts/${pipeline}.ts`;
  let shop: Shop;
  before(async () => {
    shop = await createShop({ pipeline, folder: scratch.folder });
    await shop.insertRows(1, 3);
    await shop.succeed(script);
  });
  after(() => shop?.[Symbol.asyncDispose]());

  const assertSynced = async (): Promise<void> => {
    await shop.succeed(script);
    assert.deepEqual(await shop.destinationRows(), await shop.sourceRows());
  };
  const assertRefuses = async (code: number, text: RegExp, variables = {}): Promise<void> => {
    const state = async (): Promise<unknown[]> => [await shop.watermark(), await shop.destinationRows()];
    const before = await state();
    const result = await shop.run(script, variables);
    assert.equal(result.code, code, result.stderr);
    assert.match(result.stderr, text);
    assert.doesNotMatch(result.stderr, /^ {4}at /m, "a stack trace where a sentence should be");
    assert.deepEqual(await state(), before);
  };

  test("a re-run by hand reads no further than the bound, so that a late commit with an older now() still arrives", async () => {
    const update = `update ${pipeline} set updated_at = now(), ${shop.text}`;
    await shop.admin.unsafe(`alter table ${pipeline} disable trigger user`);
    try {
      const late = shop.connect("late");
      await late.begin(async (transaction) => {
        await transaction`select now()`;
        await shop.admin.unsafe(`${update} = 'first' where id = 1`);
        const { stderr } = await shop.succeed(script, { FROM: "2026-01-01", TO: "9999-01-01" });
        assert.match(stderr, /step=held by="pid \d+, application \\"late\\"/);
        await transaction.unsafe(`${update} = 'last' where id = 1`);
      });
      await assertSynced();
    } finally {
      await shop.admin.unsafe(`alter table ${pipeline} enable trigger user`);
    }
  });

  test("a SELECT that returns a key twice merges nothing, and names the key", async () => {
    await shop.updateRows(1, 3, "changed");
    {
      using _ = scratch.edit(`sql/${pipeline}.sql`, (text) =>
        text.replace(`from ${pipeline}`, `from ${pipeline} join (values (1), (2)) twice (n) on id = 2 or n = 1`),
      );
      await assertRefuses(
        2,
        new RegExp(`sql/${pipeline}\\.sql returned the key {"id":2} more than once; nothing of this chunk was merged`),
      );
    }
    assert.deepEqual(await shop.stagingTables(), []);
    await assertSynced();
  });

  test("a transaction in which track_activities was switched on is not taken for none", async () => {
    const sql = shop.connect("hidden");
    await sql`set track_activities = off`;
    const [session] = await sql`select pg_backend_pid() as pid`;
    await sql.begin(async (transaction) => {
      await transaction`set local track_activities = on`;
      await transaction`update ${sql(shop.table)} set ${sql(shop.text)} = 'hidden' where id = 1`;
      await assertRefuses(
        1,
        /no bound is safe: pid \d+, application "hidden", role postgres hides when its transaction began/,
      );
    });
    await sql.end();
    await until("the session is gone", async () => {
      const { count } = await shop.admin`select from pg_stat_activity where pid = ${session?.pid}`;
      return count === 0;
    });
    await assertSynced();
  });

  test("files that an editor leaves, a comment after the last semicolon, two hosts, a broken contract: no harm, or a sentence", async () => {
    const contract = `schemas/bigquery/${pipeline}.json`;
    for (const name of [`.${pipeline}.json.swp`, `${pipeline}.json~`, "README.md"])
      writeFileSync(join(scratch.folder, "schemas/bigquery", name), "");
    const { stdout } = await shop.succeed("scripts/ops/status.ts", { JSON: "1" });
    const names = JSON.parse(stdout).map((status: { pipeline: string }) => status.pipeline);
    assert.ok(names.includes(pipeline) && !names.some((name: string) => /json|README/.test(name)), stdout);
    await shop.insertRows(4, 5);
    {
      using _ = scratch.edit(`sql/${pipeline}.sql`, (text) => `${text}-- the end;\n`);
      await assertSynced();
    }
    const { SOURCE_DATABASE_URL: url = "" } = shop.env;
    await assertRefuses(2, /SOURCE_DATABASE_URL must name one host/, {
      SOURCE_DATABASE_URL: url.replace("127.0.0.1", "127.0.0.9,127.0.0.1"),
    });
    for (const [broken, says] of [
      [
        (text: string) => text.replace("tableConstraints", "constraints"),
        "with schema\\.fields and tableConstraints\\.primaryKey",
      ],
      [() => "{", ".* JSON"],
    ] as const) {
      using _ = scratch.edit(contract, broken);
      await assertRefuses(2, new RegExp(`${contract} must be a BigQuery Table resource ${says}`));
    }
  });
});
