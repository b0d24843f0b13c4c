// Schema drift: what differs from the contract stops the run before a row moves. Needs the local stack (make up).
import assert from "node:assert/strict";
import { after, before, test } from "node:test";
import { readContract } from "../../shared/bigquery/contract.ts";
import { scratchCopy } from "../lib/scratch.ts";
import { createShop, type Pipeline, type Shop, stepsOfPipeline, textColumns } from "../lib/shop.ts";

const scratch = scratchCopy();
after(() => scratch[Symbol.dispose]());

/** The tables have a text column, created_at and updated_at alike; these are of one of them only. */
const otherColumns: Partial<Record<Pipeline, { int: string; numeric: string }>> = {
  orders: { int: "store_id", numeric: "total" },
};

interface Drift {
  /** What happens at the source. */
  change: string;
  /** How to undo it; without it, by the SQL in what the run says, as a superuser. */
  undo?: string;
  /** What the run says of it. */
  says: string[];
}

stepsOfPipeline((pipeline) => {
  const table = `public.${pipeline}`;
  const script = `scripts/${pipeline}.ts`;
  const text = textColumns[pipeline];
  const { int, numeric } = otherColumns[pipeline] ?? {};
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
  const retyped = (column: string, from: string, to: string, expected: string, using = ""): Drift => ({
    change: `alter table ${table} alter ${column} type ${to} ${using && `using ${using}`}`,
    undo: `alter table ${table} alter ${column} type ${from} using ${column}::${from}`,
    says: [fault(column, expected, `${to}, which it cannot hold`), next],
  });

  const drifts: Record<string, Drift> = {
    "a dropped column": {
      change: `alter table ${table} drop ${text}`,
      undo: `alter table ${table} add ${text} text`,
      says: [fault(text, "STRING NULLABLE", "no such column"), next],
    },
    "a renamed column": {
      change: `alter table ${table} rename ${text} to state`,
      undo: `alter table ${table} rename state to ${text}`,
      says: [fault(text, "STRING NULLABLE", "no such column"), "not in the contract: state (was a column renamed?)", next],
    },
    "a renamed cursor": {
      change: `alter table ${table} rename updated_at to changed_at`,
      undo: `alter table ${table} rename changed_at to updated_at`,
      says: [fault("updated_at", "TIMESTAMP REQUIRED", "no such column"), "changed_at", next],
    },
    "text → int": retyped(text, "text", "integer", "STRING NULLABLE", "1"),
    ...(int && { "int → text": retyped(int, "int", "text", "INTEGER NULLABLE") }),
    ...(numeric && {
      "numeric → float8": retyped(numeric, "numeric(12,2)", "double precision", "NUMERIC(12,2) NULLABLE"),
      "numeric(12,2) → numeric(14,4)": retyped(numeric, "numeric(12,2)", "numeric(14,4)", "NUMERIC(12,2) NULLABLE"),
    }),
    "timestamptz → timestamp": retyped("created_at", "timestamptz", "timestamp without time zone", "TIMESTAMP REQUIRED"),
    "a cursor that is a timestamp": {
      change: `alter table ${table} alter updated_at type timestamp using updated_at at time zone 'UTC'`,
      says: [`column ${table}.updated_at: expected timestamptz, since it is the cursor, found timestamp`],
    },
    "a cursor of whole seconds": {
      change: `alter table ${table} alter updated_at type timestamptz(0)`,
      says: [`column ${table}.updated_at: expected microseconds`, "found timestamp(0) with time zone"],
    },
    "a cursor that may be null": {
      change: `alter table ${table} alter updated_at drop not null`,
      says: [`column ${table}.updated_at: expected NOT NULL, since it is the cursor`],
    },
    "a cursor whose NOT NULL is not validated": {
      change: `alter table ${table} alter updated_at drop not null, add constraint later not null updated_at not valid`,
      says: [`column ${table}.updated_at: expected NOT NULL, since it is the cursor`],
    },
    "a key that no index makes unique": {
      change: `alter table ${table} drop constraint ${pipeline}_pkey`,
      says: [`source table ${table}: expected a unique index on its key (id), found none.`],
    },
    "a key whose index is partial": {
      change: `drop index ${pipeline}_id_idx; create unique index partial on ${table} (id) where id > 0`,
      says: ["found partial, which is partial."],
    },
    "a key whose constraint is deferrable": {
      change: `drop index partial, ${pipeline}_id_idx; alter table ${table} add constraint deferred unique (id) deferrable`,
      says: ["found deferred, which is deferrable."],
    },
    "a key whose index is not valid": {
      change: `alter table ${table} drop constraint deferred; update pg_index set indisvalid = false where indexrelid = '${table}_id_idx'::regclass`,
      undo: `update pg_index set indisvalid = true where indexrelid = '${table}_id_idx'::regclass`,
      says: [`found ${pipeline}_id_idx, which is not valid.`],
    },
    "a key that may be null": {
      change: `alter table ${table} alter id drop not null`,
      says: [`column ${table}.id: expected NOT NULL, since it is part of the key`],
    },
    "a table that inherits, whose keys no index compares with this one's": {
      change: `create table public.heir () inherits (${table})`,
      undo: "drop table public.heir",
      says: [`source table ${table}: heir inherits from it`],
    },
    "a view in the table's place": {
      change: `alter table ${table} rename to aside; create view ${table} as select * from public.aside; grant select on ${table} to etl_reader`,
      undo: `drop view ${table}; alter table public.aside rename to ${pipeline}`,
      says: [`source table ${table}: it is a view`, "Name the table behind it"],
    },
    "a foreign table in the table's place": {
      change: `create extension postgres_fdw; create server far foreign data wrapper postgres_fdw; alter table ${table} rename to aside;
        create foreign table ${table} (id bigint not null, updated_at timestamptz not null) server far; grant select on ${table} to etl_reader`,
      undo: `drop foreign table ${table}; alter table public.aside rename to ${pipeline}`,
      says: [`source table ${table}: ${pipeline} is a foreign table`, "Point SOURCE_DATABASE_URL at that server"],
    },
    "a foreign table among the table's heirs or partitions": {
      change: `create foreign table public.far () inherits (${table}) server far`,
      undo: "drop foreign table public.far",
      says: [`source table ${table}: far is a foreign table`, "Point SOURCE_DATABASE_URL at that server"],
    },
    "a table that a subscription fills": {
      change: `create publication filled for table ${table}; commit;
        create subscription filler connection 'ITSELF' publication filled
          with (enabled = false, create_slot = false, slot_name = none)`,
      undo: "drop subscription filler; drop publication filled",
      says: [`source table ${table}: subscription filler writes its rows`, "Point SOURCE_DATABASE_URL at the publisher"],
    },
    "a NOT NULL that is no longer": {
      change: `alter table ${table} alter created_at drop not null`,
      undo: `alter table ${table} alter created_at set not null`,
      says: [fault("created_at", "TIMESTAMP REQUIRED", "a nullable column"), next],
    },
    "several at once": {
      change: `alter table ${table} drop ${text}, alter created_at drop not null, alter updated_at type timestamp, add note text`,
      undo: `alter table ${table} add ${text} text, alter created_at set not null, alter updated_at type timestamptz, drop note;
        grant select on ${table} to etl_reader`,
      says: [
        fault(text, "STRING NULLABLE", "no such column"),
        fault("created_at", "TIMESTAMP REQUIRED", "a nullable column"),
        fault("updated_at", "TIMESTAMP REQUIRED", "timestamp without time zone, which it cannot hold"),
        "note (was a column renamed?)",
      ],
    },
    "a table that is not there": {
      change: `alter table ${table} rename to aside`,
      undo: `alter table public.aside rename to ${pipeline}`,
      says: [`source table ${table}: there is no such table. Is SOURCE_DATABASE_URL the right database?`],
    },
    "a grant that is not there": {
      change: `revoke select on ${table} from etl_reader`,
      says: [`source table ${table}: role etl_reader may not read id, `],
    },
    "a grant of the columns, of which one is not there": {
      change: `revoke select (${text}) on ${table} from etl_reader`,
      says: [`Run as a superuser: grant select (${text}) on ${table} to etl_reader;`],
    },
    "a grant of the schema that is not there": {
      change: "revoke usage on schema public from public, etl_reader",
      says: [`source table ${table}: role etl_reader may not use its schema`],
    },
  };

  for (const [what, { change, undo, says }] of Object.entries(drifts)) {
    test(`${what} at the source stops the run before any row moves`, async () => {
      await shop.admin.unsafe(change.replace("ITSELF", shop.env.STACK_ADMIN_DATABASE_URL ?? ""));
      let [said, done] = ["", undo];
      try {
        said = await assertStopped(says);
      } finally {
        done ??= /Run(?: as a superuser)?: ((?:alter|create|grant) [^;]+;)/.exec(said)?.[1];
        await shop.admin.unsafe(done ?? "");
      }
      if (undo) return;
      await shop.updateRows(1, 3, what); // the change may have rounded their time
      await shop.succeed(script);
      assert.deepEqual(await shop.destinationRows(), await shop.sourceRows());
    });
  }

  /** The destination's columns, in BigQuery's SQL: those of the contract, with these instead. None: null. */
  const columns = (instead: Record<string, string | null>): string => {
    const there = readContract(pipeline).fields.map(({ name, type, mode, precision, scale }) => {
      const size = precision ? `(${precision},${scale})` : "";
      return [name, `${type.replace("INTEGER", "INT64")}${size}${mode === "REQUIRED" ? " NOT NULL" : ""}`];
    });
    return Object.entries({ ...Object.fromEntries(there), ...instead })
      .filter(([, type]) => type !== null)
      .map(([name, type]) => `${name} ${type}`)
      .join(", ");
  };
  const destinationFault = (column: string, expected: string, found: string): string =>
    `.${pipeline}.${column}: expected ${expected} (${file}), found ${found}`;
  const destinations: Record<string, { instead: Record<string, string | null>; says: string[] }> = {
    "a missing column": {
      instead: { [text]: null },
      says: [destinationFault(text, "STRING NULLABLE", "no such column"), "For additions: make migrate"],
    },
    "another type": {
      instead: { [text]: "INT64" },
      says: [destinationFault(text, "STRING NULLABLE", "INTEGER NULLABLE")],
    },
    ...(numeric && {
      "another precision": {
        instead: { [numeric]: "NUMERIC(10,1)" },
        says: [destinationFault(numeric, "NUMERIC(12,2) NULLABLE", "NUMERIC(10,1) NULLABLE")],
      },
    }),
    "another mode": {
      instead: { [text]: "STRING NOT NULL" },
      says: [destinationFault(text, "STRING NULLABLE", "STRING REQUIRED")],
    },
    "an additional column": {
      instead: { note: "STRING" },
      says: [destinationFault("note", "no such field", "STRING NULLABLE")],
    },
    "several of them": {
      instead: { [text]: null, id: "STRING NOT NULL" },
      says: [destinationFault(text, "STRING NULLABLE", "no such column"), destinationFault("id", "INTEGER REQUIRED", "STRING REQUIRED")],
    },
  };

  for (const [what, { instead, says }] of Object.entries(destinations)) {
    test(`${what} at the destination stops the run before any row moves`, async () => {
      await shop.query(`CREATE OR REPLACE TABLE ${pipeline} (${columns(instead)})`);
      await assertStopped(says);
    });
  }

  test("a destination table that is not there is an error that says: make migrate", async () => {
    await shop.query(`DROP TABLE ${pipeline}`);
    await assertStopped([`destination table ${shop.env.BIGQUERY_PROJECT}.${shop.dataset}.${pipeline} does not exist. Run: make migrate`]);
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
    "without a field of the contract": {
      instead: "",
      says: [fault(text, "STRING NULLABLE", "no such column"), next],
    },
    "with a column that the contract does not have": {
      instead: `  ${text}, 1 as one,\n`,
      says: [`column ${table}.one: expected no such field (${file}), found it in the SELECT`],
    },
    "with an expression of another type": {
      instead: `  length(${text}) as ${text},\n`,
      says: [fault(text, "STRING NULLABLE", "integer"), next],
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
