// Bad input: every fault is named with its remedy, no secret is echoed, nothing moves. Needs the local stack (make up).
import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import { existsSync } from "node:fs";
import { join } from "node:path";
import { text } from "node:stream/consumers";
import { test } from "node:test";
import { readTimestamp } from "../shared/env.ts";
import { scratchCopy } from "./lib/scratch.ts";
import { createShop, freePort, type Result } from "./lib/shop.ts";
import type { Env } from "./stack/env.ts";

// A copy, because it has no .env: what is not in the environment is missing.
using scratch = scratchCopy();
await using shop = await createShop({ folder: scratch.folder });
await shop.insertRows(1, 2);
await shop.succeed("scripts/orders.ts");
await shop.insertRows(3, 4);
const watermark = await shop.watermark();

async function assertNothingMoved(): Promise<void> {
  assert.equal(await shop.watermark(), watermark);
  assert.deepEqual(await shop.query("SELECT id FROM orders ORDER BY id"), [{ id: "1" }, { id: "2" }]);
  assert.deepEqual(
    await shop.admin`select to_regclass('public.orders') is not null as there`.then((rows) => [...rows]),
    [{ there: true }],
  );
}

/** The script exits with `code`, having said all of `says`, and nothing has moved. */
async function assertFails(code: number, script: string, variables: Env, says: (string | RegExp)[]): Promise<Result> {
  const result = await shop.run(script, variables);
  for (const part of says) {
    if (typeof part === "string") assert.ok(result.stderr.includes(part), `no "${part}" in:\n${result.stderr}`);
    else assert.match(result.stderr, part);
  }
  assert.equal(result.code, code, result.stderr);
  assert.doesNotMatch(result.stderr, /^\s+at /m, "a stack trace is for programmers");
  await assertNothingMoved();
  return result;
}

const orders = "scripts/orders.ts";
const rewind = "scripts/ops/rewind.ts";
const unset = (names: string[]): Env => Object.fromEntries(names.map((name) => [name, undefined]));
const required = [
  "SOURCE_DATABASE_URL",
  "ETL_DATABASE_URL",
  "BIGQUERY_PROJECT",
  "BIGQUERY_DATASET",
  "BIGQUERY_LOCATION",
  "PUSHGATEWAY_URL",
];

await test("missing variables are all listed at once, each with what it is for and an example", async () => {
  for (const empty of [undefined, ""]) {
    const missing = Object.fromEntries(required.map((name) => [name, empty]));
    await assertFails(2, orders, { ...missing, ENV_FILE: undefined }, [
      ...required.map((name) => new RegExp(`^ {2}${name} is missing: .{10,}\\. Example: ${name}=.+$`, "m")),
      `Set them in ${join(scratch.folder, ".env")} or in the environment (.env.example has them all).`,
    ]);
  }
});

const malformed: Record<string, [value: string, says: string]> = {
  SOURCE_DATABASE_URL: ["mysql://reader@db/shop", "must start with postgres://"],
  ETL_DATABASE_URL: [
    "postgres://etl:p#ss@db:5432/shop",
    "is not a URL (is a special character in it percent-encoded?)",
  ],
  BIGQUERY_PROJECT: ["my shop", "may hold letters, digits, _ and - only"],
  BIGQUERY_DATASET: ["raw`; DROP TABLE x; --", "may hold letters, digits, _ and - only"],
  BIGQUERY_LOCATION: ["U S", "may hold letters, digits, _ and - only"],
  BIGQUERY_ENDPOINT: ["127.0.0.1:19050", "is not a URL"],
  PUSHGATEWAY_URL: ["ftp://gateway", "must start with http://"],
  WATERMARK_LAG_SECONDS: ["-1", "must be a number from 0 to "],
  CHUNK_ROWS: ["0", "must be a whole number from 1 to "],
  RUN_TIMEOUT_SECONDS: ["1e3", "must be a number from 1 to "],
  FROM: ["yesterday", "must look like 2017-01-31 or 2017-01-31T23:59:59.123456Z"],
  TO: ["2017-02-30", "is not a date of the calendar"],
};

