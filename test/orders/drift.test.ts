// Schema drift: what differs from the contract stops the run before a row moves. Needs the local stack (make up).
import assert from "node:assert/strict";
import { after, before, test } from "node:test";
import { readContract } from "../../shared/bigquery/contract.ts";
import { scratchCopy } from "../lib/scratch.ts";
import { createShop, type Pipeline, type Shop, stepsOfPipeline, textColumns } from "../lib/shop.ts";

const scratch = scratchCopy();
after(() => scratch[Symbol.dispose]());

/** Columns beside the text column, created_at and updated_at, which the tables have alike, by what they become: type, expected. */
const retyped: Partial<Record<Pipeline, [column: string, from: string, to: string, expected: string][]>> = {
  orders: [
    ["store_id", "integer", "text", "INTEGER NULLABLE"],
    ["total", "numeric(12,2)", "double precision", "NUMERIC(12,2) NULLABLE"],
    ["discount", "numeric(12,2)", "numeric(14,4)", "NUMERIC(12,2) NULLABLE"],
  ],
};

interface Drift {
  /** What happens at the source. */
  change: string;
  /** How to undo it; without it, by each statement in what the run says, as a superuser. */
  undo?: string;
  /** What the run says of it. */
  says: string[];
}

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
  const types = [[text, "text", "integer", "STRING NULLABLE"], ...(retyped[pipeline] ?? [])] as const;
  const retype = ([column, , to]: (typeof types)[number]): string =>
    `alter table ${table} alter ${column} type ${to} using ${to === "integer" ? "1" : column}`;

  const drifts: Record<string, Drift> = {
    "renamed columns, the cursor too, and a NOT NULL that is no longer, all at once": {
      change: `alter table ${table} alter created_at drop not null; alter table ${table} rename ${text} to state;
        alter table ${table} rename updated_at to changed_at`,
      undo: `alter table ${table} alter created_at set not null; alter table ${table} rename state to ${text};
        alter table ${table} rename changed_at to updated_at`,
      says: [
        fault(text, "STRING NULLABLE", "no such column"),
        fault("created_at", "TIMESTAMP REQUIRED", "a nullable column"),
        fault("updated_at", "TIMESTAMP REQUIRED", "no such column"),
        "state",
        "changed_at",
        "(was a column renamed?)",
        next,
      ],
    },
    "columns of other types, all at once,": {
      change: `${types.map(retype).join("; ")}; alter table ${table} alter created_at type timestamp`,
      undo: `${types.map(([column, from]) => `alter table ${table} alter ${column} type ${from} using ${column}::${from}`).join("; ")};
        alter table ${table} alter created_at type timestamptz`,
      says: [
        ...types.map(([column, , to, expected]) => fault(column, expected, `${to}, which it cannot hold`)),
        fault("created_at", "TIMESTAMP REQUIRED", "timestamp without time zone, which it cannot hold"),
        next,
      ],
    },
    "a cursor that is a timestamp": {
      change: `alter table ${table} alter updated_at type timestamp using updated_at at time zone 'UTC'`,
      says: [`column ${table}.updated_at: expected timestamptz, since it is the cursor, found timestamp`],
    },
    "a cursor of whole seconds, which may be null,": {
      change: `alter table ${table} alter updated_at type timestamptz(0), alter updated_at drop not null`,
      says: [
        `column ${table}.updated_at: expected microseconds`,
        "found timestamp(0) with time zone",
        `column ${table}.updated_at: expected NOT NULL, since it is the cursor`,
      ],
    },
    "a cursor that is a domain of whole seconds": {
      change: `create domain whole_second as timestamptz(0); alter table ${table} alter updated_at type whole_second`,
      says: [`column ${table}.updated_at: expected microseconds`, "found whole_second. Run: alter table"],
    },
    "a cursor whose NOT NULL is not validated": {
      change: `alter table ${table} alter updated_at drop not null, add constraint later not null updated_at not valid`,
      says: [`column ${table}.updated_at: expected NOT NULL, since it is the cursor`],
    },
    "a key that may be null, and that no index makes unique,": {
      change: `alter table ${table} drop constraint ${pipeline}_pkey, alter id drop not null`,
      says: [
        `source table ${table}: expected a unique index on its key (id), found none.`,
        `column ${table}.id: expected NOT NULL, since it is part of the key`,
      ],
    },
    "a key whose indexes are partial, deferrable, not valid or not unique": {
      change: `drop index ${pipeline}_id_idx; create unique index partial on ${table} (id) where id > 0; create index plain on ${table} (id);
        alter table ${table} add constraint deferred unique (id) deferrable; create unique index broken on ${table} (id);
        update pg_index set indisvalid = false where indexrelid = 'broken'::regclass`,
      says: ["partial, which is partial", "deferred, which is deferrable", "broken, which is not valid", "plain, which is not unique"],
    },
    "a partitioned table whose partition key is not of the key": {
      change: `alter table ${table} rename to aside; create table ${table} (like public.aside, unique (id, created_at))
        partition by range (created_at); grant select on ${table} to etl_reader`,
      undo: `drop table ${table}; alter table public.aside rename to ${pipeline}`,
      says: ["expected a unique index on its key (id), found none. A partitioned table's has to hold created_at too: make that part"],
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
    "a foreign table among the table's heirs or partitions": {
      change: `create extension postgres_fdw; create server far foreign data wrapper postgres_fdw;
        create foreign table public.far () inherits (${table}) server far`,
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
    "a table that is not there": {
      change: `alter table ${table} rename to aside`,
      undo: `alter table public.aside rename to ${pipeline}`,
      says: [`source table ${table}: there is no such table. Is SOURCE_DATABASE_URL the right database?`],
    },
    "a grant of some columns only": {
      change: `revoke select on ${table} from etl_reader; grant select (id, created_at, updated_at) on ${table} to etl_reader`,
      says: [`source table ${table}: role etl_reader may not read `, "Run as a superuser: grant select ("],
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
        done ??= [...said.matchAll(/Run(?: as a superuser)?: ((?:alter|create|grant) [^;]+;)/g)].map(([, sql]) => sql).join(" ");
        await shop.admin.unsafe(done);
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
  test("other columns, types, modes and precisions at the destination, all at once, stop the run before any row moves", async () => {
    const precision = { total: "NUMERIC(10,1)" };
    const instead = { [text]: null, id: "STRING NOT NULL", created_at: "TIMESTAMP", note: "STRING" };
    await shop.query(`CREATE OR REPLACE TABLE ${pipeline} (${columns({ ...instead, ...(pipeline === "orders" && precision) })})`);
    await assertStopped([
      destinationFault(text, "STRING NULLABLE", "no such column"),
      destinationFault("id", "INTEGER REQUIRED", "STRING REQUIRED"),
      destinationFault("created_at", "TIMESTAMP REQUIRED", "TIMESTAMP NULLABLE"),
      destinationFault("note", "no such field", "STRING NULLABLE"),
      ...(pipeline === "orders" ? [destinationFault("total", "NUMERIC(12,2) NULLABLE", "NUMERIC(10,1) NULLABLE")] : []),
      "For additions: make migrate",
    ]);
  });

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
    "without a field of the contract, and with one that it does not have,": {
      instead: "  1 as one,\n",
      says: [
        fault(text, "STRING NULLABLE", "no such column"),
        `column ${table}.one: expected no such field (${file}), found it in the SELECT`,
        next,
      ],
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
