// Forms of URLs, and of .env, that a shop has: each works, or is refused by its variable's name. Needs the local stack (make up).
import assert from "node:assert/strict";
import { once } from "node:events";
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { type AddressInfo, connect, createServer } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, before, test } from "node:test";
import { baseUrl, postgresUrl } from "../../shared/env.ts";
import { createProxy, type HttpProxy } from "../lib/faults.ts";
import { createSensors, type Sensors } from "../lib/sensors.ts";
import type { Shop } from "../lib/shop.ts";

const doctor = "scripts/ops/doctor.ts";
const folder = mkdtempSync(join(tmpdir(), "etl-environment-"));
let sensors: Sensors;
let shop: Shop;
before(async () => {
  sensors = await createSensors({ pushgateway: true });
  shop = sensors.shop;
  await shop.insertRows(1, 3);
});
after(async () => {
  await sensors?.[Symbol.asyncDispose]();
  rmSync(folder, { recursive: true });
});

/** The server below /behind, for who has the login. */
async function behind(target = ""): Promise<HttpProxy & { below: string }> {
  const proxy = await createProxy(target);
  proxy.fault(/./, async ({ request, response, send, reply }) => {
    const login = `Basic ${Buffer.from("etl:p@ss").toString("base64")}`;
    if (request.headers.authorization !== login || !request.url?.startsWith("/behind/"))
      return void response.writeHead(401).end("who are you?");
    request.url = request.url.slice("/behind".length);
    await reply(await send());
  });
  const below = Object.assign(new URL(proxy.url), { username: "etl", password: "p%40ss", pathname: "/behind" });
  return Object.assign(proxy, { below: below.href });
}

test("Kafka Connect and the Pushgateway with a login, below a path: connector, push, status and doctor", async () => {
  await using connect = await behind(shop.env.CONNECT_URL);
  await using gateway = await behind(shop.env.PUSHGATEWAY_URL);
  const env = { CONNECT_URL: connect.below, PUSHGATEWAY_URL: `${gateway.below}/` };
  await shop.succeed("scripts/ops/connector.ts", env);
  await shop.succeed("scripts/orders.ts", env);
  assert.equal((await shop.metrics()).etl_rows, 3);
  const { code, stdout } = await shop.run(doctor, env);
  assert.equal(code, 0, stdout);
  assert.match(stdout, /^ok {4}sensors: connector .*: CONNECT_URL shows its database password in clear text: see REPL/m);
  assert.doesNotMatch(await (await fetch(`${shop.env.PUSHGATEWAY_URL}/metrics`)).text(), /pipeline="doctor"/);
  const wrong = { CONNECT_URL: connect.below.replace("p%40ss", "wrong"), PUSHGATEWAY_URL: gateway.url };
  const refused = (await shop.run(doctor, wrong)).stdout;
  for (const name of ["CONNECT_URL", "PUSHGATEWAY_URL"])
    assert.match(refused, new RegExp(`^FAIL .*127\\.0\\.0\\.1:\\d+ \\(${name}\\) refused the login: HTTP 401`, "m"));
});

test("the connector's password by the worker's config provider: nobody reads it at CONNECT_URL", async () => {
  const secrets = join(folder, "connect.properties");
  writeFileSync(secrets, "password=local-only\n");
  const env = { REPLICATION_PASSWORD_REFERENCE: `\${file:${secrets}:password}` };
  await shop.succeed("scripts/ops/connector.ts", env);
  const shown = await fetch(new URL(`connectors/etl-${shop.dataset}-sensor_readings`, shop.env.CONNECT_URL));
  assert.doesNotMatch(await shown.text(), /local-only/);
  const { code, stdout } = await shop.run(doctor, { ...env, PIPELINE: "sensors" });
  assert.match(stdout, /^ok {4}sensors: connector \S+$/m);
  assert.equal(code, 0, stdout);
  const wrong = await shop.run("scripts/ops/connector.ts", { REPLICATION_PASSWORD_REFERENCE: `\${vault:a:b}` });
  assert.match(wrong.stderr, /refused PUT .*REPLICATION_PASSWORD_REFERENCE\? ops\/README\.md/);
  assert.equal(wrong.code, 1);
});

