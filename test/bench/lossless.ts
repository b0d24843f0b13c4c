/**
 * make bench-lossless: transactions that commit late, on one source, read by this project and by dlt, Sling and ingestr, with
 * their defaults and with what they document for late rows. For SECONDS= (default 120) WRITERS= (default 12) insert rows, each in a
 * transaction of up to 400 ms; five more insert 10 rows at a time and stay open for 10 s each time, five for 90 s. As in many a
 * shop, a row's updated_at is now(): the start of its transaction. Meanwhile each tool runs again and again, in turn, and at
 * the end, when all has committed, twice more. Then what each has is compared with the source, by key and updated_at.
 */
import { setTimeout as delay } from "node:timers/promises";
import postgres, { type Sql, type TransactionSql } from "postgres";
import { thousands } from "../../shared/log.ts";
import { table } from "../../shared/table.ts";
import { createShop } from "../lib/shop.ts";
import { say } from "../stack/stack.ts";
import { measure, scratchFolder, script } from "./measure.ts";
import { dltSync, ingestrSync, openPeers, type Sync, slingSync, slotOf } from "./peers.ts";

const seconds = Number(process.env.SECONDS ?? 120);
const writers = Number(process.env.WRITERS ?? 12);
/** How long transactions stay open, in seconds: the ids of their rows begin at the number beside it. */
const kinds = [
  { name: "up to 0.4 s", hold: 0.4, first: 10_000 },
  { name: "10 s", hold: 10, first: 1_000_000 },
  { name: "90 s", hold: 90, first: 2_000_000 },
];

const lag = 5; // WATERMARK_LAG_SECONDS, as in .env.example
await using shop = await createShop({ lag });
await shop.admin`alter table orders disable trigger user`;
await shop.admin`alter table orders alter updated_at set default now()`;
const insert = (sql: Sql | TransactionSql, first: number, count: number): Promise<unknown> =>
  sql`insert into orders (id, user_id, store_id, status, item_count, total, discount)
    select i, i % 100, i % 10, 'paid', 1, 9.99, 0 from generate_series(${first}::int, ${first + count - 1}::int) i`;
await insert(shop.admin, 1, 1000);

const source = shop.env.SOURCE_DATABASE_URL ?? "";
const admin = shop.env.STACK_ADMIN_DATABASE_URL ?? "";
// Not the source's database: what a peer writes there would hold our watermark.
const target = Object.assign(new URL(admin), { pathname: `/${shop.dataset}_peers` }).href;
await shop.admin.unsafe(`create database ${shop.dataset}_peers`);
const peersSql = postgres(target, { max: 1 });
const peers = await openPeers(scratchFolder());
const back = `select * from public.orders where updated_at > coalesce({incremental_value}, '-infinity')::timestamptz - interval '60 s'`;

const contenders: (Sync & { settings: string; sum: number })[] = [
  {
    ...{ by: "this project", settings: `WATERMARK_LAG_SECONDS=${lag} (default)`, schema: "" },
    command: () => script("scripts/orders.ts", shop.env),
    delivered: /step=done rows=(\d+)/,
  },
  { ...dltSync(peers, source, target, "dlt", {}), settings: "incremental(updated_at), merge" },
  { ...dltSync(peers, source, target, "dlt_lag", { LAG: "60" }), settings: "the same, lag=60" },
  { ...slingSync(peers, source, target, "sling"), settings: "incremental, update-key, primary-key" },
  { ...slingSync(peers, source, target, "sling_back", back), settings: "the same, SQL: {incremental_value} - 60 s" },
  {
    ...ingestrSync(peers, source, target, "ingestr", "interval"),
    settings: "merge, --interval-start of the run before",
  },
  { ...ingestrSync(peers, source, target, "ingestr_all", "all"), settings: "merge, no interval: reads all" },
  { ...ingestrSync(peers, admin, target, "ingestr_cdc", "log"), settings: "postgres+cdc: reads the log" },
].map((sync) => ({ ...sync, sum: 0 }));

/** Each tool once, in turn. */
async function pass(): Promise<void> {
  for (const contender of contenders) {
    const { output } = await measure(contender.command());
    const rows = contender.delivered.exec(output)?.[1];
    // Of a run without new rows, Sling and ingestr may not say a number.
    contender.sum += Number(rows?.replaceAll(",", "") ?? 0);
  }
}

try {
  say("bench: every tool's first load");
  await pass();
  say(`bench: ${writers} writers for ${seconds} s, late commits of 10 and 90 s`);
  const end = performance.now() + seconds * 1000;
  /** Inserts rows, so many at a time, each time with ids of its own, until the end would come before its commit. */
  const write = async (first: number, count: number, hold: () => number): Promise<void> => {
    const sql = shop.connect("writer");
    for (let [id, open] = [first, hold()]; performance.now() + open < end; id += count, open = hold())
      await sql.begin(async (transaction) => {
        await insert(transaction, id, count);
        await delay(open);
      });
  };
  const writing = kinds.flatMap(({ hold, first }, kind) =>
    Array.from({ length: kind ? 5 : writers }, (_, number) =>
      write(first + number * 10_000, kind ? 10 : 1, () => hold * 1000 * (kind ? 1 : Math.random())),
    ),
  );
  const all = Promise.all(writing);
  all.catch(() => {}); // awaited below
  while (performance.now() < end) await pass();
  await all;
  await delay((lag + 1) * 1000);
  await pass();
  await pass();

  // 4. What each has, by key and updated_at, against the source.
  const rows = "select id::text, (extract(epoch from updated_at) * 1000000)::bigint::text as at from";
  const expected = await shop.admin.unsafe<{ id: string; at: string }[]>(`${rows} orders`);
  const kindOf = ({ id }: { id: string }) => kinds.findLast(({ first }) => Number(id) >= first)?.name;
  const count = (of: { id: string }[], kind: string): string => thousands(of.filter((row) => kindOf(row) === kind).length);
  const report = [];
  for (const { by, settings, schema, sum } of contenders) {
    const found = schema
      ? await peersSql.unsafe(`${rows} ${schema}.orders`)
      : await shop.query("select id, unix_micros(updated_at) as at from orders");
    const has = new Set(found.map(({ id, at }) => `${id} ${at}`));
    const lost = expected.filter(({ id, at }) => !has.has(`${id} ${at}`));
    report.push({
      reads: by,
      settings,
      ...Object.fromEntries(kinds.map(({ name }) => [`lost of ${name}`, count(lost, name)])),
      "rows lost": thousands(lost.length),
      "delivered again": thousands(sum - has.size),
    });
  }
  process.stdout.write(`${table(report)}\n`);
} finally {
  await peersSql.end({ timeout: 1 });
  await shop.admin.unsafe(`drop database if exists ${shop.dataset}_peers with (force)`);
  await shop.admin`
    select pg_drop_replication_slot(slot_name) from pg_replication_slots where slot_name = ${slotOf(admin)}`;
}
