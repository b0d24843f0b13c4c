// Schema drift: what differs from the contract stops the run before a row moves. Needs the local stack (make up).
import assert from "node:assert/strict";
import { test } from "node:test";
import { scratchCopy } from "./lib/scratch.ts";
import { createShop } from "./lib/shop.ts";

using scratch = scratchCopy();
await using shop = await createShop({ folder: scratch.folder, pushgateway: true });
await shop.insertRows(1, 3);

/** The run exits with 2, having said all of `says`, and has read, loaded and moved nothing. */
async function assertStopped(says: string[]): Promise<void> {
  const { code, stderr } = await shop.run("scripts/orders.ts");
  for (const text of says) assert.ok(stderr.includes(text), `no "${text}" in:\n${stderr}`);
  assert.equal(code, 2);
  assert.doesNotMatch(stderr, /step=(window|chunk)/);
  assert.equal(await shop.watermark(), undefined);
  assert.deepEqual(await shop.stagingTables(), []);
}

const next =
  'Bring the source, sql/orders.sql and schemas/bigquery/orders.json together; README, "When the schema changes"';
const contract = "(schemas/bigquery/orders.json)";

/** What happens at the source, what the run says of it, and how to undo it. */
const drifts: Record<string, { change: string; undo: string; says: string[] }> = {
  "a dropped column": {
    change: "alter table orders drop discount",
    undo: "alter table orders add discount numeric(12,2)",
    says: [`column public.orders.discount: expected NUMERIC(12,2) NULLABLE ${contract}, found no such column`, next],
  },
  "a renamed column": {
    change: "alter table orders rename status to state",
    undo: "alter table orders rename state to status",
    says: [
      `column public.orders.status: expected STRING NULLABLE ${contract}, found no such column`,
      "not in the contract: state (was a column renamed?)",
      next,
    ],
  },
  "a renamed cursor": {
    change: "alter table orders rename updated_at to changed_at",
    undo: "alter table orders rename changed_at to updated_at",
    says: [
      `column public.orders.updated_at: expected TIMESTAMP REQUIRED ${contract}, found no such column`,
      "changed_at",
      next,
    ],
  },
  "int → text": {
    change: "alter table orders alter store_id type text",
    undo: "alter table orders alter store_id type int using store_id::int",
    says: [
      `column public.orders.store_id: expected INTEGER NULLABLE ${contract}, found text, which it cannot hold`,
      next,
    ],
  },
  "numeric → float8": {
    change: "alter table orders alter total type float8",
    undo: "alter table orders alter total type numeric(12,2)",
    says: [
      `column public.orders.total: expected NUMERIC(12,2) NULLABLE ${contract}, found float8, which it cannot hold`,
      next,
    ],
  },
  "numeric(12,2) → numeric(14,4)": {
    change: "alter table orders alter total type numeric(14,4)",
    undo: "alter table orders alter total type numeric(12,2)",
    says: [
      `column public.orders.total: expected NUMERIC(12,2) NULLABLE ${contract}, found numeric(14,4), which it cannot hold`,
    ],
  },
  "timestamptz → timestamp": {
    change: "alter table orders alter created_at type timestamp",
    undo: "alter table orders alter created_at type timestamptz",
    says: [
      `column public.orders.created_at: expected TIMESTAMP REQUIRED ${contract}, found timestamp, which it cannot hold`,
      next,
    ],
  },
  "a cursor that is a timestamp": {
    change: "alter table orders alter updated_at type timestamp",
    undo: "alter table orders alter updated_at type timestamptz",
    says: ["column public.orders.updated_at: expected timestamptz, since it is the cursor, found timestamp"],
  },
  "a NOT NULL that is no longer": {
    change: "alter table orders alter created_at drop not null",
    undo: "alter table orders alter created_at set not null",
    says: [`column public.orders.created_at: expected TIMESTAMP REQUIRED ${contract}, found a nullable column`, next],
  },
  "several at once": {
    change: `alter table orders drop discount, alter store_id type text, alter total type float8, add note text,
             alter created_at drop not null`,
    undo: `alter table orders add discount numeric(12,2), alter store_id type int using store_id::int,
           alter total type numeric(12,2), drop note, alter created_at set not null`,
    says: [
      "orders.discount: expected",
      "orders.store_id: expected",
      "orders.total: expected",
      "orders.created_at: expected TIMESTAMP REQUIRED",
      "note (was a column renamed?)",
    ],
  },
  "a table that is not there": {
    change: "alter table orders rename to purchases",
    undo: "alter table purchases rename to orders",
    says: [
      "source table public.orders: there is no such table, or it may not be seen. Is SOURCE_DATABASE_URL the right database?",
    ],
  },
  "a grant that is not there": {
    change: "revoke select on orders from etl_reader",
    undo: "grant select on orders to etl_reader",
    says: ["public.orders", "grant select on public.orders to etl_reader;"],
  },
};