await test("malformed variables are all listed at once, each with what it is for and an example", async () => {
  const values = Object.fromEntries(Object.entries(malformed).map(([name, [value]]) => [name, value]));
  const { stderr } = await assertFails(
    2,
    orders,
    values,
    Object.entries(malformed).map(([name, [, says]]) => `  ${name} ${says}`),
  );
  assert.equal(stderr.match(/ Example: [A-Z_]+=\S/g)?.length, Object.keys(malformed).length);
});

const window: [variables: Env, says: string][] = [
  [
    { FROM: "2017-02-01", TO: "2017-01-01" },
    "FROM 2017-02-01T00:00:00.000000+00 is after TO 2017-01-01T00:00:00.000000+00: swap them. FROM is inclusive, TO exclusive.",
  ],
  [{ FROM: "2017-01-01T00:00:00.000002Z", TO: "2017-01-01T01:00:00.000001+01" }, "is after TO"],
  [{ FROM: "2017-01-01" }, "FROM was given without TO: a re-run needs both. Example: FROM=2017-01-01 TO=2017-02-01"],
  [{ TO: "2017-01-01" }, "TO was given without FROM: a re-run needs both."],
];
for (const [variables, says] of window) {
  await test(`${Object.entries(variables).map((pair) => pair.join("="))} is refused`, async () => {
    await assertFails(2, orders, variables, [says]);
  });
}

const impossible = [
  ...[
    "2017-02-29",
    "2017-13-01",
    "2017-00-10",
    "2017-04-31",
    "2017-01-01T24:00:00Z",
    "2017-01-01T23:60:00Z",
    "2017-01-01T23:59:60Z",
  ],
  ...[
    "01/02/2017",
    "2017-1-1",
    "20170101",
    "now",
    "infinity",
    "2017-01-01T00:00:00.1234567Z",
    "2017-01-01 Europe/Berlin",
    "0000-01-01",
  ],
  ...[
    "2017-01-01T00:00+99:00",
    "2017-01-01T00:00+05:99",
    "9999-12-31T23:59-01:00",
    "2017-01-01'; drop table orders; --",
    "٢٠١٧-٠١-٠١",
  ],
];
await test("a point in time that is none is refused", () => {
  for (const value of impossible) assert.throws(() => readTimestamp(value), /must look like|is not (a|in) /, value);
});

await test("a point in time is the one that Postgres reads, to the microsecond", async () => {
  const dates = [
    "0001-01-01",
    "0050-06-15",
    "0099-12-31",
    "1582-10-10",
    "1969-12-31",
    "2016-02-29",
    "2017-01-31",
    "9999-12-30",
  ];
  const times = [
    "",
    " 00:00",
    "T23:59:59",
    "T12:34:56.1Z",
    " 23:59:59.999999",
    "T00:00:00.000001-09:30",
    "T01:02+0545",
    "T23:59:59.5-12",
    "T00:30:00+14:00",
  ];
  const given = dates.flatMap((date) => times.map((time) => date + time)).filter((value) => !/^0001.*\+/.test(value));
  const utc = shop.connect();
  await utc`set timezone = 'UTC'`;
  for (const value of given) {
    const read = readTimestamp(value);
    assert.match(read, /^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}\+00$/, value);
    const [row] =
      await utc`select ${value}::text::timestamptz::text as expected, ${read}::text::timestamptz::text as read`;
    assert.equal(row?.read, row?.expected, value);
  }
});

await test("FROM and TO with a zone and microseconds select exactly that window", async () => {
  await using other = await createShop();
  await other.insertRows(1, 4);
  await other.admin.unsafe(`alter table orders disable trigger user;
    update orders set updated_at = timestamptz '2017-01-01 12:00:00.000001Z' + (id - 2) * interval '1 us'`);
  const { stderr } = await other.succeed(orders, {
    FROM: "2017-01-01T13:00:00.000001+01:00",
    TO: "2017-01-01 12:00:00.000003",
  });
  assert.match(stderr, /step=window from=2017-01-01T12:00:00\.000001\+00 to=2017-01-01T12:00:00\.000003\+00/);
  assert.deepEqual(await other.query("SELECT id FROM orders ORDER BY id"), [{ id: "2" }, { id: "3" }]);
  assert.equal(await other.watermark(), undefined);
});

