// Epochs: a topic whose offsets no longer order the changes stops the consumer, and a rebuild from a fresh snapshot repairs it,
// wherever it is killed. And the connector, by which the snapshot comes.
import assert from "node:assert/strict";
import { after, before, suite, test } from "node:test";
import { setTimeout as delay } from "node:timers/promises";
import type { Message } from "kafkajs";
import postgres from "postgres";
import { type PartitionState, takeEpoch } from "../../shared/sensors/epoch.ts";
import { answer, createProxy, ending, hold, pass, reach, stop } from "../lib/faults.ts";
import { random } from "../lib/random.ts";
import { type Consumer, created, createSensors, endsWith, type Sensors, succeeds } from "../lib/sensors.ts";
import { type Shop, until } from "../lib/shop.ts";
import type { Env } from "../stack/env.ts";

const soak = process.env.SOAK === "1";
const consumerScript = "scripts/sensors.ts";
const resnapshot = "scripts/ops/resnapshot.ts";
const swap = "scripts/ops/swap-readings.ts";
const connector = "scripts/ops/connector.ts";

const fails = (shop: Shop, script: string, code: number, says: (string | RegExp)[], env: Env = {}): Promise<string> =>
  endsWith(shop.start(script, env), code, says);

const insert = async ({ shop }: Sensors, first: number, last: number, value = 1): Promise<void> =>
  void (await shop.admin`
    insert into sensor_readings (id, sensor_id, metric, value, recorded_at)
    select i, 'S' || i % 3, 'temp', ${value}::float8, '2024-01-01Z'::timestamptz + i * interval '1 s'
    from generate_series(${first}::int, ${last}::int) i`);

/** Inserts, each row's in the partition of its id. */
const spread = (first: number, count: number): Message[] =>
  created(first, count).map((message, index) => ({ ...message, partition: (first + index) % 3 }));

/** Holds the connector's slot as a task does that Connect gave up waiting for. */
async function holdSlot({ shop }: Sensors): Promise<AsyncDisposable> {
  const slot = `etl_${shop.env.CLICKHOUSE_DATABASE}`;
  const active = async (): Promise<boolean | undefined> =>
    (await shop.admin`select active from pg_replication_slots where slot_name = ${slot}`)[0]?.active;
  await until("the stopped connector's slot is free", async () => (await active()) === false);
  const url = shop.env.REPLICATION_DATABASE_URL ?? "";
  const held = postgres(url, { max: 1, fetch_types: false, connection: { replication: "database" } });
  const options = `proto_version '1', publication_names 'etl_sensors'`;
  const stream = await held.unsafe(`START_REPLICATION SLOT ${slot} LOGICAL 0/0 (${options})`).writable();
  stream.on("error", () => {});
  await until("another session holds the slot", active);
  return { [Symbol.asyncDispose]: () => held.end({ timeout: 0 }) };
}

const rebuildOf = ({ shop }: Sensors): string => `${shop.env.CLICKHOUSE_DATABASE}_rebuild`;

/** The README's steps 3 and 4: with all consumers stopped, after make resnapshot. */
async function rebuild(sensors: Sensors): Promise<void> {
  await sensors.catchUp({ CLICKHOUSE_DATABASE: rebuildOf(sensors) });
  await sensors.shop.succeed(swap);
}

async function assertEqual(sensors: Sensors): Promise<void> {
  await sensors.drained();
  assert.deepEqual(await sensors.readings(), await sensors.source());
}

const remedy =
  /Nothing was inserted: rows could be missing, or lose to older ones\. Stop all consumers, then run: make resnapshot \(a new epoch, and the table from a fresh snapshot; scripts\/README\.md, "Rebuilding the table"\)/;

/** Deletes the topic and creates it again, empty. */
async function remakeTopic({ admin, topic }: Sensors): Promise<void> {
  await admin.deleteTopics({ topics: [topic] });
  await until("the topic is gone", async () => !(await admin.listTopics()).includes(topic));
  // Where it is there already, an attempt whose answer failed has made it.
  const configEntries = [{ name: "max.message.bytes", value: "67108864" }];
  const topics = [{ topic, numPartitions: 3, replicationFactor: 1, configEntries }];
  await until("the topic is created again", () => succeeds(admin.createTopics({ topics, waitForLeaders: true })));
}