for (const [what, { change, undo, says }] of Object.entries(drifts)) {
  await test(`${what} at the source stops the run before any row moves`, async () => {
    await shop.admin.unsafe(change);
    try {
      await assertStopped(says);
    } finally {
      await shop.admin.unsafe(undo);
    }
  });
}

/** The destination's columns, in BigQuery's SQL, and what the run says of them. */
const columns = `id INT64 NOT NULL, user_id INT64, store_id INT64, status STRING, item_count INT64, total NUMERIC(12,2),
  discount NUMERIC(12,2), created_at TIMESTAMP NOT NULL, updated_at TIMESTAMP NOT NULL`;
const destinations: Record<string, { columns: string; says: string[] }> = {
  "a missing column": {
    columns: columns.replace("status STRING, ", ""),
    says: [`.orders.status: expected STRING NULLABLE ${contract}, found no such column`, "For additions: make migrate"],
  },
  "another type": {
    columns: columns.replace("store_id INT64", "store_id STRING"),
    says: [`.orders.store_id: expected INTEGER NULLABLE ${contract}, found STRING NULLABLE`],
  },
  "another precision": {
    columns: columns.replace("total NUMERIC(12,2)", "total NUMERIC(10,1)"),
    says: [`.orders.total: expected NUMERIC(12,2) NULLABLE ${contract}, found NUMERIC(10,1) NULLABLE`],
  },
  "another mode": {
    columns: columns.replace("user_id INT64", "user_id INT64 NOT NULL"),
    says: [`.orders.user_id: expected INTEGER NULLABLE ${contract}, found INTEGER REQUIRED`],
  },
  "an additional column": {
    columns: `${columns}, note STRING`,
    says: [".orders.note: is there, but schemas/bigquery/orders.json has no such field"],
  },
  "several of them": {
    columns: columns.replace("status STRING, ", "").replace("store_id INT64", "store_id STRING"),
    says: [".orders.status: expected", ".orders.store_id: expected"],
  },
};

for (const [what, { columns, says }] of Object.entries(destinations)) {
  await test(`${what} at the destination stops the run before any row moves`, async () => {
    await shop.query(`CREATE OR REPLACE TABLE orders (${columns})`);
    await assertStopped(says);
  });
}

await test("a destination table that is not there is an error that says: make migrate", async () => {
  await shop.query("DROP TABLE orders");
  await assertStopped([
    `destination table ${shop.env.BIGQUERY_PROJECT}.${shop.dataset}.orders does not exist. Run: make migrate`,
  ]);
  await shop.succeed("scripts/ops/migrate.ts");
});

await test("etl tables that are not there are an error that says: make migrate", async () => {
  await shop.admin.unsafe("alter schema etl rename to etl_aside");
  try {
    const { code, stderr } = await shop.run("scripts/orders.ts");
    assert.match(stderr, /etl\.\w+.*the metadata tables are not there\. Run: make migrate/);
    assert.equal(code, 1);
    assert.deepEqual(await shop.query("SELECT id FROM orders"), []);
  } finally {
    await shop.admin.unsafe("alter schema etl_aside rename to etl");
  }
});

/** What sql/orders.sql returns in another line's stead, and what the run says of it. */
const selects: Record<string, { line: string; instead: string; says: string[] }> = {
  "without a field of the contract": {
    line: "  discount,\n",
    instead: "",
    says: [`column public.orders.discount: expected NUMERIC(12,2) NULLABLE ${contract}, found no such column`, next],
  },
  "with a column that the contract does not have": {
    line: "  discount,\n",
    instead: "  discount, 1 as one,\n",
    says: [`column public.orders.one: expected no such field ${contract}, found it in the SELECT`],
  },
  "with an expression of another type": {
    line: "  store_id,\n",
    instead: "  'store ' || store_id as store_id,\n",
    says: [`column public.orders.store_id: expected INTEGER NULLABLE ${contract}, found text`],
  },
};

for (const [what, { line, instead, says }] of Object.entries(selects)) {
  await test(`a SELECT ${what} stops the run before any row moves`, async () => {
    let original = "";
    scratch.edit("sql/orders.sql", (text) => {
      original = text;
      return text.replace(line, instead);
    });
    try {
      await assertStopped(says);
    } finally {
      scratch.edit("sql/orders.sql", () => original);
    }
  });
}

await test("an added source column is a warning by name and a metric, and the run succeeds", async () => {
  await shop.admin.unsafe("alter table orders add note text, add gift_wrapped bool");
  const { stderr } = await shop.succeed("scripts/orders.ts");
  assert.match(
    stderr,
    /step=warning .*public\.orders has columns that are not in schemas\/bigquery\/orders\.json.* columns=note,gift_wrapped/,
  );
  assert.equal((await shop.metrics()).etl_unknown_source_columns, 2);
  assert.deepEqual(await shop.destinationRows(), await shop.sourceRows());
  await shop.admin.unsafe("alter table orders drop note, drop gift_wrapped");
  await shop.succeed("scripts/orders.ts");
  assert.equal((await shop.metrics()).etl_unknown_source_columns, 0);
});