const source = new URL(shop.env.SOURCE_DATABASE_URL ?? "");
const at = (change: Partial<URL>, url: URL = source): string => Object.assign(new URL(url), change).href;

await test("a source that refuses or is not there is named by its variable, with what to check", async () => {
  const port = String(await freePort());
  for (const name of ["SOURCE_DATABASE_URL", "ETL_DATABASE_URL"]) {
    const url = new URL(shop.env[name] ?? "");
    const refusals: [change: Partial<URL>, says: string][] = [
      [{ password: "wrong" }, "Check the password in it; a special character must be percent-encoded."],
      [{ port }, `port ${port}`],
      [{ port }, "Is the server running, at this host and port? For the local stack: make up"],
      [{ pathname: "/nowhere" }, 'database "nowhere" does not exist. Check the database\'s name in it.'],
      [{ hostname: "no-such-host.invalid" }, "Check the host's name in it."],
    ];
    for (const [change, says] of refusals) {
      await assertFails(1, orders, { [name]: at(change, url) }, [`cannot connect to ${name} (host `, says]);
    }
  }
});

const secret = "HUSH";

await test("BigQuery that is not there is named by its variable, with what to check", async () => {
  const url = `http://127.0.0.1:${await freePort()}`;
  await assertFails(1, orders, { BIGQUERY_ENDPOINT: url }, ["ECONNREFUSED", "Check BIGQUERY_ENDPOINT"]);
});
const leaks: Record<string, Env> = {
  "in a malformed URL": { SOURCE_DATABASE_URL: `postgres://u:${secret}@db:port/shop` },
  "in a URL of another scheme": { ETL_DATABASE_URL: `mysql://u:${secret}@db/shop` },
  "in a refused login": { SOURCE_DATABASE_URL: at({ password: secret }) },
  "that is percent-encoded, in a refused login": { SOURCE_DATABASE_URL: at({ password: `${secret}%2F%40%22%5C` }) },
  "with a percent sign of its own": { SOURCE_DATABASE_URL: at({ password: secret }).replace(secret, `${secret}%ZZ`) },
  "in another user's name": {
    SOURCE_DATABASE_URL: `postgres://${secret}%3Aodd:${secret}@127.0.0.1:${source.port}/${shop.dataset}`,
  },
  "of a port that nobody listens on": { ETL_DATABASE_URL: at({ password: secret, port: "1" }) },
  "where a name belongs": { BIGQUERY_PROJECT: `postgres://u:${secret}@db/shop` },
  "where a number belongs": { CHUNK_ROWS: secret },
  "where a date belongs": { FROM: secret, TO: `2017-01-01 ${secret}` },
};
for (const [where, variables] of Object.entries(leaks)) {
  await test(`a password ${where} is never echoed`, async () => {
    const { stdout, stderr } = await shop.run(orders, variables);
    assert.match(stderr, /error: \S/);
    const runs = await shop.admin`select error from etl.runs`;
    const said = stdout + stderr + JSON.stringify(runs);
    assert.ok(!said.replaceAll(`role ${secret}`, "").replaceAll(`user "${secret}`, "").includes(secret), said);
    await assertNothingMoved();
  });
}

await test("an ENV_FILE that is not there is named", async () => {
  await assertFails(2, orders, { ENV_FILE: "/no/such/.env" }, [
    "ENV_FILE: there is no file /no/such/.env. Copy .env.example there, or unset ENV_FILE.",
  ]);
});

