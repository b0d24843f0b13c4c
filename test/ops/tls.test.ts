// TLS: certificates and the names in them are checked, for Postgres and for Kafka with SASL. Needs the local stack (make up).
import assert from "node:assert/strict";
import { execFileSync, spawn } from "node:child_process";
import { once } from "node:events";
import { chmodSync, copyFileSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, before, test } from "node:test";
import { getCACertificates, setDefaultCACertificates } from "node:tls";
import type { KafkaEnv } from "../../shared/sensors/broker.ts";
import { connectKafka, createTopic } from "../../shared/sensors/kafka.ts";
import { createCluster, type TestCluster } from "../lib/cluster.ts";
import { createShop, freePort, type Result, type Shop, until } from "../lib/shop.ts";
import { createAuthority } from "../lib/tls.ts";
import type { Env } from "../stack/env.ts";
import { java, properties } from "../stack/kafka.ts";

const ours = createAuthority();
const theirs = createAuthority();
const folder = mkdtempSync(join(tmpdir(), "etl-tls-test-"));
let shop: Shop;
before(async () => {
  shop = await createShop({ clickhouse: true });
});
after(async () => {
  await shop?.[Symbol.asyncDispose]();
  for (const authority of [ours, theirs]) authority[Symbol.dispose]();
  rmSync(folder, { recursive: true, force: true });
});

const trusting = { NODE_EXTRA_CA_CERTS: ours.file };

/** It is refused, in a sentence. */
function assertRefused(result: Result, says: RegExp, code = 1): void {
  assert.match(result.stderr, says);
  assert.doesNotMatch(result.stderr, /^ {4}at /m);
  assert.equal(result.code, code, result.stderr);
}

