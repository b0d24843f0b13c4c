// ClickHouse or Kafka away, slow or overloaded: retried for a minute, with no dead letter and nothing lost; then exit 1 with nothing
// committed, and systemd starts the consumer again. Anything else that is wrong ends it before a message moves, and says what to do.
import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { after, before, suite, test } from "node:test";
import { setTimeout as delay } from "node:timers/promises";
import { topicState } from "../../shared/sensors/epoch.ts";
import { ConfigResourceTypes } from "../../shared/sensors/kafka.ts";
import { createProxy, ending, type Fault, loseAnswer, reset, stop, withhold } from "../lib/faults.ts";
import { createLink, type Link, type Tap } from "../lib/link.ts";
import { type Consumer, created, createSensors, kafkaAt, type Sensors } from "../lib/sensors.ts";
import { createServers } from "../lib/servers.ts";
import { type Process, until } from "../lib/shop.ts";
import { endpoint, root } from "../stack/env.ts";

const soak = process.env.SOAK === "1";
const consumerScript = "scripts/sensors.ts";
const migrate = "scripts/ops/migrate.ts";

/**
 * Waits until the group has no lag and that many rows are there. Not by offsets: a producer whose broker was away sends again what it
 * got no answer for. Its patience is for a group that has to be told anew who is in it: Kafka waits out sessions and rebalances.
 */
async function arrived(sensors: Sensors, rows: number, consumer: Process): Promise<void> {
  const all = async (): Promise<boolean> => (await sensors.state()).every(({ lag }) => lag === 0) && (await countRows(sensors)) === rows;
  await until(`${rows} rows, and no lag`, all, 180).catch(async (error: Error) => {
    const offsets = (await sensors.state()).map(({ committed, end }) => `${committed} of ${end}`);
    consumer.child.kill("SIGKILL");
    const { stderr } = await consumer.ended;
    throw new Error(`${error.message}: ${await countRows(sensors)} rows, offsets ${offsets}\n${stderr.slice(-3000)}`);
  });
}

const countRows = async ({ shop }: Sensors): Promise<number> =>
  Number((await shop.select<{ count: string }>("SELECT count() AS count FROM sensor_readings FINAL"))[0]?.count);

const lagOf = (metrics: Record<string, number>): number =>
  Object.entries(metrics).reduce((sum, [name, value]) => (name.startsWith("etl_sensors_lag{") ? sum + value : sum), 0);

async function healthz(consumer: Consumer): Promise<string> {
  const answer = await fetch(`${await consumer.url}/healthz`);
  return `${answer.status} ${await answer.text()}`;
}

/** Starts a consumer again that has ended with 1, as its unit tells systemd to, until one is given its partitions. */
async function restarted(sensors: Sensors, env = {}): Promise<Process> {
  const unit = readFileSync(join(root, "ops/etl-sensors.service"), "utf8");
  for (const line of ["Restart=always", "StartLimitIntervalSec=0", "RestartPreventExitStatus=2"])
    assert.ok(unit.split("\n").includes(line), `${line} in:\n${unit}`);
  for (let starts = 1; ; starts++) {
    const run = sensors.shop.start(consumerScript, env);
    if (await run.line(/step=assigned/).catch(() => undefined)) return run;
    const { code, stderr } = await run.ended;
    assert.equal(code, 1, stderr);
    assert.ok(starts < 5, stderr);
  }
}

/**
 * A broker behind a proxy, which says that it is at the proxy. It does not say who coordinates a group until it is told to; and as one
 * that has just come back it can be loading its groups, and not know what it leads, which it says to whoever asks.
 */
interface KafkaLine extends AsyncDisposable {
  address: string;
  answers(yes: boolean): void;
  loads(yes: boolean): void;
  /** How often it was asked so and did not answer, or said that it is loading: since the last of the two calls above. */
  refused(request: keyof typeof kafkaRequests): number;
}

const zeros = (count: number): number[] => Array(count).fill(0);
/**
 * Their keys, and what follows the correlation id in the answer of a broker that has just come back: NOT_LEADER_OR_FOLLOWER (6) or
 * COORDINATOR_LOAD_IN_PROGRESS (14). https://kafka.apache.org/protocol
 */