test("what a client would ignore in a URL is refused", async () => {
  const { code, stdout } = await shop.run(doctor, {
    CLICKHOUSE_URL: `${shop.env.CLICKHOUSE_URL}/shop`,
    S3_ENDPOINT: "http://user:HUSH@127.0.0.1:1",
    BIGQUERY_ENDPOINT: "http://127.0.0.1:1/path",
    CONNECT_URL: "http://127.0.0.1:1/?user=etl",
    PUSHGATEWAY_URL: "http://127.0.0.1:1/?here",
    REPLICATION_DATABASE_URL: "postgres://etl_replicator:HUSH@127.0.0.1:1/shop#here",
  });
  assert.equal(code, 1);
  for (const name of ["CLICKHOUSE_URL", "S3_ENDPOINT", "BIGQUERY_ENDPOINT", "CONNECT_URL", "PUSHGATEWAY_URL"])
    assert.match(stdout, new RegExp(`^FAIL .* ${name} is not http://HOST:PORT, and nothing .* Example: ${name}=`, "m"));
  assert.match(stdout, /^FAIL .* REPLICATION_DATABASE_URL is not postgres:\/\/USER:PASSWORD@HOST:PORT\/DATABASE \(/m);
  assert.doesNotMatch(stdout, /HUSH/);
});

test("forms of a Postgres URL: each works, or is refused without a piece of its password", async () => {
  const { username, password, hostname, port, pathname } = new URL(shop.env.ETL_DATABASE_URL ?? "");
  const six = createServer((client) => {
    const upstream = connect(Number(port), hostname);
    for (const socket of [client, upstream]) socket.on("error", () => {});
    client.pipe(upstream).pipe(client);
  });
  await once(six.listen({ host: "::1", port: 0 }), "listening");
  const url = `postgres://${username}:${password}@[::1]:${(six.address() as AddressInfo).port}${pathname}`;
  const { stdout } = await shop.run(doctor, { PIPELINE: "views", ETL_DATABASE_URL: url, PGTARGETSESSIONATTRS: "read-only" });
  assert.match(stdout, /^ok {4}etl: connection$/m, url);
  six.close();
  for (const [typed, says] of [
    ["u:HU#SH@h/d", "is a special character in it percent-encoded"],
    ["u:HU/SH@h/d", "is a special character in it percent-encoded"],
    ["u:12/HUSH@h/d", "is a special character in it percent-encoded"],
    ["u:12?HUSH@h/d", "is a special character in it percent-encoded"],
    ["u:HU%SH@h/d", "is a special character in it percent-encoded"],
    ["u:HUSH@/d?host=/run/postgresql", "is not postgres://USER"],
    ["u:HUSH@h/d?host=/run/postgresql", "has host, which does nothing here"],
    ["u:HUSH@h/d?target_session_attrs=read-write", "has target_session_attrs, which does nothing here"],
  ] as const)
    assert.throws(
      () => postgresUrl(`postgres://${typed}`),
      ({ message }: Error) => message.includes(says) && !/HU|SH(?!OT)/.test(message.replace("PASSWORD@HOST", "")),
      typed,
    );
  assert.throws(() => baseUrl("http://u:12/HUSH@h"), /is not http:\/\/HOST:PORT, .* \(is a special character in it percent-encoded/);
  const says = /BIGQUERY_PROJECT must be a project's id: .*\(example\.com:shop\) are not supported/;
  await shop.refused(shop.script, 2, says, { BIGQUERY_PROJECT: "example.com:shop" });
});

test(".env with a byte order mark, and with a # in a value", async () => {
  const ENV_FILE = join(folder, ".env");
  const run = (content: string) => {
    writeFileSync(ENV_FILE, content);
    return shop.run("scripts/ops/migrate.ts", { ENV_FILE, ETL_DATABASE_URL: undefined, BIGQUERY_LOCATION: undefined });
  };
  const url = `ETL_DATABASE_URL=${shop.env.ETL_DATABASE_URL}`;
  assert.equal((await run(`\uFEFF${url}\nBIGQUERY_LOCATION="US" # where the datasets are: a#b\n`)).code, 0);
  for (const value of ["U#S", "US#", "#US", " U S#x # where", "'U'S#U'", '"U#S']) {
    const { code, stderr } = await run(`${url}\nexport BIGQUERY_LOCATION=${value}\n`);
    assert.match(stderr, /^ {2}BIGQUERY_LOCATION has a # in \S+\.env, which begins a comment: put the value into quotes\. /m);
    assert.equal(code, 2);
  }
  // As it says: the whole value arrives.
  const { stderr } = await run(`${url}\nBIGQUERY_LOCATION='U#S'\n`);
  assert.match(stderr, /^ {2}BIGQUERY_LOCATION may hold letters, digits, _ and - only/m);
});