/** Runs a command in the copy, as a person would, with the shop's environment. */
async function command(name: string, args: string[], variables: Env = {}): Promise<Result> {
  const env = { ...shop.env, ...unset(["MAKEFLAGS", "MAKELEVEL", "MFLAGS"]), ...variables };
  const child = spawn(name, args, {
    cwd: scratch.folder,
    env: env as NodeJS.ProcessEnv,
    stdio: ["ignore", "pipe", "pipe"],
  });
  const closed = new Promise<number | null>((resolve) => child.on("close", resolve));
  const [stdout, stderr, code] = await Promise.all([text(child.stdout), text(child.stderr), closed]);
  return { code, stdout, stderr, signal: null, seconds: 0 };
}

await test("an unknown argument is refused, naming it but not what follows its =", async () => {
  const bare = await command(process.execPath, [orders, "--all"]);
  assert.match(bare.stderr, /unknown argument --all: arguments are given as variables, FROM=… TO=…; --help explains\./);
  assert.equal(bare.code, 2);
  const pair = await command(process.execPath, [orders, `SOURCE_DATABASE_URL=postgres://u:${secret}@db/shop`]);
  assert.match(pair.stderr, /unknown argument SOURCE_DATABASE_URL/);
  assert.ok(!pair.stderr.includes(secret), pair.stderr);
  assert.equal(pair.code, 2);
  await assertNothingMoved();
});

for (const script of [orders, rewind, "scripts/ops/migrate.ts", "scripts/ops/status.ts"]) {
  await test(`${script} --help prints its header and needs no environment`, async () => {
    const { code, stdout } = await command(process.execPath, [script, "--help"], unset([...required, "ENV_FILE"]));
    const name = script.replace(/.*\/|\.ts/g, "");
    assert.match(stdout, new RegExp(`^${name}: .*\\n[^]*\\n *make ${name}`));
    assert.doesNotMatch(stdout, /^ ?\*|\/\*\*/m);
    assert.equal(code, 0);
  });
}

await test("make alone prints every target with a line of help", async () => {
  const { code, stdout } = await command("make", []);
  for (const target of ["up", "down", "stack-status", "data", "migrate", "orders", "rewind", "status"]) {
    assert.match(stdout, new RegExp(`^ *make ${target} +\\S.{10,}$`, "m"));
  }
  assert.equal(code, 0);
});

// `$(…)` and `$x` in a value on make's own command line are make's to expand, before any recipe: `$(shell …)` there runs,
// as the caller's. In the environment they are text, and what make hands on is text to the recipes.
const pwned = join(scratch.folder, "pwned");
const shells = [
  `'; touch ${pwned}; '`,
  `2017-01-01'; touch ${pwned}; '`,
  `"; touch ${pwned}; "`,
  `\`touch ${pwned}\``,
  `2017-01-01\n touch ${pwned}`,
  `| touch ${pwned} &`,
];
await test("a value with shell metacharacters runs nothing, through make's command line or the environment", async () => {
  for (const value of shells) {
    const { stderr } = await command("make", ["orders", `FROM=${value}`, "TO=2017-02-01"]);
    assert.match(stderr, /FROM must look like/);
    assert.equal(existsSync(pwned), false, value);
  }
  for (const value of [...shells, `$(shell touch ${pwned})`, `$(touch ${pwned})`, `$$(touch ${pwned})`]) {
    const { stderr } = await command("make", ["rewind"], { PIPELINE: value, TO: value });
    assert.match(stderr, /PIPELINE may hold letters, digits, _ and - only/);
    assert.equal(existsSync(pwned), false, value);
  }
  await command("make", ["orders", `FROM=$$(touch ${pwned})`, "TO=2017-02-01"]);
  assert.equal(existsSync(pwned), false);
  await assertNothingMoved();
});

await test("SQL in FROM, TO and PIPELINE is refused", async () => {
  const sql = "2017-01-01'; drop table public.orders; --";
  await assertFails(2, orders, { FROM: sql, TO: sql }, ["FROM must look like", "TO must look like"]);
  await assertFails(2, rewind, { PIPELINE: "orders'; drop table etl.watermarks; --", TO: sql }, [
    "PIPELINE may hold",
    "TO must look like",
  ]);
});
