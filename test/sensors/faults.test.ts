// ClickHouse or Kafka away, slow or overloaded: retried for a minute, with no dead letter and nothing lost; then exit 1 with nothing
// committed, and systemd starts the consumer again. What is wrong at the start ends it before a message moves, and says what to do.
import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { after, before, suite, test } from "node:test";
import { setTimeout as delay } from "node:timers/promises";
import { ConfigResourceTypes } from "../../shared/sensors/kafka.ts";
import { createProxy, type Fault, hold, loseAnswer, reset, stop, withhold } from "../lib/faults.ts";
import { createLink, type Link, type Tap } from "../lib/link.ts";
import { type Consumer, created, createSensors, endsWith, kafkaAt, type Sensors } from "../lib/sensors.ts";
import { type Process, until } from "../lib/shop.ts";
import { endpoint, root } from "../stack/env.ts";

const soak = process.env.SOAK === "1";
const consumerScript = "scripts/sensors.ts";
const migrate = "scripts/ops/migrate.ts";

/** Waits until the group has no lag and that many rows are there. Its patience is for Kafka, which waits out sessions and rebalances. */
async function arrived(sensors: Sensors, rows: number, consumer: Process): Promise<void> {
  const all = async (): Promise<boolean> => (await sensors.state()).every(({ lag }) => lag === 0) && (await countRows(sensors)) === rows;
  await until(`${rows} rows, and no lag`, all, 180).catch(async (error: Error) => {
    consumer.child.kill("SIGKILL");
    const { stderr } = await consumer.ended;
    throw new Error(`${error.message}: ${await countRows(sensors)} rows\n${stderr.slice(-3000)}`);
  });
}

const countRows = async ({ shop }: Sensors): Promise<number> =>
  Number((await shop.select<{ count: string }>("SELECT count() AS count FROM sensor_readings FINAL"))[0]?.count);

const isCommitted = ({ committed }: Sensors, messages: number) =>
  until(`${messages} messages are committed`, async () => (await committed()) === messages);

const memoryOf = async (consumer: Consumer): Promise<number> => ((await consumer.metrics()).process_resident_memory_bytes ?? 0) / 2 ** 20;

async function assertHealthy(consumer: Consumer): Promise<void> {
  const answer = await fetch(`${await consumer.url}/healthz`);
  assert.match(`${answer.status} ${await answer.text()}`, /^200 ok$/m);
}

/**
 * A link to a broker, which says that it is at the link. While it is silent, whoever asks which broker coordinates a group is cut off;
 * `asked` is how often.
 */
type KafkaLink = Link & { silence(yes: boolean): void; asked: number };

async function createKafkaLink(broker = ""): Promise<KafkaLink> {
  const { host, port } = endpoint(broker);
  let silent = false;
  const address = (at: number): Buffer => {
    const bytes = Buffer.alloc(host.length + 4, host);
    bytes.writeInt32BE(at, host.length);
    return bytes;
  };
  const fromClient =
    (): Tap =>
    (data, { client }) => {
      const findCoordinator = data.length > 5 && data.readInt16BE(4) === 10; // https://kafka.apache.org/protocol
      if (!silent || !findCoordinator) return data;
      link.asked += 1;
      client.resetAndDestroy();
      return Buffer.alloc(0);
    };
  const fromServer = (): Tap => (data) => {
    const theirs = address(port);
    for (let found = data.indexOf(theirs); found >= 0; found = data.indexOf(theirs)) address(link.port).copy(data, found);
    return data;
  };
  const silence = (yes: boolean): void => {
    silent = yes;
    link.asked = 0;
    if (yes) link.cut();
  };
  const link: KafkaLink = Object.assign(await createLink(broker, { fromClient, fromServer }), { asked: 0, silence });
  return link;
}

/** Longer than the group's session of 15 s. */
const outage = soak ? 45_000 : 20_000;
/** Messages of 2.4 kB that come meanwhile: more than a consumer that took them all could hide in its memory. */
const backlog = soak ? 40_000 : 20_000;

