// Bad input: every fault is named with its remedy, no secret is echoed, nothing moves. Needs the local stack (make up).
import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import { existsSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { text } from "node:stream/consumers";
import { after, before, test } from "node:test";
import postgres from "postgres";
import { timestamp } from "../../shared/env.ts";
import { scratchCopy } from "../lib/scratch.ts";
import { createShop, type Process, type Result, type Shop, stepsOfPipeline } from "../lib/shop.ts";
import { type Env, localEnv } from "../stack/env.ts";

// A copy, because it has no .env: what is not in the environment is missing.
const scratch = scratchCopy();
after(() => scratch[Symbol.dispose]());

const unset = (names: string[]): Env => Object.fromEntries(names.map((name) => [name, undefined]));
const required = [
  "SOURCE_DATABASE_URL",
  "ETL_DATABASE_URL",
  "BIGQUERY_PROJECT",
  "BIGQUERY_DATASET",
  "BIGQUERY_LOCATION",
  "PUSHGATEWAY_URL",
];
const secret = "HUSH";

const malformed: Record<string, [value: string, says: string]> = {
  SOURCE_DATABASE_URL: ["mysql://reader@db/shop", "is not postgres://USER:PASSWORD@HOST:PORT/DATABASE ("],
  ETL_DATABASE_URL: [
    "postgres://etl:p#ss@db:5432/shop",
    "is not postgres://USER:PASSWORD@HOST:PORT/DATABASE (is a special character in it percent-encoded?)",
  ],
  BIGQUERY_PROJECT: ["my shop", "must be a project's id"],
  BIGQUERY_DATASET: ["raw`; DROP TABLE x; --", "may hold letters, digits, _ and - only"],
  BIGQUERY_LOCATION: ["U S", "may hold letters, digits, _ and - only"],
  BIGQUERY_ENDPOINT: ["127.0.0.1:19050", "is not http://HOST:PORT"],
  PUSHGATEWAY_URL: ["ftp://gateway", "is not http://HOST:PORT, and nothing "],
  WATERMARK_LAG_SECONDS: ["-1", "must be a number from 0 to "],
  CHUNK_ROWS: ["0", "must be a whole number from 1 to "],
  RUN_TIMEOUT_SECONDS: ["1e3", "must be a number from 1 to "],
  LOG_FORMAT: ["xml", "must be text or json"],
  FROM: ["yesterday", "must be a time of the years 0001 to 9999"],
  TO: ["2017-02-30", "must be a time of the years 0001 to 9999 in UTC, such as 2017-01-31 or 2017-01-31T23:59:59.123456Z"],
};

/** Runs a command in a copy, as a person would. */
async function command(name: string, args: string[], variables: Env, cwd = scratch.folder): Promise<Result> {
  const env = { ...localEnv(), ...unset(["MAKEFLAGS", "MAKELEVEL", "MFLAGS"]), ...variables } as NodeJS.ProcessEnv;
  const child = spawn(name, args, { cwd, env, stdio: ["ignore", "pipe", "pipe"] });
  const closed = new Promise<number | null>((resolve) => child.on("close", resolve));
  const [stdout, stderr, code] = await Promise.all([text(child.stdout), text(child.stderr), closed]);
  return { code, stdout, stderr, signal: null };
}

stepsOfPipeline((pipeline) => {
  const script = `scripts/${pipeline}.ts`;
  let shop: Shop;
  /** BigQuery's client tries for a quarter of a minute; no other run here comes as far as the lock that this one has. */
  let unreachable: Process;
  before(async () => {
    shop = await createShop({ pipeline, folder: scratch.folder });
    await shop.insertRows(1, 2);
    await shop.succeed(script);
    await shop.insertRows(3, 4);
    unreachable = shop.start(script, { BIGQUERY_ENDPOINT: "http://127.0.0.1:1" });
  });
  after(() => shop?.[Symbol.asyncDispose]());

  const assertFailed = (result: Result, code: number, says: (string | RegExp)[]): void => {
    for (const part of says) {
      if (typeof part === "string") assert.ok(result.stderr.includes(part), `no "${part}" in:\n${result.stderr}`);
      else assert.match(result.stderr, part);
    }
    assert.equal(result.code, code, result.stderr);
    assert.doesNotMatch(result.stderr, /^\s+at /m, "a stack trace is for programmers");
  };
  /** The script exits with `code`, having said all of `says`. */
  const assertFails = async (code: number, variables: Env, says: (string | RegExp)[]): Promise<Result> => {
    const result = await shop.run(script, variables);
    assertFailed(result, code, says);
    return result;
  };

  test("missing variables are all listed at once, each with what it is for and an example", async () => {
    const missing = Object.fromEntries(required.map((name, index) => [name, index % 2 ? "" : undefined]));
    await assertFails(2, { ...missing, ENV_FILE: undefined }, [
      ...required.map((name) => new RegExp(`^ {2}${name} is missing\\. .{10,}\\. Example: ${name}=.+$`, "m")),
      `Set them in ${join(scratch.folder, ".env")}, in the environment or behind make (.env.example has them all).`,
    ]);
  });

  test("malformed variables are all listed at once, each with what it is for and an example", async () => {
    const values = Object.fromEntries(Object.entries(malformed).map(([name, [value]]) => [name, value]));
    const says = Object.entries(malformed).map(([name, [, says]]) => `  ${name} ${says}`);
    const { stderr } = await assertFails(2, values, says);
    assert.equal(stderr.match(/ Example: [A-Z_]+=\S/g)?.length, Object.keys(malformed).length);
  });

  test("FROM after TO, and one without the other, are refused", async () => {
    const needs = "FROM and TO: a re-run needs both, FROM (inclusive) before TO (exclusive). Example: FROM=2017-01-01 TO=2017-02-01";
    await assertFails(2, { FROM: "2017-01-01" }, [needs]);
    await assertFails(2, { TO: "2017-01-01" }, [needs]);
    await assertFails(2, { FROM: "2017-01-01T00:00:00.000002Z", TO: "2017-01-01T00:00:00.000001+00" }, [needs]);
  });

  test("an unknown argument is refused, naming it but not what follows its =", async () => {
    const given = `SOURCE_DATABASE_URL=postgres://u:${secret}@db/shop`;
    const pair = await command(process.execPath, [script, given], shop.env);
    assert.match(pair.stderr, /unknown argument SOURCE_DATABASE_URL=…: arguments are given as variables, .*; --help explains\./);
    assert.ok(!pair.stderr.includes(secret), pair.stderr);
    assert.equal(pair.code, 2);
  });

  test("an ENV_FILE that is not there is named", async () => {
    await assertFails(2, { ENV_FILE: "/no/such/.env" }, [
      "ENV_FILE: there is no file /no/such/.env. Copy .env.example there, or unset ENV_FILE.",
    ]);
  });

  const at = (change: Partial<URL>, variable = "SOURCE_DATABASE_URL"): string =>
    Object.assign(new URL(shop.env[variable] ?? ""), change).href;
  const refusals: [change: Partial<URL>, ...says: string[]][] = [
    [{ password: "wrong" }, "password authentication failed", "Are these right, and its password (percent-encoded)"],
    [{ port: "1" }, "port 1,", "connect ECONNREFUSED 127.0.0.1:1. ", "For the local stack: make up"],
    [{ pathname: "/nowhere" }, 'database "nowhere" does not exist. Are these right'],
    [{ hostname: "no-such-host.invalid" }, "getaddrinfo ENOTFOUND no-such-host.invalid. Are these right"],
  ];
  test("a source that refuses or is not there is named by its variable, with what to check", async () => {
    for (const name of ["SOURCE_DATABASE_URL", "ETL_DATABASE_URL"]) {
      for (const [change, ...says] of name === "SOURCE_DATABASE_URL" ? refusals : refusals.slice(0, 1))
        await assertFails(1, { [name]: at(change, name) }, [`cannot connect to ${name} (host `, ...says]);
    }
  });

  test("BigQuery that is not there is named by its variable, with what to check", async () => {
    assertFailed(await unreachable.ended, 1, ["ECONNREFUSED", "Check BIGQUERY_ENDPOINT"]);
  });

  test("nothing of all this has moved a row", async () => {
    assert.deepEqual(await shop.query(`SELECT id FROM ${pipeline} ORDER BY id`), [{ id: "1" }, { id: "2" }]);
    assert.deepEqual(await shop.stagingTables(), []);
    assert.equal((await shop.admin`select from etl.runs where rows > 0`).count, 1);
    const synced = await shop.watermark();
    await shop.succeed(script);
    assert.ok(synced && synced < ((await shop.watermark()) ?? ""));
    assert.deepEqual(await shop.destinationRows(), await shop.sourceRows());
  });
});

test("a point in time that is none is refused", () => {
  const impossible = [
    ...["2017-02-29", "2017-13-01", "2017-01-01T24:00:00Z", "2017-01-01T23:60:00Z", "2017-01-01T00:00:00.1234567Z", "0000-01-01"],
    ...["01/02/2017", "2017-1-1", "now", "infinity", "2017-01-01 Europe/Berlin", "2017-01-01T00:00+02:00", "2017-01-01T00:00-05"],
    ...["9999-12-31T23:59-01:00", "2017-01-01'; drop table orders; --", "٢٠١٧-٠١-٠١"],
  ];
  for (const value of impossible) assert.throws(() => timestamp(value), /must be a time/, value);
});

test("a point in time is the one that Postgres reads, to the microsecond", async () => {
  const dates = ["0001-01-01", "0099-12-31", "1582-10-10", "1969-12-31", "2016-02-29", "9999-12-30"];
  const times = ["", "T23:59:59", "T12:34:56.1Z", " 23:59:59.999999", "T00:00:00.000001+00", "T01:02+0000"];
  const given = dates.flatMap((date) => times.map((time) => date + time));
  const connection = { TimeZone: "UTC" };
  const utc = postgres(localEnv().SOURCE_DATABASE_URL ?? "", { max: 1, fetch_types: false, connection });
  for (const value of given) {
    const [row] = await utc`select to_char(${value}::text::timestamptz, 'YYYY-MM-DD"T"HH24:MI:SS.US"+00"') as read`;
    assert.equal(timestamp(value), row?.read, value);
  }
  await utc.end();
});

test("--help prints a script's header and needs no environment", async () => {
  const { code, stdout } = await command(process.execPath, ["scripts/ops/migrate.ts", "--help"], unset([...required, "ENV_FILE"]));
  assert.match(stdout, /^migrate: .*\n(.*\n)* *make migrate/);
  assert.doesNotMatch(stdout, /^ ?\*|\/\*\*/m);
  assert.equal(code, 0);
});

/** Without looking for a newer lock file: `npm ci` in a copy would empty the node_modules that it is linked to. */
const make = (args: string[], variables: Env = {}, cwd?: string): Promise<Result> =>
  command("make", ["--old-file=node_modules/.package-lock.json", ...args], variables, cwd);

test("make alone prints every target with a line of help", async () => {
  const { code, stdout } = await make([]);
  for (const target of ["up", "migrate", "orders", "users", "rewind", "status"])
    assert.match(stdout, new RegExp(`^ *make ${target} +\\S.{10,}$`, "m"));
  assert.equal(code, 0);
});

// `$(…)` and `$x` in a value on make's own command line are make's to expand, before any recipe: `$(shell …)` there runs,
// as the caller's. In the environment they are text, and what make hands on is text to the recipes.
test("a value with shell metacharacters runs nothing, through make's command line or the environment", async () => {
  using copy = scratchCopy();
  const pwned = join(copy.folder, "pwned");
  // Scripts that say what reached them, and start faster.
  for (const script of ["scripts/orders.ts", "scripts/ops/rewind.ts"])
    writeFileSync(join(copy.folder, script), "process.stdout.write([process.env.FROM, process.env.PIPELINE, ''].join('|'))");
  const shell = `'; touch ${pwned}; ' "; touch ${pwned}; " \`touch ${pwned}\` | touch ${pwned} &\n touch ${pwned}`;
  const assertText = async (run: Promise<Result>, expected: string): Promise<void> => {
    const { code, stdout } = await run;
    assert.deepEqual([code, stdout], [0, expected]);
    assert.equal(existsSync(pwned), false, expected);
  };
  for (const target of ["orders", "rewind"]) {
    await assertText(make([target, `FROM=${shell}`, "PIPELINE=p"], {}, copy.folder), `${shell}|p|`);
    const value = `${shell} $(shell touch ${pwned}) $(touch ${pwned}) $$(touch ${pwned})`;
    await assertText(make([target], { FROM: value, PIPELINE: value }, copy.folder), `${value}|${value}|`);
    await assertText(make([target, `FROM=$$(touch ${pwned})`, "PIPELINE=p"], {}, copy.folder), `$(touch ${pwned})|p|`);
  }
});