test("Postgres: a run reads over TLS, by name and by address, with the authority from the environment or from ENV_FILE; any other certificate is refused, by its variable", async () => {
  const files = { key: join(folder, "server.key"), certificate: join(folder, "server.pem") };
  const install = ({ key, certificate }: typeof files): void => {
    copyFileSync(key, files.key);
    copyFileSync(certificate, files.certificate);
    chmodSync(files.key, 0o600);
  };
  chmodSync(folder, 0o755);
  install(ours.issue("DNS:localhost,IP:127.0.0.1"));
  const settings = { ssl: "on", ssl_cert_file: files.certificate, ssl_key_file: files.key };
  await using cluster: TestCluster = await createCluster(settings);
  // Of the pipelines' roles no session in clear text.
  const [hba] = await cluster.admin<{ hba_file: string }[]>`show hba_file`;
  writeFileSync(hba?.hba_file ?? "", "host all postgres all scram-sha-256\nhostssl all all all scram-sha-256\n");
  await cluster.admin`select pg_reload_conf()`;
  await cluster.admin.unsafe("insert into orders (id, total) select i, i from generate_series(1, 5) i");

  const from = (hostname: string, query: string): Env => ({
    SOURCE_DATABASE_URL: Object.assign(new URL(cluster.variables.SOURCE_DATABASE_URL), { hostname, search: query }).href,
  });
  const run = (hostname: string, query: string, variables: Env = trusting): Promise<Result> =>
    shop.run("scripts/orders.ts", { ...from(hostname, query), ...variables });
  const verify = "?sslmode=verify-full";

  // 1. What must not be: in clear text, an unknown authority, a mode that is none.
  assertRefused(await run("localhost", ""), /cannot connect to SOURCE_DATABASE_URL .*no encryption\. Are these right, .* sslmode and/);
  const unknown = /cannot connect to SOURCE_DATABASE_URL \(host localhost, .*certificate.* sslmode and NODE_EXTRA_CA_CERTS/;
  assertRefused(await run("localhost", verify, { NODE_EXTRA_CA_CERTS: theirs.file }), unknown);
  assertRefused(await run("localhost", "?sslmode=verify_full"), /SOURCE_DATABASE_URL has an unknown sslmode/, 2);
  assertRefused(
    await run("localhost", `${verify}&sslrootcert=/x`),
    /SOURCE_DATABASE_URL has sslrootcert, which does nothing here\. .*NODE_EXTRA_CA_CERTS/,
    2,
  );
  const file = join(folder, ".env");
  const fromFile = (path: string): Env => {
    writeFileSync(file, `NODE_EXTRA_CA_CERTS=${path}\n`);
    return { ENV_FILE: file, NODE_EXTRA_CA_CERTS: undefined };
  };
  assertRefused(await run("localhost", verify, fromFile("/no/such.pem")), /NODE_EXTRA_CA_CERTS ENOENT: no such file/, 2);
  assert.equal(await shop.watermark(), undefined);

  // 2. What must be.
  const both = join(folder, "both.pem");
  writeFileSync(both, readFileSync(theirs.file, "utf8") + readFileSync(ours.file, "utf8"));
  for (const [host, query, variables] of [
    ["127.0.0.1", verify, trusting],
    ["localhost", verify, fromFile(both)],
    ["localhost", "?sslmode=require", {}], // encrypts, as in libpq, and checks nothing
  ] as const) {
    const { code, stderr } = await run(host, query, variables);
    assert.equal(code, 0, stderr);
  }
  assert.equal((await shop.query("SELECT id FROM orders")).length, 5);
  const { stdout } = await shop.run("scripts/ops/doctor.ts", {
    PIPELINE: "orders",
    ...from("localhost", verify),
    ...trusting,
  });
  assert.match(stdout, /^ok {4}source: connection$/m);

  // 3. Another host's certificate, of the right authority; by address no name will do.
  const named = ours.issue("DNS:localhost");
  install(named);
  await cluster.admin`select pg_reload_conf()`;
  // The postmaster reads them when it gets to it.
  const expected = execFileSync("openssl", ["x509", "-in", named.certificate, "-noout", "-serial"]).toString();
  const { port } = new URL(cluster.variables.SOURCE_DATABASE_URL);
  const show = `openssl s_client -starttls postgres -connect 127.0.0.1:${port} </dev/null 2>/dev/null | openssl x509 -noout -serial || true`;
  await until("the server shows its new certificate", () => execFileSync("sh", ["-c", show]).toString() === expected);
  assertRefused(await run("127.0.0.1", verify), /SOURCE_DATABASE_URL \(host 127\.0\.0\.1, .*does not match certificate's altnames/);

  // 4. A server that has no TLS is never spoken to in clear text.
  const plain = Object.assign(new URL(shop.env.SOURCE_DATABASE_URL ?? ""), { hostname: "localhost", search: verify }).href;
  const refused = await shop.run("scripts/orders.ts", { SOURCE_DATABASE_URL: plain, ...trusting });
  assertRefused(refused, /cannot connect to SOURCE_DATABASE_URL .*the server has no TLS, and sslmode is verify-full/);
});

/** A broker of one's own that takes SASL over TLS only. */
async function startBroker(names: string): Promise<{ port: number } & AsyncDisposable> {
  const [port, controller] = [await freePort(), await freePort()];
  const data = mkdtempSync(join(tmpdir(), "etl-kafka-tls-"));
  const { key, certificate } = ours.issue(names);
  writeFileSync(join(data, "keystore.pem"), readFileSync(key, "utf8") + readFileSync(certificate, "utf8"));
  const login = (module: string, users = ""): string =>
    `org.apache.kafka.common.security.${module} required username="broker" password="broker-secret"${users};`;
  const text = properties({
    "process.roles": "broker,controller",
    "node.id": 1,
    listeners: `SASL_SSL://localhost:${port},CONTROLLER://127.0.0.1:${controller}`,
    "advertised.listeners": `SASL_SSL://localhost:${port}`,
    "listener.security.protocol.map": "SASL_SSL:SASL_SSL,CONTROLLER:PLAINTEXT",
    "controller.listener.names": "CONTROLLER",
    "controller.quorum.voters": `1@127.0.0.1:${controller}`,
    "inter.broker.listener.name": "SASL_SSL",
    "sasl.enabled.mechanisms": "PLAIN,SCRAM-SHA-256,SCRAM-SHA-512",
    "sasl.mechanism.inter.broker.protocol": "PLAIN",
    "listener.name.sasl_ssl.plain.sasl.jaas.config": login("plain.PlainLoginModule", ' user_broker="broker-secret" user_etl="etl-secret"'),
    "listener.name.sasl_ssl.scram-sha-256.sasl.jaas.config": login("scram.ScramLoginModule"),
    "listener.name.sasl_ssl.scram-sha-512.sasl.jaas.config": login("scram.ScramLoginModule"),
    "ssl.keystore.type": "PEM",
    "ssl.keystore.location": join(data, "keystore.pem"),
    "ssl.truststore.type": "PEM",
    "ssl.truststore.location": ours.file,
    "log.dirs": join(data, "log"),
    "auto.create.topics.enable": "false",
    "group.initial.rebalance.delay.ms": 0,
    "offsets.topic.replication.factor": 1,
    "offsets.topic.num.partitions": 1,
  });
  const file = join(data, "server.properties");
  writeFileSync(file, text);
  const scram = ["256", "512"].flatMap((bits) => ["--add-scram", `SCRAM-SHA-${bits}=[name=etl,password=etl-secret]`]);
  const format = java("kafka.tools.StorageTool", ["format", "-t", "AQIDBAUGBwgJCgsMDQ4PEA", "-c", file, ...scram], text);
  execFileSync(format.command, format.args, { stdio: ["ignore", "ignore", "inherit"] });
  const { command, args } = java("kafka.Kafka", [file], text);
  const child = spawn(command, args, { stdio: ["ignore", "ignore", "inherit"] });
  const closed = once(child, "close");
  await using started = new AsyncDisposableStack();
  started.defer(async () => {
    if (child.kill("SIGKILL")) await closed;
    rmSync(data, { recursive: true, force: true });
  });
  const admin = connectKafka(login512(port), "test").admin();
  const connects = (): Promise<boolean> =>
    admin.connect().then(
      () => true,
      () => false,
    );
  await until("the broker takes a login", connects, 90);
  await admin.disconnect();
  return Object.assign(started.move(), { port });
}

const login512 = (port: number): KafkaEnv => ({
  KAFKA_BROKERS: [`localhost:${port}`],
  KAFKA_TLS: true,
  KAFKA_SASL_MECHANISM: "scram-sha-512",
  KAFKA_USERNAME: "etl",
  KAFKA_PASSWORD: "etl-secret",
});

test("Kafka: the consumer reads with TLS and each mechanism of SASL; a wrong certificate or login is refused, by its variable", async () => {
  setDefaultCACertificates([...getCACertificates("default"), readFileSync(ours.file, "utf8")]);
  await using broker = await startBroker("DNS:localhost");
  const { SENSORS_TOPIC: topic = "" } = shop.env;
  const kafka = connectKafka(login512(broker.port), "test");
  const [admin, producer] = [kafka.admin(), kafka.producer()];
  await Promise.all([admin.connect(), producer.connect()]);
  try {
    await createTopic(admin, { topic, numPartitions: 1, replicationFactor: 1 });
    const given: Env = {
      KAFKA_BROKERS: `localhost:${broker.port}`,
      KAFKA_TLS: "1",
      KAFKA_SASL_MECHANISM: "scram-sha-512",
      KAFKA_USERNAME: "etl",
      KAFKA_PASSWORD: "etl-secret",
      UNTIL: "caught-up",
      ...trusting,
    };
    const consume = (variables: Env): Promise<Result> => shop.run("scripts/sensors.ts", { ...given, ...variables });
    let sent = 0;
    for (const KAFKA_SASL_MECHANISM of ["scram-sha-512", "scram-sha-256", "plain"]) {
      await producer.send({ topic, messages: [{ key: "k", value: "no change" }] });
      const { code, stderr } = await consume({ KAFKA_SASL_MECHANISM });
      assert.equal(code, 0, stderr);
      const [row] = await shop.select<{ count: string }>("SELECT count() AS count FROM sensor_dead_letters");
      assert.equal(Number(row?.count), ++sent);
    }

    const unknown = /cannot connect to KAFKA_BROKERS with KAFKA_TLS: .*own authority in NODE_EXTRA_CA_CERTS/;
    const otherHost = /cannot connect to KAFKA_BROKERS with KAFKA_TLS: .*does not match certificate's altnames/;
    const login = /KAFKA_BROKERS refused the login: .*Check KAFKA_SASL_MECHANISM, KAFKA_USERNAME and KAFKA_PASSWORD/;
    await Promise.all([
      consume({ NODE_EXTRA_CA_CERTS: theirs.file }).then((result) => assertRefused(result, unknown)),
      consume({ KAFKA_BROKERS: `127.0.0.1:${broker.port}` }).then((result) => assertRefused(result, otherHost)),
      consume({ KAFKA_PASSWORD: "HUSH" }).then((result) => assertRefused(result, login)),
    ]);
    const wrong = await shop.run("scripts/ops/doctor.ts", { PIPELINE: "sensors", ...given, KAFKA_PASSWORD: "HUSH" });
    assert.match(wrong.stdout, new RegExp(`^FAIL {2}sensors: topic .*: ${login.source}`, "m"));
    assert.ok(!wrong.stdout.includes("HUSH"));
  } finally {
    await Promise.all([admin.disconnect(), producer.disconnect()]);
  }
});
