// The destination is not the table that it was, or has something set that loses rows: doctor says so before a run does, a run stops
// before a row moves, and the command that both name repairs it. Needs the local stack (make up).
import assert from "node:assert/strict";
import { after, before, test } from "node:test";
import { createShop, type Shop, stepsOfPipeline } from "../lib/shop.ts";

stepsOfPipeline((pipeline) => {
  let shop: Shop;
  before(async () => {
    shop = await createShop({ pipeline });
    await shop.insertRows(1, 5);
    await shop.succeed(shop.script);
  });
  after(() => shop?.[Symbol.asyncDispose]());

  // biome-ignore lint/suspicious/noExplicitAny: the API's own JSON
  const request = (method: string, path: string, body?: object): Promise<any> => shop.api(`/datasets/${shop.dataset}${path}`, method, body);
  const table = `/tables/${pipeline}`;
  const assertSynced = async (): Promise<void> => {
    await shop.succeed(shop.script);
    assert.deepEqual(await shop.destinationRows(), await shop.sourceRows());
  };

  const rewind = new RegExp(`make rewind PIPELINE=${pipeline} TO=0001-01-01`);
  const cases: Record<string, { change(): Promise<unknown>; says: RegExp[]; repair?: (statements: string[]) => Promise<unknown> }> = {
    "a table that expires, as its partitions do, requires a partition filter and has a row access policy": {
      change: async () => {
        const timePartitioning = { type: "MONTH", field: "created_at", expirationMs: "86400000" };
        const expirationTime = String(Date.now() + 86_400_000);
        await request("PATCH", table, { expirationTime, timePartitioning, requirePartitionFilter: true });
        await shop.query(`CREATE ROW ACCESS POLICY some ON ${shop.dataset}.${pipeline} GRANT TO ("user:a@b.c") FILTER USING (id < 3)`);
      },
      says: [
        /expires at \S+, with all its rows.*SET OPTIONS \(expiration_timestamp = NULL\)/,
        /each partition expires, with its rows.*SET OPTIONS \(partition_expiration_days = NULL\)/,
        /requires a partition filter, and an upsert has none/,
        /a row access policy hides rows from an upsert/,
      ],
      // The local server fails at an option that is NULL; the API takes it.
      repair: async (statements) => {
        await request("PATCH", table, {
          expirationTime: null,
          timePartitioning: { type: "MONTH", field: "created_at", expirationMs: null },
        });
        for (const sql of statements) if (!sql.includes("= NULL")) await shop.query(sql);
      },
    },
    "a table that was dropped, and made again": {
      change: async () => {
        await shop.query(`DROP TABLE ${pipeline}`);
        const { code, stderr } = await shop.run(shop.script);
        assert.equal(code, 2);
        assert.match(stderr, /does not exist. Run: make migrate\./);
        assert.match(stderr, rewind);
        await shop.succeed("scripts/ops/migrate.ts");
      },
      says: [/it is another one than the watermark \S+ was written to/],
    },
    "a table that was emptied": {
      change: async () => {
        await shop.query(`TRUNCATE TABLE ${pipeline}`);
        await shop.updateRows(2, 2, "by hand");
        const { stderr } = await shop.run(shop.script, { FROM: "2026-01-01", TO: "9999-01-01" }); // some rows would hide that it was empty
        assert.match(stderr, rewind);
      },
      says: [/it is empty, and the source has rows before the watermark/],
    },
    "a view in the table's place": {
      change: () => shop.query(`DROP TABLE ${pipeline}; CREATE VIEW ${pipeline} AS SELECT 1 AS id`),
      says: [/expected a table, found a VIEW\. Drop or rename it, then: make migrate/],
      repair: async () => {
        await shop.query(`DROP VIEW ${pipeline}`);
        await shop.succeed("scripts/ops/migrate.ts");
        await shop.succeed("scripts/ops/rewind.ts", { PIPELINE: pipeline, TO: "0001-01-01" });
      },
    },
  };

  for (const [what, { change, says, repair }] of Object.entries(cases)) {
    test(`${what}: doctor, status and the run name it and its repair, and nothing moves`, async () => {
      await change();
      await shop.updateRows(1, 1, what);
      const watermark = await shop.watermark();
      const { code, stderr } = await shop.run(shop.script);
      for (const part of says) assert.match(stderr, part);
      assert.doesNotMatch(stderr, /step=chunk/);
      assert.notEqual(code, 0);
      assert.equal(await shop.watermark(), watermark);
      const doctor = await shop.run("scripts/ops/doctor.ts", { PIPELINE: pipeline });
      for (const part of says) assert.match(doctor.stdout.replaceAll(/\n(?!FAIL|ok)/g, " "), new RegExp(`^FAIL .*${part.source}`, "m"));
      const status = await shop.run("scripts/ops/status.ts");
      for (const part of says) assert.match(status.stdout.replaceAll(/\s+/g, " "), part);
      if (repair) await repair([...stderr.matchAll(/Run in BigQuery: (.*)/g)].map(([, sql = ""]) => sql));
      else {
        assert.match(stderr, rewind);
        await shop.succeed("scripts/ops/rewind.ts", { PIPELINE: pipeline, TO: "0001-01-01" });
      }
      await assertSynced();
    });
  }

  test("a dataset that gives its tables an expiry: migrate creates the table without", async () => {
    await request("PATCH", "", { defaultTableExpirationMs: "86400000", defaultPartitionExpirationMs: "86400000" });
    await shop.query(`DROP TABLE ${pipeline}`);
    await shop.succeed("scripts/ops/migrate.ts");
    const made = await request("GET", table);
    assert.deepEqual([made.expirationTime, made.timePartitioning?.expirationMs], [undefined, undefined]);
    await shop.succeed("scripts/ops/rewind.ts", { PIPELINE: pipeline, TO: "0001-01-01" });
    await assertSynced();
    await request("PATCH", table, { expirationTime: String(Date.now() + 86_400_000) });
    const { code, stderr } = await shop.run("scripts/ops/migrate.ts");
    assert.match(stderr, /expires at \S+, with all its rows\. Run in BigQuery: ALTER TABLE/);
    assert.equal(code, 2);
    await request("PATCH", table, { expirationTime: null });
  });

  test("what migrate adds leaves what is not the contract's: policy tags, collation, default values, labels", async () => {
    const fields: Record<string, unknown>[] = (await request("GET", table)).schema.fields;
    const own = {
      policyTags: { names: ["projects/p/locations/us/taxonomies/1/policyTags/2"] },
      collation: "und:ci",
      defaultValueExpression: "'none'",
    };
    const described = fields.map((field) => (field.name === shop.text ? { ...field, ...own, description: "Another." } : field));
    await request("PATCH", table, { schema: { fields: described }, labels: { team: "shop" } });
    const { stderr } = await shop.succeed("scripts/ops/migrate.ts");
    assert.match(stderr, new RegExp(`describe \\S+\\.${pipeline}`));
    const after: { labels: unknown; schema: { fields: Record<string, unknown>[] } } = await request("GET", table);
    const { description, ...field } = after.schema.fields.find(({ name }) => name === shop.text) ?? {};
    assert.notEqual(description, "Another.");
    assert.deepEqual({ ...own, ...field }, field);
    assert.deepEqual(after.labels, { team: "shop" });
  });
});
