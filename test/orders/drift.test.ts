// Schema drift: what differs from the contract stops the run before a row moves. Needs the local stack (make up).
import assert from "node:assert/strict";
import { after, before, test } from "node:test";
import { readContract } from "../../shared/bigquery/contract.ts";
import { scratchCopy } from "../lib/scratch.ts";
import { createShop, type Shop, stepsOfPipeline, textColumns } from "../lib/shop.ts";

const scratch = scratchCopy();
after(() => scratch[Symbol.dispose]());

stepsOfPipeline((pipeline) => {
  const table = `public.${pipeline}`;
  const script = `scripts/${pipeline}.ts`;
  const text = textColumns[pipeline];
  let shop: Shop;
  before(async () => {
    shop = await createShop({ pipeline, folder: scratch.folder, pushgateway: true });
    await shop.insertRows(1, 3);
    await shop.admin.unsafe(`create schema archive; create table archive.${pipeline} as select * from ${table} where id = 1;
      grant usage on schema archive to etl_reader; grant select on archive.${pipeline} to etl_reader`);
  });
  after(() => shop?.[Symbol.asyncDispose]());

  /** The run exits with 2, having said all of `says`, and has read, loaded and moved nothing. */
  const assertStopped = async (says: string[]): Promise<string> => {
    const watermark = await shop.watermark();
    const { code, stderr } = await shop.run(script);
    for (const part of says) assert.ok(stderr.includes(part), `no "${part}" in:\n${stderr}`);
    assert.equal(code, 2);
    assert.doesNotMatch(stderr, /step=(window|chunk)/);
    assert.equal(await shop.watermark(), watermark);
    assert.deepEqual(await shop.stagingTables(), []);
    return stderr;
  };

  const file = `schemas/bigquery/${pipeline}.json`;
  const next = `Bring the source, sql/${pipeline}.sql and ${file} together; schemas/README.md, "When the schema changes"`;
  /** Of a column: expected …, found …. */
  const fault = (column: string, expected: string, found: string): string =>
    `column ${table}.${column}: expected ${expected} (${file}), found ${found}`;
  const source = `source table ${table}:`;
  const cursor = `column ${table}.updated_at: expected`;
  const only = pipeline === "orders" ? (text: string) => text : () => ""; // users has no such columns

  /**
   * What happens at the source, what the run says of it, and how to undo it: without that by each statement in what the run says, as a
   * superuser.
   */
  const drifts: Record<string, [change: string, says: string[], undo?: string]> = {
    "renamed columns, the cursor too, other types and a NOT NULL that is no longer, all at once,": [
      `alter table ${table} alter created_at drop not null; alter table ${table} rename ${text} to state;
        alter table ${table} rename updated_at to changed_at;
        ${only(`alter table ${table} alter total type double precision, alter discount type numeric(14,4)`)}`,
      [
        fault(text, "STRING NULLABLE", "no such column"),
        fault("created_at", "TIMESTAMP REQUIRED", "a nullable column"),
        fault("updated_at", "TIMESTAMP REQUIRED", "no such column"),
        only(fault("total", "NUMERIC(12,2) NULLABLE", "double precision, which it cannot hold")),
        only(fault("discount", "NUMERIC(12,2) NULLABLE", "numeric(14,4), which it cannot hold")),
        "state",
        "changed_at",
        "(was a column renamed?)",
        next,
      ],
      `alter table ${table} alter created_at set not null; alter table ${table} rename state to ${text};
        alter table ${table} rename changed_at to updated_at;
        ${only(`alter table ${table} alter total type numeric(12,2), alter discount type numeric(12,2)`)}`,
    ],
    "a cursor that is a timestamp": [
      `alter table ${table} alter updated_at type timestamp using updated_at at time zone 'UTC'`,
      [`${cursor} timestamptz, since it is the cursor, found timestamp`],
    ],
    "a cursor of whole seconds, whose NOT NULL is not validated,": [
      `alter table ${table} alter updated_at type timestamptz(0), alter updated_at drop not null,
        add constraint later not null updated_at not valid`,
      [`${cursor} microseconds`, "found timestamp(0) with time zone", `${cursor} NOT NULL, since it is the cursor`],
    ],
    "a cursor that is a domain of whole seconds": [
      `create domain whole_second as timestamptz(0); alter table ${table} alter updated_at type whole_second`,
      [`${cursor} microseconds`, "found whole_second. Run: alter table"],
    ],
    "a key that may be null, and that no index makes unique,": [
      `alter table ${table} drop constraint ${pipeline}_pkey, alter id drop not null`,
      [
        `${source} expected a unique index on its key (id), found none.`,
        `column ${table}.id: expected NOT NULL, since it is part of the key`,
      ],
    ],
    "a key whose indexes are partial, deferrable, not valid or not unique": [
      `drop index ${pipeline}_id_idx; create unique index partial on ${table} (id) where id > 0; create index plain on ${table} (id);
        alter table ${table} add constraint deferred unique (id) deferrable; create unique index broken on ${table} (id);
        update pg_index set indisvalid = false where indexrelid = 'broken'::regclass`,
      ["partial, which is partial", "deferred, which is deferrable", "broken, which is not valid", "plain, which is not unique"],
    ],
    "a partitioned table whose partition key is not of the key": [
      `alter table ${table} rename to aside; create table ${table} (like public.aside, unique (id, created_at))
        partition by range (created_at); grant select on ${table} to etl_reader`,
      ["expected a unique index on its key (id), found none. A partitioned table's has to hold created_at too: make that part"],
      `drop table ${table}; alter table public.aside rename to ${pipeline}`,
    ],
    "a table that inherits, whose keys no index compares with this one's": [
      `create table public.heir () inherits (${table})`,
      [`${source} heir inherits from it`],
      "drop table public.heir",
    ],
    "a view in the table's place": [
      `alter table ${table} rename to aside; create view ${table} as select * from public.aside; grant select on ${table} to etl_reader`,
      [`${source} it is a view`, "Name the table behind it"],
      `drop view ${table}; alter table public.aside rename to ${pipeline}`,
    ],
    "a foreign table among the table's heirs or partitions": [
      `create extension postgres_fdw; create server far foreign data wrapper postgres_fdw;
        create foreign table public.far () inherits (${table}) server far`,
      [`${source} far is a foreign table`, "Point SOURCE_DATABASE_URL at that server"],
      "drop foreign table public.far",
    ],
    "a table that a subscription fills": [
      `create publication filled for table ${table}; commit;
        create subscription filler connection 'ITSELF' publication filled with (enabled = false, create_slot = false, slot_name = none)`,
      [`${source} subscription filler writes its rows`, "Point SOURCE_DATABASE_URL at the publisher"],
      "drop subscription filler; drop publication filled",
    ],
    "a table that is not there": [
      `alter table ${table} rename to aside`,
      [`${source} there is no such table. Is SOURCE_DATABASE_URL the right database?`],
      `alter table public.aside rename to ${pipeline}`,
    ],
    "a grant of some columns only": [
      `revoke select on ${table} from etl_reader; grant select (id, created_at, updated_at) on ${table} to etl_reader`,
      [`${source} role etl_reader may not read `, "Run as a superuser: grant select ("],
    ],
    "a grant of the schema that is not there": [
      "revoke usage on schema public from public, etl_reader",
      [`${source} role etl_reader may not use its schema`],
    ],
  };

  for (const [what, [change, says, undo]] of Object.entries(drifts)) {
    test(`${what} at the source stops the run before any row moves`, async () => {
      await shop.admin.unsafe(change.replace("ITSELF", shop.env.STACK_ADMIN_DATABASE_URL ?? ""));
      let [said, done] = ["", undo];
      try {
        said = await assertStopped(says);
      } finally {
        done ??= [...said.matchAll(/Run(?: as a superuser)?: ((?:alter|create|grant) [^;]+;)/g)].map(([, sql]) => sql).join(" ");
        await shop.admin.unsafe(done);
      }
      if (undo) return;
      await shop.updateRows(1, 3, what); // the change may have rounded their time
      await shop.succeed(script);
      assert.deepEqual(await shop.destinationRows(), await shop.sourceRows());
    });
  }

  const destinationFault = (column: string, expected: string, found: string): string =>
    `.${pipeline}.${column}: expected ${expected} (${file}), found ${found}`;
  test("other columns, types, modes and precisions at the destination, all at once, stop the run before any row moves", async () => {
    const tables = `/datasets/${shop.dataset}/tables`;
    const { tableReference } = await shop.api(`${tables}/${pipeline}`);
    const others: Record<string, object> = {
      id: { type: "STRING" },
      created_at: { mode: "NULLABLE" },
      total: { precision: "10", scale: "1" },
      [text]: { name: "note" },
    };
    const fields = readContract(pipeline).fields.map((field) => ({ ...field, ...others[field.name] }));
    await shop.api(`${tables}/${pipeline}`, "DELETE");
    await shop.api(tables, "POST", { tableReference, schema: { fields } });
    await assertStopped([
      destinationFault(text, "STRING NULLABLE", "no such column"),
      destinationFault("id", "INTEGER REQUIRED", "STRING REQUIRED"),
      destinationFault("created_at", "TIMESTAMP REQUIRED", "TIMESTAMP NULLABLE"),
      destinationFault("note", "no such field", "STRING NULLABLE"),
      ...(pipeline === "orders" ? [destinationFault("total", "NUMERIC(12,2) NULLABLE", "NUMERIC(10,1) NULLABLE")] : []),
      "For additions: make migrate",
    ]);
    await shop.query(`DROP TABLE ${pipeline}`);
    await shop.succeed("scripts/ops/migrate.ts");
  });

  test("etl tables that are not there are an error that says: make migrate", async () => {
    await shop.admin.unsafe("alter schema etl rename to etl_aside");
    try {
      const { code, stderr } = await shop.run(script);
      assert.match(stderr, /etl\.\w+.*Run: make migrate/);
      assert.equal(code, 2);
      assert.deepEqual(await shop.query(`SELECT id FROM ${pipeline}`), []);
    } finally {
      await shop.admin.unsafe("alter schema etl_aside rename to etl");
    }
  });

  /** What the SELECT has instead of the text column, or of something else; and what the run says of it. */
  const selects: Record<string, { what?: string; instead: string; says: string[] }> = {
    "of another table than the one that is checked": {
      what: `from ${table}`,
      instead: `from archive.${pipeline}`,
      says: [`column ${table}.updated_at: expected a column of this table, since rows are found by it`],
    },
    "without a field of the contract, and with one that it does not have,": {
      instead: "  1 as one,\n",
      says: [
        fault(text, "STRING NULLABLE", "no such column"),
        `column ${table}.one: expected no such field (${file}), found it in the SELECT`,
        next,
      ],
    },
  };

  for (const [how, { what = `  ${text},\n`, instead, says }] of Object.entries(selects)) {
    test(`a SELECT ${how} stops the run before any row moves`, async () => {
      using _ = scratch.edit(`sql/${pipeline}.sql`, (select) => select.replace(what, instead));
      await assertStopped(says);
    });
  }

  test("a name without a schema means the table that is checked, whatever search_path the role has", async () => {
    using _ = scratch.edit(`sql/${pipeline}.sql`, (select) => select.replace(`from ${table}`, `from ${pipeline}`));
    await shop.admin`delete from etl.watermarks`; // the tests before this one made the destination table again
    await shop.admin.unsafe(`alter role etl_reader in database ${shop.dataset} set search_path = archive, public`);
    await shop.succeed(script);
    assert.deepEqual(await shop.destinationRows(), await shop.sourceRows());
  });

  test("an added source column is a warning by name and a metric, and the run succeeds", async () => {
    await shop.admin.unsafe(`alter table ${table} add note text, add gift_wrapped bool`);
    const { stderr } = await shop.succeed(script);
    assert.match(
      stderr,
      new RegExp(`step=warning .*${table} has columns that are not in ${file}, and are not synced" columns=note,gift_wrapped`),
    );
    assert.equal((await shop.metrics()).etl_unknown_source_columns, 2);
    assert.deepEqual(await shop.destinationRows(), await shop.sourceRows());
    await shop.admin.unsafe(`alter table ${table} drop note, drop gift_wrapped`);
    await shop.succeed(script);
    assert.equal((await shop.metrics()).etl_unknown_source_columns, 0);
  });
});
