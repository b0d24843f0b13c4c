/**
 * sensors when anything of it is killed, anywhere: every change is in ClickHouse once, and the latest wins.
 *   SEED=…  a campaign's seed, as it was printed    SOAK=1  fifty kills
 */
import assert from "node:assert/strict";
import { Readable } from "node:stream";
import { pipeline } from "node:stream/promises";
import { after, before, suite, test } from "node:test";
import { setTimeout as delay } from "node:timers/promises";
import { createProxy, type Fault, type Gate, type HttpProxy, hold, kill, pass, reach, stop, withhold } from "../lib/faults.ts";
import { random, seed } from "../lib/random.ts";
import { assertExact, assertSame, createSensors, type Sensors, startWriters } from "../lib/sensors.ts";
import { createServers, type SensorsServer } from "../lib/servers.ts";
import { type Process, until } from "../lib/shop.ts";

const soak = process.env.SOAK === "1";

/** ClickHouse behind a proxy. `next` is what happens to the next inserts of messages, so many of them; all else passes. */
type InsertProxy = HttpProxy & {
  next(fault: Fault, times?: number): void;
  /** Resolves once ClickHouse has answered the last of these, whose sender may be gone by then. */
  answered(): Promise<void>;
};

async function createInsertProxy(sensors: Sensors): Promise<InsertProxy> {
  const proxy = await createProxy(sensors.shop.env.CLICKHOUSE_URL);
  let [next, left, last] = [pass, 0, Promise.resolve()];
  proxy.fault(/^POST/, async (exchange) => {
    const { searchParams } = new URL(exchange.request.url ?? "", proxy.url);
    const inserts = searchParams.get("query")?.startsWith("INSERT INTO sensor_landing");
    if (!inserts || left-- <= 0) return await pass(exchange);
    last = next(exchange).catch(() => {}); // there is nobody to reply to
    await last;
  });
  return Object.assign(proxy, {
    next: (fault: Fault, times = 1) => {
      [next, left] = [fault, times];
    },
    answered: () => last,
  });
}