suite("sensors", { concurrency: 4 }, () => {
  test("a topic that was created again stops the consumer; after a resnapshot nothing loses to old versions, and deleted rows are gone", async () => {
    await using sensors = await createSensors({ bigquery: false });
    const { shop, topic } = sensors;
    await insert(sensors, 1, 300);
    const first = await sensors.consumer();
    await sensors.equal();
    // Old versions that are higher than those that come with the new topic's offsets.
    for (let value = 2; value < 12; value++) await shop.admin`update sensor_readings set value = ${value}`;
    await assertEqual(sensors);
    const before = await sensors.readings();
    await remakeTopic(sensors);
    await shop.admin`update sensor_readings set value = 100 where id <= 100`;
    await shop.admin`delete from sensor_readings where id > 250`;
    const again = new RegExp(`^error: .*partition \\d of topic ${topic}.*the topic was created again`, "m");
    await endsWith(first, 2, [again, remedy]);
    await fails(shop, consumerScript, 2, [again, remedy]);
    // Deleting the topic has deleted the group's offsets; the check is not by these alone.
    const { SENSORS_GROUP: groupId = "" } = shop.env;
    const zero = [0, 1, 2].map((partition) => ({ partition, offset: "0" }));
    await sensors.admin.setOffsets({ groupId, topic, partitions: zero });
    const behind = /^error: partition \d of topic .* ends at offset \d+, but was inserted up to offset \d+: the topic was created again\./m;
    await fails(shop, consumerScript, 2, [behind, remedy], { UNTIL: "caught-up" });
    assert.deepEqual(await sensors.readings(), before);
    assert.deepEqual(await sensors.deadLetters(), []);

    await shop.succeed(resnapshot);
    await rebuild(sensors);
    assert.deepEqual(await sensors.readings(), await sensors.source());
    const consumer = await sensors.consumer();
    await shop.admin`update sensor_readings set value = value + 1`;
    await assertEqual(sensors);
    await stop(consumer);
  });

  test("a topic that gets another partition stops the consumer that runs", async () => {
    await using sensors = await createSensors({ bigquery: false, connector: false });
    const { admin, topic } = sensors;
    const consumer = await sensors.consumer();
    await sensors.produce(spread(0, 30));
    await until("they are there, and committed", async () => (await sensors.committed()) === 30);
    await admin.createPartitions({ topicPartitions: [{ topic, count: 4 }] });
    for (let id = 100; consumer.child.exitCode === null; id++) {
      assert.ok(id < 300, "its metadata is half a minute old at most");
      await sensors.produce(spread(id, 1));
      await delay(200);
    }
    await endsWith(consumer, 2, [/has 4 partitions, and had 3 when epoch 1 began/, remedy]);
  });

  test("messages that expired unread, and an offset that somebody set ahead, stop the consumer and are named; the lag counts them", async () => {
    await using sensors = await createSensors({ bigquery: false, connector: false });
    const { shop, topic, admin } = sensors;
    const { SENSORS_GROUP: groupId = "", CLICKHOUSE_DATABASE: database = "" } = shop.env;
    // A consumer that joins while another commits a partition for the first time does not take its offset for a lost one.
    await takeEpoch(shop.admin, topic, database, sensors.state);
    await sensors.produce(spread(1, 30));
    const joining = async (): Promise<PartitionState[]> => {
      const state = await sensors.state();
      await sensors.catchUp();
      return state;
    };
    assert.equal(await takeEpoch(shop.admin, topic, database, joining), 1);
    await sensors.produce(spread(100, 30));
    const set = (offset: string) => admin.setOffsets({ groupId, topic, partitions: [{ partition: 1, offset }] });
    await set("20");
    const ahead = `partition 1 of topic ${topic} was inserted up to offset 10, but the group's offset is 20: somebody set it ahead`;
    await fails(shop, consumerScript, 2, [ahead, remedy], { UNTIL: "caught-up" });
    await set("10");
    await admin.deleteTopicRecords({ topic, partitions: [{ partition: 2, offset: "15" }] });
    for (const { lag } of await sensors.state()) assert.equal(lag, 10);
    const expired = `partition 2 of topic ${topic} begins at offset 15, but was inserted up to offset 10: messages expired unread (retention.ms)`;
    await fails(shop, consumerScript, 2, [expired, remedy], { UNTIL: "caught-up" });
    assert.equal((await sensors.readings()).length, 30);
  });

  test("messages that expire while one is at work, which are all that there is, do not let it end as caught up", async () => {
    await using sensors = await createSensors({ bigquery: false, connector: false, partitions: 1 });
    const { shop, topic, admin } = sensors;
    for (let first = 1; first < 4000; first += 1000) await sensors.produce(created(first, 1000, 2400)); // more than one fetch
    await using proxy = await createProxy(shop.env.CLICKHOUSE_URL);
    const insert = hold();
    proxy.fault(/^POST/, (exchange) => (/INSERT.INTO.sensor_landing/.test(exchange.request.url ?? "") ? insert : pass)(exchange));
    const run = shop.start(consumerScript, { UNTIL: "caught-up", CLICKHOUSE_URL: proxy.url });
    await reach(run, insert.reached);
    await delay(2000); // it has seen where the topic ends
    await admin.deleteTopicRecords({ topic, partitions: [{ partition: 0, offset: "-1" }] });
    insert.release();
    const { code, stderr } = await ending(run, 60);
    assert.match(stderr, /^error: partition 0 of topic .* begins at offset 4000, but was inserted up to offset \d+: messages expired/m);
    assert.equal(code, 2, stderr);
  });

  test("a rebuild: readers see a whole table at every instant, others are refused meanwhile, a swap done twice is done once", async () => {
    await using sensors = await createSensors({ bigquery: false });
    const { shop, topic } = sensors;
    const { CLICKHOUSE_DATABASE: database = "" } = shop.env;
    await insert(sensors, 1, 2000);
    const consumer = await sensors.consumer();
    await sensors.equal();
    const running = new RegExp(
      `the group ${shop.env.SENSORS_GROUP} has 1 consumers \\(etl-sensors at .+\\)\\. Stop them first: systemctl stop etl-sensors`,
    );
    for (const script of [resnapshot, swap]) await fails(shop, script, 2, [running]);
    await stop(consumer);
    await fails(shop, swap, 2, [`there is no rebuild of ${topic} to swap in. Run: make resnapshot`]);

    // Readers, all the while, and close upon one another while the tables are swapped.
    const counts = new Set<number>();
    let reading = true;
    let pause = 50;
    const readers = (async () => {
      while (reading) {
        const query = "SELECT count() AS count FROM sensor_readings FINAL";
        counts.add(Number((await shop.select<{ count: string }>(query))[0]?.count));
        await delay(pause);
      }
    })();
    await using _ended = {
      [Symbol.asyncDispose]: async () => {
        reading = false;
        await readers;
      },
    };
    // While the connector is stopped: what nobody tells Kafka of. And a TRUNCATE, which is dead-lettered.
    const url = new URL(`/connectors/etl-${database}-sensor_readings`, shop.env.CONNECT_URL);
    assert.equal((await fetch(`${url}/stop`, { method: "PUT" })).status, 204);
    await shop.admin`truncate sensor_readings`;
    await insert(sensors, 501, 2000, 7);
    await using _held = await holdSlot(sensors);
    await shop.succeed(resnapshot);
    const mid = `epoch 2 of ${topic} belongs to database ${rebuildOf(sensors)}, not ${database}: the table is being rebuilt there. Next: make swap-readings`;
    await fails(shop, consumerScript, 2, [mid]);
    await fails(shop, "scripts/ops/verify.ts", 2, [mid], { PIPELINE: "sensors" });
    await insert(sensors, 3001, 3010);
    await sensors.catchUp({ CLICKHOUSE_DATABASE: rebuildOf(sensors) });
    assert.equal((await sensors.readings()).length, 2000);
    // As a snapshot leaves it that was interrupted, and begun again after rows were deleted: the proof finds them.
    const extra = `INSERT INTO ${rebuildOf(sensors)}.sensor_readings (id, sensor_id) VALUES (-7, 'deleted'), (-8, 'deleted')`;
    await shop.clickhouse.command({ query: extra });
    const differs = [`2 rows of ${rebuildOf(sensors)}.sensor_readings differ:`, "  extra        id=-8", "  extra        id=-7"];
    await fails(shop, swap, 1, [...differs, "Nothing was swapped. Next: make resnapshot"]);
    assert.equal((await sensors.readings()).length, 2000);
    await shop.succeed(resnapshot);
    // A change that ClickHouse cannot hold is a dead letter, and no difference; what is not inserted yet is inserted by the swap.
    await shop.admin`insert into sensor_readings (id, recorded_at) values (4000, 'infinity')`;
    pause = 1;
    const { stderr } = await shop.succeed(swap);
    await shop.admin`delete from sensor_readings where id = 4000`;
    assert.ok(
      stderr.includes(`step=done swapped=${database}.sensor_readings epoch=3 before=${rebuildOf(sensors)}.sensor_readings`),
      stderr,
    );
    reading = false;
    await readers;
    const after = (await sensors.readings()).length;
    assert.ok(after >= 1500);
    assert.ok(
      [...counts].every((count) => count >= 1500),
      `${[...counts]}`,
    );
    await fails(shop, swap, 2, [`there is no rebuild of ${topic} to swap in`]);
    assert.equal((await sensors.readings()).length, after);
    const again = await sensors.consumer();
    await assertEqual(sensors);
    await stop(again);
    // Metadata that was restored from before the swap: the epoch has a number that the table of the readers has already.
    await shop.admin`update etl.topics set epoch = 2 where topic = ${topic}`;
    assert.equal((await fetch(`${url}/stop`, { method: "PUT" })).status, 204);
    await shop.admin`delete from sensor_readings where id % 2 = 0`;
    await shop.succeed(resnapshot);
    await rebuild(sensors);
    assert.deepEqual(await sensors.readings(), await sensors.source());
    // Messages of older epochs would bring back what was deleted while the connector was stopped.
    const { SENSORS_GROUP: groupId = "" } = shop.env;
    await sensors.admin.setOffsets({ groupId, topic, partitions: [{ partition: 1, offset: "3" }] });
    const back = /partition 1 of topic .* has this epoch from \d+ on, but the group's offset is 3: somebody set it back/;
    await fails(shop, consumerScript, 2, [back, remedy]);
  });

  test(`a resnapshot and a swap that are killed anywhere and run again end in the source's table`, async () => {
    await using sensors = await createSensors({ bigquery: false });
    const { shop } = sensors;
    const below = random();
    await insert(sensors, 1, 500);
    await sensors.catchUp();
    await shop.admin`delete from sensor_readings where id % 2 = 0`;
    await shop.admin`update sensor_readings set value = 9`;
    const whole = performance.now();
    await shop.succeed(resnapshot);
    const span = performance.now() - whole;
    const killed: string[] = [];
    const killAt = async (script: string, ms: number): Promise<void> => {
      const run = shop.start(script);
      await Promise.race([run.ended, delay(ms)]);
      run.child.kill("SIGKILL");
      const { stderr, signal } = await run.ended;
      killed.push(`${ms} ms of ${Math.round(span)}: ${signal} ${stderr.match(/step=\w+/g)?.at(-1)}`);
    };
    for (let kills = 0; kills < (soak ? 30 : 3); kills++) await killAt(resnapshot, below(span));
    const before = await sensors.readings();
    const busy = /the group \w+ has 1 consumers \(etl-resnapshot at .*one that was killed is gone after 30 s/; // it has set the group's offsets
    await until("a resnapshot is done", async () => {
      const { code, stderr } = await shop.run(resnapshot);
      if (code) assert.match(stderr, busy);
      return code === 0;
    });
    assert.deepEqual(await sensors.readings(), before, killed.join("\n"));
    await sensors.catchUp({ CLICKHOUSE_DATABASE: rebuildOf(sensors) });
    for (let kills = 0; kills < (soak ? 30 : 3); kills++) await killAt(swap, 200 + below(6000));
    // The consumer of a swap that was killed ends by itself.
    await until("a swap is done", async () => {
      const { code, stderr } = await shop.run(swap);
      if (code) assert.match(stderr, /there is no rebuild|the group \w+ has 1 consumers/);
      return code === 0 || stderr.includes("there is no rebuild");
    });
    assert.deepEqual(await sensors.readings(), await sensors.source(), killed.join("\n"));
    const consumer = await sensors.consumer();
    await shop.admin`update sensor_readings set value = value + 1`;
    await assertEqual(sensors);
    await stop(consumer);
  });

  suite("the connector", { concurrency: 1 }, () => {
    let sensors: Sensors;
    let consumer: Consumer;
    before(async () => {
      sensors = await createSensors({ bigquery: false });
      await insert(sensors, 1, 1000);
      consumer = await sensors.consumer();
      await assertEqual(sensors);
    });
    after(() => sensors[Symbol.asyncDispose]());

    test("make connector may be repeated, waits out a rebalance, and says what is wrong with Connect, Kafka and the source", async () => {
      const { shop } = sensors;
      const { REPLICATION_DATABASE_URL = "", SENSORS_TOPIC: topic = "", CLICKHOUSE_DATABASE: prefix = "" } = shop.env;
      const name = `etl-${prefix}-sensor_readings`;
      const done = `step=done connector=${name} slot=etl_${prefix} topic=${topic} state=RUNNING`;
      const again = await shop.succeed(connector);
      assert.ok(again.stderr.includes(done), again.stderr);
      assert.doesNotMatch(again.stderr, /step=created/);
      await assertEqual(sensors); // no second snapshot, which would have stopped the consumer

      // The words of Connect while its workers share out the work anew, though in another form.
      await using proxy = await createProxy(shop.env.CONNECT_URL);
      const [put, get] = [/^PUT .*\/config$/, /^GET .*\/status$/];
      for (const kind of [put, get]) {
        proxy.fault(kind, answer(409), 1);
        proxy.fault(kind, answer(500, { reason: "Request cannot be completed because a rebalance is expected" }), 1);
      }
      await shop.succeed(connector, { CONNECT_URL: proxy.url });
      const asked = (kind: RegExp): number => proxy.requests.filter((line) => kind.test(line)).length;
      assert.equal(asked(put), 3);
      assert.ok(asked(get) >= 3);

      const plugin = { class: "io.debezium.connector.postgresql.PostgresConnector", version: "3.3.2.Final" };
      proxy.fault(/^GET .*connector-plugins/, async ({ response }) => void response.end(JSON.stringify([plugin])));
      const old = "Kafka Connect (CONNECT_URL) has Debezium 3.3.2.Final for Postgres; the least is 3.6.1. Install it at each worker";
      for (const script of [connector, consumerScript]) await fails(shop, script, 2, [old], { CONNECT_URL: proxy.url });
      const checked = await shop.run("scripts/ops/doctor.ts", { PIPELINE: "sensors", CONNECT_URL: proxy.url });
      assert.ok(checked.stdout.includes(`FAIL  sensors: Debezium's version: ${old}`), checked.stdout);

      const password = REPLICATION_DATABASE_URL.replace(/:[^:@/]+@/, ":HUSH@");
      for (const [variables, code, says] of [
        [{ CONNECT_URL: "http://127.0.0.1:1" }, 1, /^error: 127\.0\.0\.1:1 \(CONNECT_URL\) does not answer: .+ make up$/m],
        [{ REPLICATION_DATABASE_URL: password }, 1, /^error: .*password authentication failed for user "etl_replicator"/m],
        [{ SENSORS_TOPIC: "shop.readings" }, 2, /SENSORS_TOPIC shop\.readings must end with \.public\.sensor_readings/],
        [{ KAFKA_BROKERS: "127.0.0.1:1" }, 1, /^error: no broker of KAFKA_BROKERS \(127\.0\.0\.1:1\) answers: .* make up$/m],
      ] as const)
        await fails(shop, connector, code, [says], variables);

      await shop.admin`alter publication etl_sensors drop table public.etl_heartbeat`;
      await sensors.drained(); // the canaries that are under way, too: at each of them the consumer looks at the source
      await shop.admin`alter table sensor_readings replica identity default`;
      await shop.admin`alter table sensor_readings disable trigger etl_row_by_row`;
      await fails(shop, connector, 2, [
        "the source is not ready for Debezium:",
        "  table sensor_readings is not REPLICA IDENTITY FULL",
        "  table sensor_readings lacks the trigger etl_row_by_row: rows of a COPY would be lost where Debezium restarts among them",
        "  publication etl_sensors does not exist, or lacks public.etl_heartbeat",
        "Run sql/replication.sql in that database as an administrator, then: make connector",
      ]);
      await shop.admin`alter table sensor_readings replica identity full`;
      await shop.admin`alter table sensor_readings enable trigger etl_row_by_row`;
      await shop.admin`alter publication etl_sensors add table public.etl_heartbeat`; // last
    });

    test("a second snapshot within an epoch, after Connect has lost its offsets, stops the consumer; a resnapshot repairs what it left", async () => {
      const { shop } = sensors;
      const url = `${shop.env.CONNECT_URL}/connectors/etl-${shop.env.CLICKHOUSE_DATABASE}-sensor_readings`;
      await fetch(`${url}/stop`, { method: "PUT" });
      await until("its offsets are deleted", async () => (await fetch(`${url}/offsets`, { method: "DELETE" })).ok);
      const slot = `etl_${shop.env.CLICKHOUSE_DATABASE}`;
      await until("its slot is gone", () => succeeds(shop.admin`select pg_drop_replication_slot(${slot})`));
      await shop.admin`delete from sensor_readings where id > 700`;
      await shop.succeed(connector);
      const second = /a second snapshot \(WAL position \d+, the first: \d+\) has begun in epoch 1 of .* then run: make resnapshot/;
      await endsWith(consumer, 2, [second]);
      assert.equal((await sensors.readings()).filter(({ metric }) => metric === "temp").length, 1000);
      await shop.succeed(resnapshot);
      await rebuild(sensors);
      assert.deepEqual(await sensors.readings(), await sensors.source());
    });
  });
});
