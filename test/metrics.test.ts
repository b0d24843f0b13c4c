import assert from "node:assert/strict";
import { test } from "node:test";
import {
  answer,
  assertEqualRows,
  assertHeals,
  createProxy,
  ending,
  hold,
  readyShop,
  steps,
  trickle,
} from "./lib/faults.ts";
import { freePort, type Shop, until } from "./lib/shop.ts";

const orders = "scripts/orders.ts";
const always = ["etl_last_run_timestamp_seconds", "etl_unknown_source_columns", "etl_watermark_hold_seconds"];
const ofSuccess = [
  "etl_bytes",
  "etl_duration_seconds",
  "etl_last_success_timestamp_seconds",
  "etl_rows",
  "etl_watermark_timestamp_seconds",
];

async function filledShop(rows: number, options: { pushgateway?: boolean } = {}): Promise<Shop> {
  return await readyShop((shop) => shop.insertRows(1, rows), options);
}

/** The pipeline's metrics, without those that the Pushgateway itself adds to a group. */
async function pushed(shop: Shop): Promise<Record<string, number>> {
  return Object.fromEntries(Object.entries(await shop.metrics()).filter(([name]) => name.startsWith("etl_")));
}

const warning = (error: string): RegExp =>
  new RegExp(`step=warning warning="the metrics were not pushed; the run itself is not affected" error=.*${error}`);

/** The run succeeded, with a warning; its rows, its record and its watermark are those of any other. */
async function assertUnaffected(shop: Shop, url: string, error: string): Promise<void> {
  const { code, stderr } = await ending(shop.start(orders, { PUSHGATEWAY_URL: url }));
  assert.equal(code, 0, stderr);
  assert.match(stderr, warning(error));
  assert.match(stderr, /step=done rows=100 /);
  await assertEqualRows(shop);
  const runs = await shop.admin`select state, rows::int from etl.runs`;
  assert.deepEqual([...runs], [{ state: "succeeded", rows: 100 }]);
  assert.ok(await shop.watermark());
}

test("a Pushgateway that is down costs a warning, never the run", async () => {
  await using shop = await filledShop(100);
  await assertUnaffected(shop, `http://127.0.0.1:${await freePort()}`, "ECONNREFUSED");
});

for (const { how, fault } of [
  { how: "hangs", fault: hold() },
  { how: "answers too slowly to end", fault: trickle },
]) {
  test(`a Pushgateway that ${how} costs a warning and at most 5 s, never the run`, async () => {
    await using shop = await filledShop(100);
    await using gateway = await createProxy(shop.env.PUSHGATEWAY_URL);
    const push = Promise.withResolvers<number>();
    gateway.fault(steps.push, async (exchange) => {
      push.resolve(performance.now());
      await fault(exchange);
    });
    await assertUnaffected(shop, gateway.url, "");
    const seconds = (performance.now() - (await push.promise)) / 1000;
    assert.ok(seconds < 10, `${seconds} s after the push, with the looks at the rows in it`);
  });
}

test("a Pushgateway that answers 503 costs a warning, never the run", async () => {
  await using shop = await filledShop(100);
  await using gateway = await createProxy(shop.env.PUSHGATEWAY_URL);
  gateway.fault(steps.push, answer(503));
  await assertUnaffected(shop, gateway.url, "503");
});

test("a Pushgateway that rejects the metrics costs a warning with its reason, never the run", async () => {
  await using shop = await filledShop(100, { pushgateway: true });
  // Another job has pushed a metric of the same name and another type: the real Pushgateway refuses ours.
  const other = await fetch(`${shop.env.PUSHGATEWAY_URL}/metrics/job/other`, {
    method: "POST",
    body: "# TYPE etl_rows counter\netl_rows 1\n",
  });
  assert.ok(other.ok);
  await assertUnaffected(shop, shop.env.PUSHGATEWAY_URL ?? "", "400");
  assert.deepEqual(await pushed(shop), {});
});

test("a Pushgateway that is down does not hide why a run failed", async () => {
  await using shop = await filledShop(100);
  await shop.admin`alter table orders rename discount to rebate`;
  const { code, stderr } = await shop.run(orders, { PUSHGATEWAY_URL: `http://127.0.0.1:${await freePort()}` });
  assert.equal(code, 2);
  assert.match(stderr, warning("ECONNREFUSED"));
  assert.match(stderr, /error: the source differs from the contract, nothing was moved:/);
});