const kafkaRequests = {
  findCoordinator: { key: 10, loading: [] },
  // Versions 2 and 3, of one topic's one partition: its name is a letter.
  listOffsets: { key: 2, loading: [...zeros(4), 0, 0, 0, 1, 0, 1, 116, 0, 0, 0, 1, ...zeros(4), 0, 6, ...zeros(16)] },
  offsetFetch: { key: 9, loading: [...zeros(4), /* topics */ ...zeros(4), 0, 14] }, // versions 3 to 5
  joinGroup: { key: 11, loading: [...zeros(4), 0, 14, /* generation, three names, members */ ...zeros(14)] }, // 2 to 5
};

async function createKafkaLine(broker = ""): Promise<KafkaLine> {
  const { host, port } = endpoint(broker);
  let [answering, loading] = [false, false];
  const refused: number[] = [];
  const at = (port: number): Buffer => {
    const bytes = Buffer.alloc(host.length + 4, host);
    bytes.writeInt32BE(port, host.length);
    return bytes;
  };
  const fromClient = (): Tap => {
    let pending = Buffer.alloc(0);
    return (data, { client }) => {
      const passed: Buffer[] = [];
      pending = Buffer.concat([pending, data]);
      while (pending.length >= 6 && pending.length >= 4 + pending.readInt32BE(0)) {
        const request = pending.subarray(0, 4 + pending.readInt32BE(0));
        pending = pending.subarray(request.length);
        const key = request.readInt16BE(4);
        const known = Object.values(kafkaRequests).find((one) => one.key === key);
        const refuses = known && (known.loading.length ? loading : !answering);
        if (!refuses) {
          passed.push(request);
          continue;
        }
        refused.push(key);
        if (loading) client.write(Buffer.from([0, 0, 0, 4 + known.loading.length, ...request.subarray(8, 12), ...known.loading]));
        else client.resetAndDestroy();
      }
      return Buffer.concat(passed);
    };
  };
  const fromServer = (): Tap => (data) => {
    const theirs = at(port);
    for (let found = data.indexOf(theirs); found >= 0; found = data.indexOf(theirs)) at(link.port).copy(data, found);
    return data;
  };
  const link = await createLink(broker, { fromClient, fromServer });
  return {
    address: link.url,
    refused: (request) => refused.filter((key) => key === kafkaRequests[request].key).length,
    answers: (yes) => {
      answering = yes;
      refused.length = 0;
      if (!yes) link.cut();
    },
    loads: (yes) => {
      loading = yes;
      refused.length = 0;
    },
    [Symbol.asyncDispose]: link[Symbol.asyncDispose],
  };
}

/** An outage of less than a minute, and longer than the group's session: how it begins, and how it ends. */
interface Outage {
  begin(line: Link): Promise<void> | void;
  end(line: Link): Promise<void>;
}
const seconds = soak ? 45 : 20;
/** Messages of 2.4 kB that come meanwhile: more than a consumer that took them all could hide in its memory. */
const backlog = soak ? 40_000 : 20_000;
const outages: Record<string, Outage> = {
  "refuses connections": {
    begin: (line) => line.refuse(),
    end: (line) => line.pass(),
  },
  "hangs, and resumes": {
    begin: (line) => line.hang(),
    end: (line) => line.pass(),
  },
};