suite("sensors killed", { concurrency: true }, () => {
  test("at random points, as are Kafka, Connect and ClickHouse, while applications write: exact, and the consumers that live wait it out", async (t) => {
    const below = random(seed);
    await using servers = await createServers();
    await using sensors = await createSensors({ bigquery: false, servers: servers.env });
    const consumers: Process[] = [await sensors.consumer(), await sensors.consumer()];
    const writers = startWriters(sensors, seed);

    const kinds = ["consumer", "clickhouse", "kafka", "connect"] as const;
    const victims = Array.from({ length: soak ? 50 : 4 }, (_, n) => ({ victim: kinds[n % 4] ?? "consumer", at: below(1000) }));
    for (const { victim } of victims.sort((a, b) => a.at - b.at)) {
      await delay(below(2000));
      const [down, which] = [below(1000), below(2)];
      const at = writers.committed();
      if (victim === "consumer") {
        await kill(consumers[which] as Process);
        consumers[which] = sensors.shop.start("scripts/sensors.ts"); // the group waits for the session of the killed one
        await consumers[which]?.line(/step=serving/); // until then it does not wait for ClickHouse: systemd starts it again
      } else {
        await servers.kill(victim satisfies SensorsServer);
        await delay(down);
        await servers.start(victim);
      }
      t.diagnostic(`${victim} killed after ${at} transactions`);
    }
    await writers.stop();
    await assertExact(sensors, 90);
    t.diagnostic(`${writers.committed()} transactions`);
    for (const consumer of consumers) await stop(consumer);
  });

  test("rows of a COPY, and of one INSERT, all arrive, whatever restarts the connector among them", async (t) => {
    const below = random(seed);
    await using sensors = await createSensors({ bigquery: false });
    const { shop } = sensors;
    const consumer = await sensors.consumer();
    const name = `etl-${shop.env.CLICKHOUSE_DATABASE}-sensor_readings`;
    const restart = new URL(`/connectors/${name}/restart?includeTasks=true`, shop.env.CONNECT_URL);
    let [restarts, over] = [0, false];
    const restarting = (async () => {
      for (; !over; await delay(300 + below(2000))) {
        await fetch(restart, { method: "POST" });
        restarts += 1;
      }
    })();
    let id = 1;
    for (const end = performance.now() + (soak ? 300_000 : 15_000); performance.now() < end; id += 200) {
      const lines = Array.from({ length: 100 }, (_, n) => `${id + n}\ts\tcopied\t1\t2024-01-01Z\n`).join("");
      const copy = "copy sensor_readings (id, sensor_id, metric, value, recorded_at) from stdin";
      await shop.admin.begin(async (sql) => {
        await pipeline(Readable.from([lines]), await sql.unsafe(copy).writable());
        await sql`
          insert into sensor_readings (id, sensor_id, metric, value, recorded_at)
          select n, 's', 'inserted', 1, '2024-01-01Z' from generate_series(${id + 100}::int, ${id + 199}::int) n`;
      });
      await delay(below(20));
    }
    over = true;
    await restarting;
    t.diagnostic(`${restarts} restarts among ${id - 1} rows`);
    await sensors.connector();
    await assertExact(sensors, 120);
    await stop(consumer);
  });

  suite("at one point", { concurrency: 1 }, () => {
    const rows = 300;
    let sensors: Sensors;
    before(async () => {
      sensors = await createSensors({ bigquery: false });
      await sensors.shop.admin`
        insert into sensor_readings (id, sensor_id, metric, value, recorded_at)
        select i, 'S' || i % 3, 'm', 0, '2024-01-01Z' from generate_series(1, ${rows}::int) i`;
      const consumer = await sensors.consumer();
      await assertExact(sensors);
      await stop(consumer);
    });
    after(() => sensors[Symbol.asyncDispose]());
    let value = 0;
    /** Gives these rows the next value, and moves their sorting keys. */
    const update = () => {
      value += 1;
      return sensors.shop
        .admin`update sensor_readings set value = ${value}, sensor_id = 'S' || (id + ${value}::int) % 3 where metric = 'm'`;
    };
    const offsets = async (): Promise<bigint[]> => (await sensors.state()).map(({ committed }) => committed);
    /** Starts a consumer by way of `proxy` after an update, and waits until its insert is at the gate. */
    const held = async (proxy: InsertProxy, gate: Gate, times = 1): Promise<Process> => {
      const { count } = await update();
      const lag = async (): Promise<number> => (await sensors.state()).reduce((sum, partition) => sum + partition.lag, 0);
      await until("the update is in the topic", async () => (await lag()) >= count);
      proxy.next(gate, times);
      const consumer = sensors.shop.start("scripts/sensors.ts", { CLICKHOUSE_URL: proxy.url });
      await reach(consumer, gate.reached);
      return consumer;
    };

    for (const { when, gate, inserted } of [
      { when: "before its insert has reached ClickHouse", gate: hold(), inserted: false },
      { when: "between its insert and its commit", gate: withhold(), inserted: true },
    ])
      test(`${when}: nothing is committed, the next consumer inserts the same batch again, exact`, async () => {
        const before = await offsets();
        await using proxy = await createInsertProxy(sensors);
        await kill(await held(proxy, gate, 3)); // there may be one of each partition
        assert.deepEqual(await offsets(), before, "committed"); // the lag grows by canaries
        const arrived = (await sensors.readings()).filter((row) => row.value === String(value)).length;
        assert.equal(arrived > 0, inserted, "inserted");
        const next = await sensors.consumer();
        await assertExact(sensors);
        assert.match(await stop(next), new RegExp(` step=done rows=${rows + 1} `)); // and what shows that all is there
        gate.release();
      });

    test("its insert that reaches ClickHouse late, after newer changes, puts no old row back", async () => {
      const late = hold();
      await using proxy = await createInsertProxy(sensors);
      await kill(await held(proxy, late));
      await update();
      await sensors.shop.admin`delete from sensor_readings where id % 10 = 0`;
      const next = await sensors.consumer();
      await assertExact(sensors);
      late.release();
      await proxy.answered();
      assertSame(await sensors.readings(), await sensors.source());
      await stop(next);
    });

    test("not, but frozen in the middle of a batch until another has taken its partitions and gone on: once it wakes, exact", async () => {
      await using proxy = await createInsertProxy(sensors);
      const late = hold();
      const frozen = await held(proxy, late);
      frozen.child.kill("SIGSTOP");
      const other = await sensors.consumer();
      await update();
      await assertExact(sensors);
      const committed = await offsets();
      frozen.child.kill("SIGCONT");
      late.release();
      await proxy.answered();
      await other.line(/step=assigned .* partitions=(?!0,1,2)/); // it is a member again
      (await offsets()).forEach((offset, at) => void assert.ok(offset >= (committed[at] ?? 0n), "the offsets went back"));
      assertSame(await sensors.readings(), await sensors.source());
      await update();
      await assertExact(sensors);
      await Promise.all([stop(frozen), stop(other)]);
    });

    test("not, but joined by a second consumer in the middle of a batch, and stopped in the middle of one: exact", async (t) => {
      const [joining, leaving] = [hold(), hold()];
      await using proxy = await createInsertProxy(sensors);
      const slow = await held(proxy, joining);
      const writers = startWriters(sensors, seed);
      const other = await sensors.consumer();
      joining.release();
      t.diagnostic(await slow.line(/step=assigned .* partitions=(?!0,1,2)/));
      proxy.next(leaving);
      await reach(slow, leaving.reached);
      const ended = stop(slow);
      await slow.line(/step=stopping/);
      leaving.release();
      await ended;
      const before = writers.committed();
      await until("the applications have gone on", () => writers.committed() > before + 50);
      await writers.stop();
      await assertExact(sensors);
      assert.match(await stop(other), /step=assigned .* partitions=0,1,2$/m);
    });
  });
});