test("after success the metrics of the design are there, with the run's values", async () => {
  await using shop = await filledShop(100, { pushgateway: true });
  const before = Date.now() / 1000;
  const { stderr } = await shop.succeed(orders);
  const metrics = await pushed(shop);
  assert.deepEqual(Object.keys(metrics).sort(), [...ofSuccess, ...always].sort());
  const [, bytes, seconds] = /step=done rows=100 bytes=(\d+) chunks=1 seconds=(\S+)/.exec(stderr) ?? [];
  assert.equal(metrics.etl_rows, 100);
  assert.equal(metrics.etl_bytes, Number(bytes));
  assert.ok(Math.abs((metrics.etl_duration_seconds ?? 0) - Number(seconds)) < 1);
  assert.equal(metrics.etl_unknown_source_columns, 0);
  assert.equal(metrics.etl_watermark_hold_seconds, 0);
  for (const name of ["etl_last_success_timestamp_seconds", "etl_last_run_timestamp_seconds"])
    assert.ok((metrics[name] ?? 0) >= before && (metrics[name] ?? 0) <= Date.now() / 1000, name);
  const [row] = await shop.admin`select extract(epoch from watermark)::float8 as seconds from etl.watermarks`;
  assert.ok(Math.abs((metrics.etl_watermark_timestamp_seconds ?? 0) - row?.seconds) < 0.001);
});

test("the group is job and pipeline, and nothing that changes per run: two runs and a failure are one group", async () => {
  await using shop = await filledShop(100, { pushgateway: true });
  await assertHeals(shop, 100);
  await assertHeals(shop, 0);
  await shop.admin`alter table orders rename discount to rebate`;
  assert.equal((await shop.run(orders)).code, 2);
  const response = await fetch(`${shop.env.PUSHGATEWAY_URL}/api/v1/metrics`);
  const { data } = (await response.json()) as { data: { labels: Record<string, string> }[] };
  assert.deepEqual(
    data.map(({ labels }) => labels),
    [{ job: "etl", pipeline: "orders" }],
  );
  const text = await (await fetch(`${shop.env.PUSHGATEWAY_URL}/metrics`)).text();
  const labels = new Set([...text.matchAll(/^etl_\w+\{(.*)\}/gm)].map((match) => match[1]));
  assert.deepEqual([...labels], ['instance="",job="etl",pipeline="orders"']);
});

test("after a failure the last success is as it was, and the failure is there", async () => {
  await using shop = await filledShop(100, { pushgateway: true });
  await shop.succeed(orders);
  const before = await pushed(shop);
  await shop.admin`alter table orders rename discount to rebate`;
  assert.equal((await shop.run(orders)).code, 2);
  const after = await pushed(shop);
  assert.deepEqual(Object.keys(after).sort(), [...ofSuccess, ...always, "etl_last_failure_timestamp_seconds"].sort());
  for (const name of [...ofSuccess, "etl_watermark_hold_seconds"]) assert.equal(after[name], before[name], name);
  assert.ok((after.etl_last_failure_timestamp_seconds ?? 0) > (before.etl_last_success_timestamp_seconds ?? 0));
  assert.equal(after.etl_last_run_timestamp_seconds, after.etl_last_failure_timestamp_seconds);
});

test("a pipeline that has only ever failed has no last success, not one at 0", async () => {
  await using shop = await filledShop(100, { pushgateway: true });
  await shop.admin`alter table orders rename discount to rebate`;
  assert.equal((await shop.run(orders)).code, 2);
  assert.deepEqual(
    Object.keys(await pushed(shop)).filter((name) => ofSuccess.includes(name)),
    [],
  );
});

test("a run that moved nothing is a success: its rows are 0, and its time is new", async () => {
  await using shop = await filledShop(100, { pushgateway: true });
  await shop.succeed(orders);
  const before = await pushed(shop);
  await shop.succeed(orders);
  const after = await pushed(shop);
  assert.equal(after.etl_rows, 0);
  for (const name of ["etl_last_success_timestamp_seconds", "etl_watermark_timestamp_seconds"])
    assert.ok((after[name] ?? 0) > (before[name] ?? 0), name);
});

test("a held watermark is a metric for as long as it is held", async () => {
  await using shop = await filledShop(100, { pushgateway: true });
  const slow = shop.connect("slow writer");
  await slow.begin(async (late) => {
    await late`select now()`;
    await until("the transaction is a second old", async () => {
      const [row] = await late`select clock_timestamp() > now() + interval '1 second' as old`;
      return row?.old;
    });
    await shop.succeed(orders);
    const { etl_watermark_hold_seconds: hold = 0 } = await pushed(shop);
    assert.ok(hold >= 1 && hold < 60, `${hold} s`);
  });
  await shop.succeed(orders);
  assert.equal((await pushed(shop)).etl_watermark_hold_seconds, 0);
});

test("a new source column is a warning and a metric, until it is gone", async () => {
  await using shop = await filledShop(100, { pushgateway: true });
  await shop.admin`alter table orders add column coupon text`;
  const { stderr } = await shop.succeed(orders);
  assert.match(
    stderr,
    /step=warning warning="public\.orders has columns that are not in \S+, and are not synced" columns=coupon/,
  );
  assert.equal((await pushed(shop)).etl_unknown_source_columns, 1);
  await shop.admin`alter table orders drop column coupon`;
  await shop.succeed(orders);
  assert.equal((await pushed(shop)).etl_unknown_source_columns, 0);
});