suite("faults", { concurrency: 8 }, () => {
  for (const [name, { begin, end }] of Object.entries(outages))
    test(`ClickHouse ${name}: no dead letter and nothing lost, the lag rises, the memory does not, and it resumes by itself`, async () => {
      const all = 9000 + backlog;
      await using sensors = await createSensors({ bigquery: false, connector: false });
      await using line = await createLink(sensors.shop.env.CLICKHOUSE_URL);
      const consumer = await sensors.consumer({ CLICKHOUSE_URL: line.url });
      await sensors.produce(created(1, 1000));
      await until("the first are committed", async () => (await sensors.committed()) === 1000);
      const from = performance.now();
      await begin(line);
      // 20 MB, of which a fetch takes what it can, and then the backlog.
      for (let first = 1001; first <= 9000; first += 1000) await sensors.produce(created(first, 1000, 2400));
      await until("the lag is known", async () => lagOf(await consumer.metrics()) === 8000);
      await until("what it fetched is in its memory", async () => performance.now() - from > 8000);
      const before = (await consumer.metrics()).process_resident_memory_bytes ?? 0;
      for (let first = 9001; first <= all; first += 1000) await sensors.produce(created(first, 1000, 2400));
      await until("the lag has risen", async () => lagOf(await consumer.metrics()) === all - 1000);
      await delay(Math.max(0, from + seconds * 1000 - performance.now()));
      const metrics = await consumer.metrics();
      const grown = ((metrics.process_resident_memory_bytes ?? 0) - before) / 2 ** 20;
      assert.ok(grown < 30, `${grown} MB more for a backlog of ${(backlog * 2.4) / 1000} MB`);
      assert.equal(lagOf(metrics), all - 1000);
      assert.equal(await sensors.committed(), 1000);
      await end(line);
      await arrived(sensors, all, consumer);
      assert.equal((await sensors.deadLetters()).length, 0);
      assert.match(await healthz(consumer), /^200 ok$/m);
      const stderr = await stop(consumer);
      // Longer than the group's session: it was alive all the while.
      assert.equal(stderr.match(/step=assigned/g)?.length, 1, stderr);
      assert.match(stderr, new RegExp(`step=done rows=${all} .* dead_letters=0 `));
      if (name !== "hangs, and resumes")
        assert.match(stderr, /step=waiting for=ClickHouse error=.*\n(.*\n)*?.*step=back waited_seconds=\d+/);
    });

  for (const how of ["refuse", "hang"] as const)
    test(`ClickHouse away for longer than a minute (${how}): exit 1, nothing committed; started again, it ends exact`, async () => {
      await using sensors = await createSensors({ bigquery: false, connector: false });
      await using line = await createLink(sensors.shop.env.CLICKHOUSE_URL);
      const env = { CLICKHOUSE_URL: line.url };
      const consumer = await sensors.consumer(env);
      await sensors.produce(created(1, 1000));
      await until("the first are committed", async () => (await sensors.committed()) === 1000);
      await line[how]();
      await sensors.produce(created(1001, 1000));
      const starting = sensors.shop.start(consumerScript, env); // one that starts meanwhile waits for as long
      for (const run of [consumer, starting]) {
        const { code, stderr } = await ending(run, 120);
        assert.equal(code, 1, stderr);
        assert.match(stderr, /^error: ClickHouse has not answered for 60 s \(.+\)\. .* Next: make doctor$/m);
        assert.equal(stderr.match(/step=assigned/g)?.length, run === consumer ? 1 : undefined, stderr);
      }
      assert.equal(await sensors.committed(), 1000);
      await line.pass();
      const again = await restarted(sensors, env);
      await arrived(sensors, 2000, again);
      assert.equal((await sensors.deadLetters()).length, 0);
      await stop(again);
    });

  test("a slow ClickHouse is waited for: batches are larger instead, no dead letter and nothing lost", async () => {
    await using sensors = await createSensors({ bigquery: false, connector: false });
    await using line = await createLink(sensors.shop.env.CLICKHOUSE_URL);
    const consumer = await sensors.consumer({ CLICKHOUSE_URL: line.url });
    line.latency = 700;
    for (let first = 1; first < 6000; first += 200) await sensors.produce(created(first, 200));
    await until("it is all there", async () => (await sensors.committed()) === 6000, 60);
    assert.equal(await countRows(sensors), 6000);
    assert.equal((await sensors.deadLetters()).length, 0);
    const stderr = await stop(consumer);
    assert.doesNotMatch(stderr, /step=waiting/);
    assert.ok(Number(/ batches=(\d+)/.exec(stderr.split("step=done")[1] ?? "")?.[1]) < 15, stderr);
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

  const broken: Record<string, [breaking: string, says: RegExp]> = {
    "the table is dropped": ["DROP TABLE sensor_readings SYNC", /^error: .*sensor_readings' .* doesn't exist.* Next: make doctor;/m],
    "a view is broken": [
      "ALTER TABLE sensor_readings_view MODIFY QUERY SELECT throwIf(op = 'c', 'broken by hand') AS id FROM sensor_changes",
      /^error: .*broken by hand/m,
    ],
  };
  for (const [what, [breaking, says]] of Object.entries(broken))
    test(`any other error of ClickHouse ends the consumer, with nothing committed: ${what}`, async () => {
      await using sensors = await createSensors({ bigquery: false, connector: false, partitions: 1 });
      const { shop } = sensors;
      const consumer = await sensors.consumer();
      await sensors.produce(created(1, 10));
      await until("they are committed", async () => (await sensors.committed()) === 10);
      await shop.clickhouse.command({ query: breaking });
      await sensors.produce(created(11, 10));
      const { code, stderr } = await ending(consumer);
      assert.equal(code, 1, stderr);
      assert.match(stderr, says);
      assert.equal(await sensors.committed(), 10);
      // Repaired, it resumes where it was: the runbook's step, EtlSensorsDown.
      await shop.clickhouse.command({ query: "DROP TABLE etl_migrations SYNC" });
      await shop.succeed(migrate);
      const again = await shop.run(consumerScript, { UNTIL: "caught-up" });
      const lacks = /ClickHouse's sensor_readings was made again, and lacks what epoch 1 of .* had inserted\. .* run: make resnapshot /;
      if (what === "the table is dropped") assert.match(again.stderr, lacks);
      assert.deepEqual([again.code, await sensors.committed()], what === "the table is dropped" ? [2, 10] : [0, 20]);
      assert.equal(await countRows(sensors), what === "the table is dropped" ? 0 : 20);
    });

  test("SIGTERM finishes and commits the batch under way, and exits 0", async () => {
    await using sensors = await createSensors({ bigquery: false, connector: false, partitions: 1 });
    await using proxy = await createProxy(sensors.shop.env.CLICKHOUSE_URL);
    const consumer = await sensors.consumer({ CLICKHOUSE_URL: proxy.url });
    const inserted = withhold();
    proxy.fault(/^POST/, inserted, 1);
    await sensors.produce(created(1, 50));
    await inserted.reached;
    await sensors.produce(created(51, 50));
    for (const signal of ["SIGTERM", "SIGINT"] as const) consumer.child.kill(signal); // as timeout and make each send one
    await consumer.line(/step=stopping signal=SIG(TERM|INT)/);
    assert.equal(await sensors.committed(), 0);
    inserted.release();
    const { code, stderr } = await ending(consumer, 10);
    assert.equal(code, 0, stderr);
    assert.match(stderr, /step=done rows=50 batches=1 /);
    assert.equal(await sensors.committed(), 50);
  });

  test("SIGTERM while ClickHouse hangs exits 0 within 10 s, without a commit, and nothing is lost", async () => {
    await using sensors = await createSensors({ bigquery: false, connector: false });
    await using line = await createLink(sensors.shop.env.CLICKHOUSE_URL);
    const consumer = await sensors.consumer({ CLICKHOUSE_URL: line.url });
    await sensors.produce(created(1, 10));
    await until("they are committed", async () => (await sensors.committed()) === 10);
    line.hang();
    await sensors.produce(created(11, 10));
    await until("the lag is known", async () => lagOf(await consumer.metrics()) === 10);
    await stop(consumer, 20);
    // It has left the group, so that the next one need not wait for the end of its session.
    const { groups } = await sensors.admin.describeGroups([sensors.shop.env.SENSORS_GROUP ?? ""]);
    assert.deepEqual(groups[0]?.members, []);
    assert.equal(await sensors.committed(), 10);
    // One that starts while ClickHouse is away waits too, and can be stopped; a second signal does not wait at all.
    const [polite, rude] = [1, 2].map(() => sensors.shop.start(consumerScript, { CLICKHOUSE_URL: line.url }));
    await until("both are at it", async () => {
      await Promise.all([polite, rude].map((one) => one?.line(/step=(waiting|serving)/)));
      return true;
    });
    polite?.child.kill("SIGTERM");
    rude?.child.kill("SIGTERM");
    await rude?.line(/step=stopping/);
    rude?.child.kill("SIGTERM");
    assert.ok(polite && rude);
    const ended = await ending(polite, 10);
    assert.equal(ended.code, 0, ended.stderr);
    await ending(rude, 10);
    await line.pass();
    await sensors.catchUp();
    assert.equal(await countRows(sensors), 20);
  });

  test("UNTIL=caught-up ends at once on an empty topic; what is not there is named, with what makes it: the topic, the tables, the metadata; a port that is taken", async () => {
    await using sensors = await createSensors({ bigquery: false, connector: false });
    const { shop, topic } = sensors;
    const says = async (code: number, text: string | RegExp, variables = {}): Promise<void> => {
      const run = await ending(shop.start(consumerScript, { UNTIL: "caught-up", ...variables }), 60);
      if (typeof text === "string") assert.ok(run.stderr.includes(text), run.stderr);
      else assert.match(run.stderr, text);
      assert.equal(run.code, code, run.stderr);
      assert.doesNotMatch(run.stderr, /^\s+at /m);
    };
    await says(0, /step=done rows=0 batches=0 dead_letters=0 /);
    await says(2, `Kafka has no topic ${topic}x. Run: make connector`, { SENSORS_TOPIC: `${topic}x` });
    const consumer = await sensors.consumer();
    const { port } = new URL(await consumer.url);
    await says(
      1,
      new RegExp(`^error: METRICS_PORT ${port}: .*EADDRINUSE.*\\. Is another consumer running here\\? Choose another port$`, "m"),
      { METRICS_PORT: port },
    );
    await stop(consumer);
    const none = `${shop.env.CLICKHOUSE_DATABASE}_none`;
    await says(
      2,
      `schemas/clickhouse/001_sensor_readings.sql and 8 more files were not applied to ClickHouse's database ${none} (CLICKHOUSE_DATABASE). Run: make migrate`,
      { CLICKHOUSE_DATABASE: none },
    );
    await shop.admin.unsafe("drop table etl.topic_offsets, etl.topics");
    await sensors.produce(created(1, 1));
    await says(2, /^error: .*etl\.topics.*: the metadata tables are older than this version\. Run: make migrate$/m);
    assert.equal(await sensors.committed(), 0);
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
    const producer = kafkaAt(shop.env.KAFKA_BROKERS ?? "").producer({
      transactionalId: topic,
      idempotent: true,
      maxInFlightRequests: 1,
    });
    await producer.connect();
    const transact = async (first: number, end: "abort" | "commit"): Promise<void> => {
      const transaction = await producer.transaction();
      await transaction.send({ topic, messages: created(first, 30) });
      await transaction[end]();
      await sensors.catchUp();
      assert.deepEqual(
        (await sensors.state()).map(({ lag }) => lag),
        [0, 0, 0],
      );
    };
    await transact(5001, "abort"); // behind messages
    assert.equal(await countRows(sensors), 1200);
    await transact(5001, "abort"); // alone
    await transact(6001, "commit");
    assert.equal(await countRows(sensors), 1230);
    await producer.disconnect();
  });

  test("a change of 23 MB arrives; of one that is larger than Kafka takes make connector names the row, again and again, until it passes", async () => {
    await using sensors = await createSensors({ bigquery: false });
    const { shop } = sensors;
    const consumer = await sensors.consumer();
    await shop.admin`insert into sensor_readings (id, metric, recorded_at) values (1, repeat('x', 11500000), '2024-01-01Z')`;
    await shop.admin`update sensor_readings set value = 1`;
    await sensors.equal();
    const url = `${shop.env.CONNECT_URL}/connectors/etl-${shop.env.CLICKHOUSE_DATABASE}-sensor_readings`;
    const config = await fetch(`${url}/config`).then((answer) => answer.json());
    const body = JSON.stringify({ ...(config as object), "producer.override.max.request.size": "1000000" });
    const put = { method: "PUT", headers: { "content-type": "application/json" }, body };
    await until("it is put", async () => (await fetch(`${url}/config`, put)).ok);
    await shop.admin`insert into sensor_readings (id, metric, recorded_at) values (2, repeat('y', 12000000), '2024-01-01Z')`;
    const failed = async (): Promise<boolean> => (await (await fetch(`${url}/status`)).text()).includes("RecordTooLarge");
    await until("the task has failed", failed, 90);
    await using proxy = await createProxy(shop.env.CONNECT_URL);
    proxy.fault(/^PUT .*\/config$/, async ({ response }) => void response.end("{}")); // as if the file allowed no more
    const { code, stderr } = await shop.run("scripts/ops/connector.ts", { CONNECT_URL: proxy.url });
    assert.equal(code, 1, stderr);
    assert.match(
      stderr,
      /RecordTooLargeException[\s\S]*The largest rows of public\.sensor_readings: id=2 of 12,000,\d+ bytes, id=1 of 11,500,/,
    );
    assert.match(stderr, /Raise max\.message\.bytes, max\.request\.size and buffer\.memory in schemas\/debezium\/sensor_readings\.json/);
    const status = await shop.run("scripts/ops/status.ts", {});
    assert.match(status.stdout, /^sensors: Debezium's connector does not run\. Next: make connector$/m);
    // A topic that an older version made takes less, or one that somebody has compacted: make connector changes that too.
    const of = { type: ConfigResourceTypes.TOPIC, name: sensors.topic };
    const compact = { ...of, configEntries: [{ name: "cleanup.policy", value: "compact" }] };
    await sensors.admin.alterConfigs({ validateOnly: false, resources: [compact] });
    const compacted = /kafka: .*the topic's cleanup\.policy is compact: .* Run: make connector/;
    assert.match((await shop.run("scripts/ops/doctor.ts", { PIPELINE: "sensors" })).stdout, compacted);
    await shop.run("scripts/ops/connector.ts", { CONNECT_URL: proxy.url });
    assert.doesNotMatch((await shop.run("scripts/ops/doctor.ts", { PIPELINE: "sensors" })).stdout, compacted);
    const configEntries = [
      { name: "max.message.bytes", value: "1000000" },
      { name: "retention.ms", value: "77777777" },
    ];
    await sensors.admin.alterConfigs({ validateOnly: false, resources: [{ ...of, configEntries }] });
    const told = /kafka: .*the topic takes messages of 1,000,000 bytes, and the connector may send 67,108,864\. Run: make connector/;
    assert.match((await shop.run("scripts/ops/doctor.ts", { PIPELINE: "sensors" })).stdout, told);
    await sensors.connector();
    await sensors.equal();
    assert.doesNotMatch((await shop.run("scripts/ops/doctor.ts", { PIPELINE: "sensors" })).stdout, told);
    const { resources } = await sensors.admin.describeConfigs({ includeSynonyms: false, resources: [of] });
    const set = new Map(resources[0]?.configEntries.map(({ configName, configValue }) => [configName, configValue]));
    assert.deepEqual([set.get("max.message.bytes"), set.get("retention.ms")], ["67108864", "77777777"]);
    await stop(consumer);
  });

  test("a coordinator that does not answer, at the start and later, or that still loads its groups, is waited out", async () => {
    await using sensors = await createSensors({ bigquery: false, connector: false });
    const { shop, topic } = sensors;
    await using kafka = await createKafkaLine(shop.env.KAFKA_BROKERS);
    const env = { KAFKA_BROKERS: kafka.address };
    const refuses = (request: keyof typeof kafkaRequests) => until(`${request} is refused twice`, () => kafka.refused(request) > 1);
    const starting = sensors.consumer(env);
    await refuses("findCoordinator");
    kafka.answers(true);
    const consumer = await starting;
    await sensors.produce(created(1, 100));
    await arrived(sensors, 100, consumer);
    kafka.answers(false); // and all that is connected is cut
    await sensors.produce(created(101, 100));
    await refuses("findCoordinator");
    kafka.answers(true);
    await arrived(sensors, 200, consumer);

    kafka.loads(true);
    await sensors.produce(created(201, 100));
    await refuses("offsetFetch"); // by the consumer: it has a batch
    const second = shop.start(consumerScript, env);
    await refuses("joinGroup");
    const admin = kafkaAt(kafka.address).admin();
    await admin.connect();
    const state = topicState(admin, topic, shop.env.SENSORS_GROUP ?? "").finally(() => admin.disconnect());
    await refuses("listOffsets");
    kafka.loads(false);
    assert.equal((await state).length, 3);
    await arrived(sensors, 300, consumer);
    await second.line(/step=assigned/);
    second.child.kill("SIGTERM");
    assert.equal((await ending(second)).code, 0);
    const stderr = await stop(consumer);
    const crashes = stderr.match(/step=kafka message="Crash: KafkaJS\w+: Failed to find group coordinator"/g) ?? [];
    assert.ok(crashes.length >= 2, stderr);
  });

  suite("Kafka", { concurrency: 1 }, () => {
    let servers: Awaited<ReturnType<typeof createServers>>;
    before(async () => {
      servers = await createServers(["kafka"]);
    });
    after(() => servers?.[Symbol.asyncDispose]());

    test("Kafka hangs, is killed and comes back, and is not there at the start: no dead letter and nothing lost, it resumes by itself", async () => {
      await using sensors = await createSensors({ bigquery: false, connector: false, servers: servers.env });
      const consumer = await sensors.consumer();
      await sensors.produce(created(1, 1000));
      await until("the first are committed", async () => (await sensors.committed()) === 1000);
      const rss = async (): Promise<number> => (await consumer.metrics()).process_resident_memory_bytes ?? 0;
      const before = await rss();

      servers.signal("kafka", "SIGSTOP");
      await delay(20_000);
      assert.match(await healthz(consumer), /^200 ok$/m);
      servers.signal("kafka", "SIGCONT");
      await sensors.produce(created(1001, 1000));
      await arrived(sensors, 2000, consumer);

      await sensors.produce(created(2001, 1000));
      await servers.kill("kafka");
      await delay(15_000);
      assert.ok((await rss()) - before < 40 * 2 ** 20);
      // One that comes while Kafka is away waits as well; and another can be stopped.
      const [late, polite] = [1, 2].map(() => sensors.shop.start(consumerScript));
      await Promise.all([late, polite].map((one) => one?.line(/step=kafka message="Failed to connect/)));
      polite?.child.kill("SIGTERM");
      assert.ok(late && polite);
      const stopped = await ending(polite, 60);
      assert.equal(stopped.code, 0, stopped.stderr);
      await servers.start("kafka");
      await late.line(/step=assigned/);
      await arrived(sensors, 3000, consumer);
      await sensors.produce(created(3001, 1000));
      await arrived(sensors, 4000, consumer);
      assert.equal((await sensors.deadLetters()).length, 0);
      for (const one of [consumer, late]) one.child.kill("SIGTERM");
      for (const one of [consumer, late]) assert.equal((await ending(one, 10)).code, 0);
    });

    test("Kafka away for longer than a minute, hanging or killed: exit 1, nothing committed; started again, it ends exact", async () => {
      await using sensors = await createSensors({ bigquery: false, connector: false, servers: servers.env });
      const away = /^error: Kafka \(KAFKA_BROKERS\) has not answered for 60 s\. .* Next: make doctor$/m;
      let consumer: Process = await sensors.consumer();
      const ends = async (run: Process): Promise<void> => {
        const { code, stderr } = await ending(run, 120);
        assert.equal(code, 1, stderr);
        assert.match(stderr, away);
      };
      for (const [round, begin, end] of [
        [1, () => servers.signal("kafka", "SIGSTOP"), () => servers.signal("kafka", "SIGCONT")],
        [2, () => servers.kill("kafka"), () => servers.start("kafka")],
      ] as const) {
        await sensors.produce(created((round - 1) * 1000 + 1, 1000));
        await arrived(sensors, round * 1000, consumer);
        await begin();
        const starting = sensors.shop.start(consumerScript);
        await Promise.all([ends(consumer), ends(starting)]);
        await end();
        consumer = await restarted(sensors);
      }
      await sensors.produce(created(2001, 1000));
      await arrived(sensors, 3000, consumer);
      assert.equal((await sensors.deadLetters()).length, 0);
      await stop(consumer);
    });

    test("SIGTERM while Kafka is away exits 0 within 10 s", async () => {
      await using sensors = await createSensors({ bigquery: false, connector: false, servers: servers.env });
      const consumers = [await sensors.consumer(), await sensors.consumer()];
      await sensors.produce(created(1, 100));
      await until("the first are committed", async () => (await sensors.committed()) === 100);
      servers.signal("kafka", "SIGSTOP");
      await stop(consumers[0] as Consumer);
      servers.signal("kafka", "SIGCONT");
      await servers.kill("kafka");
      await stop(consumers[1] as Consumer);
      await servers.start("kafka");
    });
  });

  suite("drift", { concurrency: 1 }, () => {
    let sensors: Sensors;
    before(async () => {
      sensors = await createSensors({ connector: false });
      await sensors.produce(created(1, 3));
    });
    after(() => sensors[Symbol.asyncDispose]());
    /** The consumer exits with 2, having said all of `says`, and has read nothing. */
    const stops = async (says: (string | RegExp)[]): Promise<void> => {
      const { code, stderr } = await ending(sensors.shop.start(consumerScript, { UNTIL: "caught-up" }));
      for (const part of says)
        assert.ok(typeof part === "string" ? stderr.includes(part) : part.test(stderr), `no "${part}" in:\n${stderr}`);
      assert.equal(code, 2, stderr);
      assert.doesNotMatch(stderr, /step=assigned|^\s+at /m);
      assert.equal(await sensors.committed(), 0);
    };
    const next = `Change the source back, or sensor_readings by a new file in schemas/clickhouse; schemas/README.md, "When the schema changes".`;
    const expected = (column: string, type: string, found: string): string =>
      `  column public.sensor_readings.${column}: expected one for ${type} (ClickHouse's sensor_readings), found ${found}`;

    test("drift at the source stops the consumer before it ingests: columns that are gone or of another type, a replica identity that is not full", async () => {
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

    test("a file of schemas/clickhouse that was not applied, or was edited since, stops the consumer; migrate applies the one, and refuses the other", async () => {
      const { shop } = sensors;
      const file = "schemas/clickhouse/007_sensor_dead_letters_view.sql";
      const forget = async (column: string): Promise<void> =>
        void (await shop.clickhouse.command({
          query: `ALTER TABLE etl_migrations ${column} WHERE file = '007_sensor_dead_letters_view.sql'`,
          clickhouse_settings: { mutations_sync: "2" },
        }));
      await forget("DELETE");
      const missing = `${file} was not applied to ClickHouse's database ${shop.env.CLICKHOUSE_DATABASE} (CLICKHOUSE_DATABASE). Run: make migrate`;
      await stops([missing]);
      for (const [step, env] of [
        ["would-apply", { DRY_RUN: "1" }],
        ["apply", {}],
      ] as const) {
        const { stderr } = await shop.succeed(migrate, env);
        assert.deepEqual(stderr.match(/step=(would-)?apply what=.*$/gm), [`step=${step} what=${file}`]);
        if (step === "would-apply") await stops([missing]);
      }
      assert.doesNotMatch((await shop.succeed(migrate)).stderr, /apply what=/);

      await forget("UPDATE sha256 = 'of another text'");
      const edited = new RegExp(
        `${file} was applied at \\S+ \\S+ and has been edited since\\. Run: git checkout ${file}, and put the change into a new file`,
      );
      await stops([edited]);
      const { code, stderr } = await shop.run(migrate);
      assert.equal(code, 2, stderr);
      assert.match(stderr, edited);
      await forget("DELETE");
      await shop.succeed(migrate);
    });

    test("a view that somebody has dropped stops the consumer, which would lose what it makes; what it says brings it back", async () => {
      const { shop } = sensors;
      await shop.clickhouse.command({ query: "DROP VIEW sensor_dead_letters_view SYNC" });
      await stops([
        `ClickHouse's database ${shop.env.CLICKHOUSE_DATABASE} has lost sensor_dead_letters_view, which schemas/clickhouse made. Run there: DROP TABLE etl_migrations, then: make migrate`,
      ]);
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
