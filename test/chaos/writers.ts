/**
 * The shop's applications: they insert, update, delete and move rows of orders, users and sensor_readings, in transactions of one to
 * four statements, some held open, some rolled back, until they are stopped. They outlive the database's deaths.
 */
import { Readable } from "node:stream";
import { pipeline } from "node:stream/promises";
import { setTimeout as delay } from "node:timers/promises";
import type { Sql, TransactionSql } from "postgres";
import { random } from "../lib/random.ts";

export interface Writers {
  count: { committed: number; "rolled back": number; "cut off": number };
  stop(): Promise<void>;
}

/** The database went away, another transaction had the row, or a key was taken. */
const expected = /^(CONNECTION_|CONNECT_|ECONN|EPIPE|57P|08|25P03|40|23505)/;

export function startWriters(connect: (application: string) => Sql, seed: number, count: number): Writers {
  let stopped = false;
  const counts = { committed: 0, "rolled back": 0, "cut off": 0 };
  const write = async (number: number): Promise<void> => {
    const below = random(seed * 31 + number);
    let sql = connect(`writer ${number}`);
    let next = number * 1_000_000; // each writer's own new keys
    const hold = async (): Promise<void> => {
      if (below(6) === 0) await delay(below(4000));
    };
    while (!stopped) {
      try {
        const transaction = sql.begin(async (tx) => {
          await hold();
          for (let left = 1 + below(4); left > 0; left--) await change(tx, below, () => ++next);
          await hold();
          if (below(8) === 0) throw rollback;
        });
        await Promise.race([transaction, giveUp()]);
        counts.committed += 1;
      } catch (error) {
        const { code } = error as { code?: string };
        if (error === rollback) counts["rolled back"] += 1;
        else if (expected.test(code ?? "")) {
          counts["cut off"] += 1;
          if (!/^(23|40)/.test(code ?? "")) sql = connect(`writer ${number}`);
          await delay(200);
        } else throw error;
      }
      await delay(below(60));
    }
  };
  const work = Promise.all(Array.from({ length: count }, (_, n) => write(n + 1)));
  work.catch(() => {}); // stop() tells
  return {
    count: counts,
    stop: async () => {
      stopped = true;
      await work;
    },
  };
}

/** postgres.js may neither fail nor go on once a connection was lost in mid-write. */
const giveUp = (): Promise<never> =>
  delay(20_000, undefined, { ref: false }).then(() => {
    throw Object.assign(new Error("no answer in 20 s"), { code: "CONNECTION_STUCK" });
  });

const rollback = new Error("rolled back");

/**
 * New rows: one that is lost is not healed by its next update. And rows that change again and again for some seconds, then rest: an old
 * version that comes back stays.
 */
async function change(sql: TransactionSql, below: (n: number) => number, next: () => number): Promise<unknown> {
  const [key, value] = [1 + below(2000), below(100_000)];
  const often = (rows: number): number => 1 + ((3 * Math.floor(performance.now() / 1000) + below(20)) % rows);
  const band = `${value % 12}K`;
  const day = sql`timestamptz '2017-01-02' + ${below(140 * 1440)}::int * interval '1 minute'`;
  const hour = sql`timestamptz '2024-01-01' + ${below(50)}::int * interval '1 hour'`;
  const order = (id: number) => sql`
    insert into orders (id, user_id, store_id, status, item_count, total, discount, created_at)
    values (${id}, ${below(200)}, ${below(10)}, 'completed', ${1 + below(9)}, ${value}::numeric / 100, 0, ${day})`;
  const dice = below(16);
  if (dice < 2) return await order(next());
  if (dice < 6) return await sql`update orders set status = 'returned', total = ${value}::numeric / 100 where id = ${often(2000)}`;
  if (dice === 6) {
    // Some are there again before the transaction ends.
    await sql`delete from orders where id = ${key}`;
    return below(3) ? undefined : await order(key);
  }
  if (dice === 7) return await sql`insert into users (id, age_band, income_band, created_at) values (${next()}, '45-54', ${band}, ${day})`;
  if (dice < 10) return await sql`update users set income_band = ${band} where id = ${often(300)}`;
  if (dice === 10) return below(5) ? undefined : await sql`delete from users where id = ${often(300)}`;
  if (dice < 13) {
    // Its sorting key in ClickHouse.
    await sql`update sensor_readings set sensor_id = ${`S${below(5)}`}, recorded_at = ${hour} where id = ${key}`;
    return await sql`
      insert into sensor_readings (id, sensor_id, metric, value, recorded_at) values (${next()}, 'S1', 'temp', ${value / 7}, ${hour})`;
  }
  if (dice === 13) {
    // Its primary key, and others' values.
    await sql`update sensor_readings set value = ${value} where id % 500 = ${key % 500}`;
    return await sql`update sensor_readings set id = ${next()} where id = ${key}`;
  }
  if (dice === 15) return await sql`delete from sensor_readings where id = ${key}`;
  // Many rows: of a COPY, and of one INSERT.
  const lines = Array.from({ length: 100 }, () => `${next()}\tS2\tcopied\t${value}\t2024-02-01Z\n`);
  const copy = "copy sensor_readings (id, sensor_id, metric, value, recorded_at) from stdin";
  await pipeline(Readable.from([lines.join("")]), await sql.unsafe(copy).writable());
  return await sql`
    insert into sensor_readings (id, sensor_id, metric, value, recorded_at)
    select i, 'S3', 'many', ${value}::float8, '2024-02-02Z' from unnest(${`{${Array.from({ length: 100 }, next)}}`}::text::bigint[]) i`;
}