suite("faults", { concurrency: 8 }, () => {
  test("ClickHouse hangs, then refuses connections: no dead letter and nothing lost, the lag rises, memory does not", async () => {
    const all = 9000 + backlog;
    await using sensors = await createSensors({ bigquery: false, connector: false });
    await using line = await createLink(sensors.shop.env.CLICKHOUSE_URL);
    const consumer = await sensors.consumer({ CLICKHOUSE_URL: line.url });
    await sensors.produce(created(1, 1000));
    await isCommitted(sensors, 1000);
    const from = performance.now();
    line.hang();
    // 20 MB, of which a fetch takes what it can, and then the backlog.
    for (let first = 1001; first <= 9000; first += 1000) await sensors.produce(created(first, 1000, 2400));
    await until("the lag is known", async () => (await consumer.lag()) === 8000);
    await until("what it fetched is in its memory", async () => performance.now() - from > 8000);
    const before = await memoryOf(consumer);
    for (let first = 9001; first <= all; first += 1000) await sensors.produce(created(first, 1000, 2400));
    await until("the lag has risen", async () => (await consumer.lag()) === all - 1000);
    await delay(Math.max(0, from + outage - performance.now()));
    const grown = (await memoryOf(consumer)) - before;
    assert.ok(grown < 30, `${grown} MB more for a backlog of ${(backlog * 2.4) / 1000} MB`);
    assert.equal(await consumer.lag(), all - 1000);
    assert.equal(await sensors.committed(), 1000);
    await line.pass();
    await arrived(sensors, all, consumer);

    line.refuse();
    await sensors.produce(created(all + 1, 1000));
    await consumer.line(/step=waiting for=ClickHouse error=.*ECONNREFUSED/);
    await line.pass();
    await arrived(sensors, all + 1000, consumer);
    assert.equal((await sensors.deadLetters()).length, 0);
    await assertHealthy(consumer);
    const stderr = await stop(consumer);
    assert.equal(stderr.match(/step=assigned/g)?.length, 1, stderr); // it sent heartbeats all the while
    assert.match(stderr, /ECONNREFUSED.*\n(.*\n)*?.*step=back waited_seconds=\d+/);
    assert.match(stderr, new RegExp(`step=done rows=${all + 1000} .* dead_letters=0 `));
  });

  test("Kafka's coordinator is silent, at the start and later; Kafka hangs, refuses, comes back: nothing is lost", async () => {
    await using sensors = await createSensors({ bigquery: false, connector: false });
    await using kafka = await createKafkaLink(sensors.shop.env.KAFKA_BROKERS);
    const env = { KAFKA_BROKERS: kafka.url };
    const isAsked = () => until("the coordinator is asked for twice", () => kafka.asked > 1);
    kafka.silence(true);
    const starting = sensors.consumer(env);
    await isAsked();
    kafka.silence(false);
    const consumer = await starting;
    await sensors.produce(created(1, 1000));
    await arrived(sensors, 1000, consumer);
    kafka.silence(true);
    await sensors.produce(created(1001, 1000));
    await isAsked();
    kafka.silence(false);
    await arrived(sensors, 2000, consumer);
    const before = await memoryOf(consumer);

    kafka.hang();
    await delay(outage);
    await assertHealthy(consumer);
    await kafka.pass();
    await sensors.produce(created(2001, 1000));
    await arrived(sensors, 3000, consumer);

    kafka.refuse();
    await sensors.produce(created(3001, 1000));
    await delay(10_000);
    assert.ok((await memoryOf(consumer)) - before < 40);
    // One that comes while Kafka is away waits as well.
    const late = sensors.shop.start(consumerScript, env);
    await late.line(/step=kafka message="Failed to connect/);
    await kafka.pass();
    await late.line(/step=assigned/);
    await arrived(sensors, 4000, consumer);
    assert.equal((await sensors.deadLetters()).length, 0);
    await Promise.all([stop(consumer), stop(late)]);
  });

  for (const [server, variable, createLine] of [
    ["ClickHouse", "CLICKHOUSE_URL", createLink],
    ["Kafka", "KAFKA_BROKERS", createKafkaLink],
  ] as const)
    test(`${server} away for longer than a minute, hanging or refusing: exit 1, nothing committed; started again, it ends exact`, async () => {
      await using sensors = await createSensors({ bigquery: false, connector: false });
      const { shop } = sensors;
      await using hanging = await createLine(shop.env[variable]);
      await using refusing = await createLine(shop.env[variable]);
      const env = { [variable]: hanging.url };
      const consumer = await sensors.consumer(env);
      const leaving = server === "Kafka" ? await sensors.consumer(env) : undefined;
      await sensors.produce(created(1, 1000));
      await isCommitted(sensors, 1000);
      hanging.hang();
      refusing.refuse();
      await sensors.produce(created(1001, 1000));
      const starting = shop.start(consumerScript, { [variable]: refusing.url });
      if (leaving) {
        const polite = shop.start(consumerScript, { [variable]: refusing.url });
        await polite.line(/step=kafka/);
        for (const one of [polite, leaving]) await stop(one, 20);
      }
      const away =
        /^error: (ClickHouse at \S+ \(CLICKHOUSE_URL\): |ClickHouse has not taken a batch for 60 s|Kafka .* has not answered for 60 s)/m;
      for (const run of [consumer, starting]) await endsWith(run, 1, [away]);
      assert.equal(await sensors.committed(), 1000);
      await hanging.pass();
      const unit = readFileSync(join(root, "ops/etl-sensors.service"), "utf8").split("\n");
      for (const line of ["Restart=always", "StartLimitIntervalSec=0", "RestartPreventExitStatus=2"]) assert.ok(unit.includes(line), line);
      const again = await sensors.consumer(env);
      await arrived(sensors, 2000, again);
      assert.equal((await sensors.deadLetters()).length, 0);
      await stop(again);
    });

  const answers =
    (status: number, body: string, exception?: number): Fault =>
    async ({ request, response }) => {
      await Array.fromAsync(request);
      response.writeHead(status, exception ? { "x-clickhouse-exception-code": exception } : {}).end(body);
    };
  const exception = (code: number, name: string): Fault =>
    answers(500, `Code: ${code}. DB::Exception: said by the test. (${name}) (version 26.7)\n`, code);
  const passing: Record<string, Fault> = {
    TOO_MANY_PARTS: exception(252, "TOO_MANY_PARTS"),
    TABLE_IS_READ_ONLY: exception(242, "TABLE_IS_READ_ONLY"),
    "a load balancer's 503": answers(503, "<html><h1>503 Service Temporarily Unavailable</h1></html>"),
    "a connection that is reset": reset(),
    "an answer that is lost": loseAnswer,
  };

  test("overload, and what a load balancer says for a server, is waited out: the same batch comes again", async () => {
    await using sensors = await createSensors({ bigquery: false, connector: false, partitions: 1 });
    await using proxy = await createProxy(sensors.shop.env.CLICKHOUSE_URL);
    const consumer = await sensors.consumer({ CLICKHOUSE_URL: proxy.url });
    let sent = 0;
    for (const [name, fault] of Object.entries(passing)) {
      proxy.fault(/^POST/, fault, 1);
      await sensors.produce(created(sent + 1, 10));
      sent += 10;
      await until(`after ${name}, they are committed`, async () => {
        if (consumer.child.exitCode !== null) assert.fail(`${name}: ${(await consumer.ended).stderr}`);
        return (await sensors.committed()) === sent;
      });
    }
    assert.equal(await countRows(sensors), sent);
    assert.equal((await sensors.deadLetters()).length, 0);
    const stderr = await stop(consumer);
    assert.equal(stderr.match(/step=waiting for=ClickHouse/g)?.length, Object.keys(passing).length, stderr);
    assert.match(stderr, new RegExp(`step=done rows=${sent} batches=${Object.keys(passing).length} dead_letters=0 `));
  });

  const view = "ALTER TABLE sensor_readings_view MODIFY QUERY SELECT throwIf(op = 'c', 'broken by hand') AS id FROM sensor_changes";
  for (const [what, breaking, says] of [
    ["a broken view", view, /^error: .*broken by hand/m],
    ["a dropped table", "DROP TABLE sensor_readings SYNC", /^error: .*sensor_readings' .* doesn't exist.* Next: make doctor;/m],
  ] as const)
    test(`an error of ClickHouse that stays ends the consumer, with nothing committed; repaired by the runbook's step, it resumes: ${what}`, async () => {
      await using sensors = await createSensors({ bigquery: false, connector: false, partitions: 1 });
      const { shop } = sensors;
      const consumer = await sensors.consumer();
      await sensors.produce(created(1, 10));
      await isCommitted(sensors, 10);
      await shop.clickhouse.command({ query: breaking });
      await sensors.produce(created(11, 10));
      await endsWith(consumer, 1, [says]);
      assert.equal(await sensors.committed(), 10);
      await shop.clickhouse.command({ query: "DROP TABLE etl_migrations SYNC" }); // EtlSensorsDown
      await shop.succeed(migrate);
      const lacks = /ClickHouse's sensor_readings was made again, and lacks what epoch 1 of .* had inserted\. .* run: make resnapshot /;
      if (breaking === view) await sensors.catchUp();
      else await endsWith(shop.start(consumerScript, { UNTIL: "caught-up" }), 2, [lacks]);
      assert.deepEqual([await countRows(sensors), await sensors.committed()], breaking === view ? [20, 20] : [0, 10]);
    });

  test("SIGTERM finishes and commits the batch under way; while ClickHouse hangs, exit 0 without a commit", async () => {
    await using sensors = await createSensors({ bigquery: false, connector: false, partitions: 1 });
    const { shop } = sensors;
    await using proxy = await createProxy(shop.env.CLICKHOUSE_URL);
    const env = { CLICKHOUSE_URL: proxy.url };
    const first = await sensors.consumer(env);
    const inserted = withhold();
    proxy.fault(/^POST/, inserted, 1);
    await sensors.produce(created(1, 50));
    await inserted.reached;
    await sensors.produce(created(51, 50));
    for (const signal of ["SIGTERM", "SIGINT"] as const) first.child.kill(signal); // as timeout and make each send one
    await first.line(/step=stopping signal=SIG(TERM|INT)/);
    assert.equal(await sensors.committed(), 0);
    inserted.release();
    await endsWith(first, 0, [/step=done rows=50 batches=1 /]);
    assert.equal(await sensors.committed(), 50);

    const second = await sensors.consumer(env);
    await isCommitted(sensors, 100);
    const hanging = hold();
    proxy.fault(/./, hanging);
    await sensors.produce(created(101, 10));
    await hanging.reached;
    await stop(second, 20);
    assert.equal(await sensors.committed(), 100);
    await sensors.catchUp();
    assert.equal(await countRows(sensors), 110);
  });

  test("a topic compressed by each codec is read; caught up is reached behind what an aborted transaction leaves, with no lag", async () => {
    await using sensors = await createSensors({ bigquery: false, connector: false });
    const { admin, topic, shop } = sensors;
    const of = { type: ConfigResourceTypes.TOPIC, name: topic };
    for (const [at, value] of ["gzip", "zstd", "lz4", "snappy"].entries()) {
      const configEntries = [{ name: "compression.type", value }]; // the broker compresses
      await admin.alterConfigs({ validateOnly: false, resources: [{ ...of, configEntries }] });
      await sensors.produce(created(1 + 300 * at, 300, 500));
    }
    const idempotent = { transactionalId: topic, idempotent: true, maxInFlightRequests: 1 };
    const producer = kafkaAt(shop.env.KAFKA_BROKERS ?? "").producer(idempotent);
    await producer.connect();
    const transact = async (first: number, end: "abort" | "commit"): Promise<void> => {
      const transaction = await producer.transaction();
      await transaction.send({ topic, messages: created(first, 30) });
      await transaction[end]();
      await sensors.catchUp();
      for (const { lag } of await sensors.state()) assert.equal(lag, 0);
    };
    await transact(5001, "abort"); // behind messages
    assert.equal(await countRows(sensors), 1200);
    await transact(5001, "abort"); // alone
    await transact(6001, "commit");
    assert.equal(await countRows(sensors), 1230);
    await producer.disconnect();
  });

  test("a change of 23 MB arrives; of one that is larger than Kafka takes make connector names the row, until it passes", async () => {
    await using sensors = await createSensors({ bigquery: false });
    const { shop, topic, admin } = sensors;
    const consumer = await sensors.consumer();
    await shop.admin`insert into sensor_readings (id, metric, recorded_at) values (1, repeat('x', 11500000), '2024-01-01Z')`;
    await shop.admin`update sensor_readings set value = 1`;
    await sensors.equal();
    const url = `${shop.env.CONNECT_URL}/connectors/etl-${shop.env.CLICKHOUSE_DATABASE}-sensor_readings`;
    const config = await fetch(`${url}/config`).then((answer) => answer.json());
    const body = JSON.stringify({ ...(config as object), "producer.override.max.request.size": "1000000" });
    const put = { method: "PUT", headers: { "content-type": "application/json" }, body };
    await fetch(`${url}/stop`, { method: "PUT" }); // a task of the former configuration would take the row
    const readers = () => shop.admin`select from pg_replication_slots where active and database = current_database()`;
    await until("nobody reads the slot", async () => (await readers()).length === 0);
    await until("it is put", async () => (await fetch(`${url}/config`, put)).ok);
    await shop.admin`insert into sensor_readings (id, metric, recorded_at) values (2, repeat('y', 12000000), '2024-01-01Z')`;
    await fetch(`${url}/resume`, { method: "PUT" });
    const failed = async (): Promise<boolean> => (await (await fetch(`${url}/status`)).text()).includes("RecordTooLarge");
    await until("the task has failed", failed, 90);
    await using proxy = await createProxy(shop.env.CONNECT_URL);
    proxy.fault(/^PUT .*\/config$/, async ({ response }) => void response.end("{}")); // as if the file allowed no more
    const { code, stderr } = await shop.run("scripts/ops/connector.ts", { CONNECT_URL: proxy.url });
    assert.equal(code, 1, stderr);
    const largest = "The largest rows of public\\.sensor_readings: id=2 of 12,000,\\d+ bytes, id=1 of 11,500,";
    assert.match(stderr, new RegExp(`RecordTooLargeException[\\s\\S]*${largest}`));
    assert.match(stderr, /Raise max\.message\.bytes, max\.request\.size and buffer\.memory in schemas\/debezium\/sensor_readings\.json/);
    const status = await shop.run("scripts/ops/status.ts", {});
    assert.match(status.stdout, /^sensors: Debezium's connector does not run\. Next: make connector$/m);
    // Somebody has made the topic with less, or compacted it.
    const alter = (settings: string): Promise<unknown> => {
      const configEntries = [...settings.matchAll(/([^,=]+)=([^,]+)/g)].map(([, name = "", value = ""]) => ({ name, value }));
      const resource = { type: ConfigResourceTypes.TOPIC, name: topic, configEntries };
      return admin.alterConfigs({ validateOnly: false, resources: [resource] });
    };
    let settings = "";
    for (const [policy, bytes] of [
      ["delete", 1_000_000],
      ["compact", 67_108_864],
    ] as const) {
      await alter(`cleanup.policy=${policy},max.message.bytes=${bytes}`);
      const told = `topic ${topic} has cleanup.policy=${policy} and max.message.bytes=${bytes}: `;
      assert.ok((await shop.run("scripts/ops/doctor.ts", { PIPELINE: "sensors" })).stdout.includes(told));
      const refused = await shop.run("scripts/ops/connector.ts");
      assert.ok(refused.code === 1 && refused.stderr.includes(told), refused.stderr);
      settings = new RegExp(`kafka-configs\\.sh .* --entity-name ${topic} --add-config ([^;]+); `).exec(refused.stderr)?.[1] ?? "";
    }
    await alter(settings);
    await sensors.connector();
    await sensors.equal();
    await stop(consumer);
  });

  suite("drift", { concurrency: 1 }, () => {
    let sensors: Sensors;
    before(async () => {
      sensors = await createSensors({ bigquery: false, connector: false });
    });
    after(() => sensors[Symbol.asyncDispose]());
    /** The consumer ends, having said all of `says`, and has committed nothing. */
    const ends = async (says: (string | RegExp)[], variables = {}, code = 2): Promise<string> => {
      const stderr = await endsWith(sensors.shop.start(consumerScript, { UNTIL: "caught-up", ...variables }), code, says);
      assert.equal(await sensors.committed(), 0);
      return stderr;
    };
    /** It exits with 2, having read nothing. */
    const stops = async (says: (string | RegExp)[]): Promise<void> => assert.doesNotMatch(await ends(says), /step=assigned/);

    test("UNTIL=caught-up ends on an empty topic; what is not there is named: topic, tables, metadata; a port that is taken", async () => {
      const { shop, topic } = sensors;
      await ends([/step=done rows=0 batches=0 dead_letters=0 /], {}, 0);
      await ends([`Kafka has no topic ${topic}x. Run: make connector`], { SENSORS_TOPIC: `${topic}x` });
      const consumer = await sensors.consumer();
      const { port } = new URL(await consumer.url);
      const taken = `^error: METRICS_PORT ${port}: .*EADDRINUSE.*\\. Is another consumer running here\\? Choose another port$`;
      await ends([new RegExp(taken, "m")], { METRICS_PORT: port }, 1);
      await stop(consumer);
      const none = `${shop.env.CLICKHOUSE_DATABASE}_none`;
      const missing = `schemas/clickhouse/000_migrations.sql and 9 more files were not applied to ClickHouse's database ${none}`;
      await ends([`${missing} (CLICKHOUSE_DATABASE). Run: make migrate`], { CLICKHOUSE_DATABASE: none });
      await sensors.produce(created(1, 3));
      await shop.admin`alter table etl.topics rename to elsewhere`;
      await ends([/^error: .*etl\.topics.*: the metadata tables are older than this version\. Run: make migrate$/m]);
      await shop.admin`alter table etl.elsewhere rename to topics`;
    });

    const next = `Change the source back, or sensor_readings by a new file in schemas/clickhouse; schemas/README.md, "When the schema changes".`;
    const expected = (column: string, type: string, found: string): string =>
      `  column public.sensor_readings.${column}: expected one for ${type} (ClickHouse's sensor_readings), found ${found}`;

    test("drift at the source stops the consumer before it ingests: columns gone or retyped, replica identity not full", async () => {
      const alter = (change: string): Promise<unknown> => sensors.shop.admin.unsafe(`alter table sensor_readings ${change}`);
      await alter("rename metric to kind");
      await alter("drop value, alter recorded_at type timestamp, replica identity default");
      await stops([
        "the source differs from ClickHouse's sensor_readings:",
        expected("value", "Nullable(Float64)", "no such column"),
        expected("metric", "LowCardinality(Nullable(String))", "no such column"),
        expected("recorded_at", "DateTime64(6, 'UTC')", "timestamp without time zone"),
        "  table sensor_readings: its changes lack the old row. Run as its owner: alter table sensor_readings replica identity full;",
        next,
      ]);
      await alter("rename kind to metric");
      await alter("add value double precision, alter recorded_at type timestamptz, replica identity full");
    });

    test("a file of schemas/clickhouse that was not applied, was edited, or lost its view, stops the consumer; migrate repairs", async () => {
      const { shop } = sensors;
      const file = "schemas/clickhouse/007_sensor_dead_letters_view.sql";
      const database = `ClickHouse's database ${shop.env.CLICKHOUSE_DATABASE}`;
      const forget = async (change: string): Promise<unknown> =>
        await shop.clickhouse.command({
          query: `ALTER TABLE etl_migrations ${change} WHERE file = '007_sensor_dead_letters_view.sql'`,
          clickhouse_settings: { mutations_sync: "2" },
        });
      await forget("UPDATE sha256 = 'of another text'");
      const edited = `has been edited since. Run: git checkout ${file}, and put the change into a new file`;
      await stops([new RegExp(`${file} was applied at \\S+ \\S+ and `), edited]);
      await forget("DELETE");
      await stops([`${file} was not applied to ${database} (CLICKHOUSE_DATABASE). Run: make migrate`]);
      assert.deepEqual((await shop.succeed(migrate)).stderr.match(/step=apply what=schemas.*$/gm), [`step=apply what=${file}`]);
      await shop.clickhouse.command({ query: "DROP VIEW sensor_dead_letters_view SYNC" });
      const lost =
        "has lost sensor_dead_letters_view, which schemas/clickhouse made. Run there: DROP TABLE etl_migrations, then: make migrate";
      await stops([`${database} ${lost}`]);
      await shop.clickhouse.command({ query: "DROP TABLE etl_migrations SYNC" });
      await shop.succeed(migrate);
    });

    test("a new column at the source is a warning and a metric, and its values are kept in _unknown", async () => {
      const { shop } = sensors;
      await shop.admin`alter table sensor_readings add note text, add quality int`;
      const [{ key, value }] = created(50, 1) as [{ key: string; value: string }];
      await sensors.produce([{ key, value: value.replace('"id":50', '"id":50,"note":"a \\"b\\"","quality":3') }]);
      const consumer = await sensors.consumer();
      await consumer.line(
        /step=warning warning="public\.sensor_readings has columns that sensor_readings does not have; their values are kept in _unknown" columns=note,quality$/,
      );
      assert.equal((await consumer.metrics()).etl_sensors_unknown_source_columns, 2);
      await until("all is committed", async () => (await sensors.committed()) === 4);
      const rows = await shop.select("SELECT toInt32(id) AS id, _unknown FROM sensor_readings FINAL ORDER BY sensor_readings.id");
      assert.deepEqual(rows, [
        ...[1, 2, 3].map((id) => ({ id, _unknown: {} })),
        { id: 50, _unknown: { note: '"a \\"b\\""', quality: "3" } },
      ]);
      assert.deepEqual(await sensors.deadLetters(), []);
      await stop(consumer);
    });
  });
});
