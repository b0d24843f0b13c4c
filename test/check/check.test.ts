/** The SQL of make check: what is wrong in a scratch copy is found, with file, line and message; what is right passes. */
import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import { once } from "node:events";
import { cpSync, mkdirSync, readFileSync, writeFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { text } from "node:stream/consumers";
import { test } from "node:test";
import { type Scratch, scratchCopy } from "../lib/scratch.ts";
import { localEnv, root } from "../stack/env.ts";

/** Runs one part in a scratch copy with the files as given. @returns its faults, a line each; none is a pass. */
async function check(
  part: "googlesql" | "postgres",
  change: (scratch: Scratch, write: (file: string, content: string) => void) => void,
): Promise<string[]> {
  using scratch = scratchCopy();
  cpSync(join(root, "test"), join(scratch.folder, "test"), { recursive: true });
  change(scratch, (file, content) => {
    mkdirSync(dirname(join(scratch.folder, file)), { recursive: true });
    writeFileSync(join(scratch.folder, file), content);
  });
  const child = spawn(process.execPath, [`test/check/${part}.ts`], { cwd: scratch.folder, env: localEnv() });
  const [stderr, [code]] = await Promise.all([text(child.stderr), once(child, "close")]);
  const faults = stderr.split("\n").filter(Boolean);
  assert.equal(code, faults.length ? 1 : 0, stderr);
  return faults;
}

const reserved = { name: "order", type: "STRING" };

await test("a wrong column, a type error, an unquoted reserved word, in views and checks: all at once, with file, line, column, each once", async () => {
  const faults = await check("googlesql", (_, write) => {
    write("views/column.sql", "-- ü\nCREATE OR REPLACE TABLE column AS\nSELECT id, nope FROM orders;\n");
    write("views/another.sql", "CREATE OR REPLACE TABLE another AS SELECT id FROM column"); // which is told already
    write("views/reserved.sql", "CREATE OR REPLACE TABLE reserved AS SELECT\n  order FROM orders");
    write("views/types.sql", "CREATE OR REPLACE TABLE types AS SELECT\n total + status AS x FROM orders");
    write("views/fine.sql", "CREATE OR REPLACE TABLE fine AS SELECT 1 AS x");
    write("views/checks/internal.sql", "SELECT CAST(id AS INT32) FROM orders CROSS JOIN fine");
    write("views/checks/types.sql", "SELECT id\nFROM orders JOIN fine ON created_at = id");
  });
  assert.deepEqual(
    faults.map((fault) => fault.replace(/\. Supported signature.*/, "")),
    [
      "views/column.sql:3:12: Unrecognized name: nope",
      "views/reserved.sql:2:3: Syntax error: Unexpected keyword ORDER",
      "views/types.sql:2:2: No matching signature for operator + for argument types: NUMERIC, STRING",
      "views/checks/internal.sql:1:19: Type not found: INT32",
      "views/checks/types.sql:2:26: No matching signature for operator = for argument types: TIMESTAMP, INT64",
    ],
  );
});

await test("what make views would refuse is refused, and what it finds that a view reads has to be what the analyser finds", async () => {
  const faults = await check("googlesql", (_, write) => {
    write("views/a.sql", "CREATE OR REPLACE TABLE a AS SELECT 1 AS x");
    write("views/b.sql", "CREATE OR REPLACE TABLE b AS WITH a AS (SELECT 2 AS x) SELECT x FROM a");
    write("views/c.sql", "CREATE OR REPLACE TABLE d AS SELECT 1 AS x");
    write("views/e.sql", "CREATE OR REPLACE TABLE e AS SELECT a.x FROM a, orders AS o");
    write("views/checks/e.sql", "SELECT e.x FROM e, a");
    write("views/checks/orders.sql", "SELECT id FROM orders");
  });
  assert.deepEqual(faults, [
    "views/c.sql must hold one statement: CREATE OR REPLACE TABLE c … AS SELECT …, without a dataset",
    "views/checks/orders.sql reads no model: nothing would run it",
    "views/b.sql:1:1: make views takes a for a table that it reads: give what is named so another name",
    "views/e.sql:1:1: reads orders, which make views does not find behind FROM or JOIN: write JOIN, not a comma",
    "views/checks/e.sql:1:1: reads a, which make views does not find behind FROM or JOIN: write JOIN, not a comma",
  ]);
});

await test("the MERGE: with a reserved word that is not quoted, an unknown type, or a key without equality it fails", async () => {
  const faults = await check("googlesql", (scratch) => {
    scratch.editFields("orders", (all) => [...all, reserved, { name: "odd", type: "INT32" }]);
    scratch.edit("shared/bigquery/load.ts", (code) => code.replace(/INSERT \(\$\{columns/, "$&.map((column) => column.slice(1, -1))"));
    scratch.editFields("users", (all) => all.map((field) => (field.name === "id" ? { ...field, type: "JSON" } : field)));
  });
  assert.match(faults[0] ?? "", /^schemas\/bigquery\/orders\.json:\d+:1: field odd: BigQuery has no type INT32$/);
  const unquoted =
    /^schemas\/bigquery\/orders\.json: MERGE:6:\d+: Syntax error: Unexpected keyword ORDER\n {4}WHEN NOT MATCHED THEN INSERT \(id, /m;
  assert.match(faults.join("\n"), unquoted);
  const key = /^schemas\/bigquery\/users\.json: MERGE:2:\d+: Partitioning by expressions of type JSON is not allowed$/m;
  assert.match(faults.join("\n"), key);
});

await test("each passes: a contract of 1,000 fields with a reserved word and names of our aliases, every type, a repeated one; views of views", async () => {
  const more = Array.from({ length: 1000 }, (_, index) => ({
    name: `f${index}`,
    type: ["FLOAT", "JSON", "STRING"][index % 3],
    mode: index % 7 ? "NULLABLE" : "REPEATED",
  }));
  // Names of our aliases: where one is a column too, the analyser refuses the MERGE.
  const aliases = "s t d compared found pairs keys kind".split(" ").map((name) => ({ name, type: "STRING" }));
  const types =
    "INTEGER INT64 FLOAT FLOAT64 BOOLEAN BOOL STRING BYTES NUMERIC BIGNUMERIC DATE TIME DATETIME TIMESTAMP JSON GEOGRAPHY INTERVAL";
  const all = types.split(" ").map((type) => ({ name: `c_${type}`, type }));
  const repeated = { name: "words", type: "STRING", mode: "REPEATED" };
  const faults = await check("googlesql", (scratch, write) => {
    scratch.editFields("orders", (fields) => [...fields, reserved, ...aliases, ...more, ...all, repeated]);
    write(
      "views/checks/t.sql",
      "SELECT c_INTEGER + c_INT64, c_FLOAT * c_FLOAT64, c_BOOL AND c_BOOLEAN, string(c_JSON.a), c_NUMERIC + c_BIGNUMERIC, concat(c_BYTES, c_BYTES), w || c_STRING, c_DATETIME = DATETIME(c_DATE, c_TIME) FROM orders AS o, UNNEST(o.words) AS w JOIN m ON TRUE",
    );
    write("views/m.sql", "CREATE OR REPLACE TABLE m AS SELECT 1 AS x");
    const week = "date_trunc(date(created_at), WEEK(MONDAY)) AS week, array_agg(STRUCT(id, total)) AS l FROM orders GROUP BY week";
    write("views/z.sql", `CREATE OR REPLACE TABLE z PARTITION BY week AS SELECT ${week}`);
    write("views/a.sql", "CREATE OR REPLACE TABLE a AS SELECT week, sum(o.total) AS total FROM z, UNNEST(l) AS o GROUP BY week");
    write("views/checks/a.sql", "SELECT week FROM a WHERE week > @day AND total < 0 QUALIFY row_number() OVER (ORDER BY week) = 1");
  });
  assert.deepEqual(faults, []);
});

await test("Postgres: a column that is not there, a type error, a second statement, no grant, a faulty migration: file and line", async () => {
  const faults = await check("postgres", (scratch, write) => {
    scratch.edit("sql/orders.sql", (sql) => sql.replace("  item_count,", "  item_cont,"));
    scratch.edit("sql/users.sql", (sql) => sql.replace("where updated_at >= ", "where updated_at >= 7 + "));
    write("sql/etl/999_more.sql", "-- a column\n\nalter table etl.runs\n  add column more intt;");
    write("sql/etl/998_public.sql", "create table public.more (id int)");
    scratch.edit("test/data/schema.sql", (sql) => `${sql}\ncreate table public.secret (id int);\n`);
    write("sql/secret.sql", "select count(*) from secret;");
    write("sql/two.sql", "select 1;\nselect 2;");
  });
  const line = (file: string, found: string): number =>
    readFileSync(join(root, file), "utf8")
      .split("\n")
      .findIndex((row) => row.startsWith(found)) + 1;
  const expected = [
    /^sql\/etl\/998_public\.sql:1: permission denied for schema public/,
    /^sql\/etl\/999_more\.sql:4: type "intt" does not exist/,
    new RegExp(`^sql/orders\\.sql:${line("sql/orders.sql", "  item_count")}: column "item_cont" does not exist; Perhaps`),
    /^sql\/secret\.sql:1: permission denied for table secret/,
    /^sql\/two\.sql:1: cannot insert multiple commands into a prepared statement/,
    new RegExp(`^sql/users\\.sql:${line("sql/users.sql", "where")}: operator does not exist: integer \\+ `),
  ];
  assert.equal(faults.length, expected.length, faults.join("\n"));
  for (const [at, pattern] of expected.entries()) assert.match(faults[at] ?? "", pattern);
});

await test("Postgres: a contract that its source does not fulfil, and a fault in the SELECT that is made of the two", async () => {
  const faults = await check("postgres", (scratch) => {
    scratch.editFields("users", (all) =>
      all.map((field) => (field.name === "age_band" ? { ...field, type: "INTEGER", mode: "REQUIRED" } : field)),
    );
    scratch.edit("shared/bigquery/types.ts", (code) =>
      code.replace('"NUMERIC BIGNUMERIC", "?::text"', '"NUMERIC BIGNUMERIC", "encode(?, \'base64\')"'),
    );
  });
  assert.match(
    faults.join("\n"),
    /^schemas\/bigquery\/users\.json:1: the source differs from the contract.*\n +column public\.users\.age_band: expected INTEGER REQUIRED \S+, found text, which it cannot hold\n/m,
  );
  const cast = "schemas/bigquery/orders.json:1: the SELECT made of it and its SELECT: function encode(numeric, unknown) does not exist";
  assert.ok(faults.includes(cast), faults.join("\n"));
});
