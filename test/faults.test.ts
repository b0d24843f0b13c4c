import assert from "node:assert/strict";
import { suite, test } from "node:test";
import {
  answer,
  assertEqualRows,
  assertExpiring,
  assertHeals,
  assertNoSessions,
  copyBlocked,
  createPostgresProxy,
  createProxy,
  dropLines,
  ending,
  type Fault,
  type HttpProxy,
  hold,
  insertWideRows,
  loseAnswer,
  pause,
  reach,
  readyShop,
  reset,
  sessions,
  steps,
} from "./lib/faults.ts";
import { type Result, type Shop, until } from "./lib/shop.ts";

const orders = "scripts/orders.ts";
/** So many wide rows that a stream of them is in flight from Postgres to the destination. */
const inFlight = 5000;
const synced = 50;
const changed = 100;

/** A shop that was synced, and in which `inserted` rows are new since. */
async function changedShop(inserted = changed): Promise<Shop> {
  return await readyShop(async (shop) => {
    await shop.insertRows(1, synced);
    await shop.succeed(orders);
    if (inserted === inFlight) await insertWideRows(shop, synced + 1, synced + inserted);
    else await shop.insertRows(synced + 1, synced + inserted);
  });
}

/** Runs `fail`, whose run has to end with exit 1 and a text, having merged and moved nothing; then heals it. */
async function assertFailsCleanly(
  shop: Shop,
  text: RegExp,
  rows: number,
  fail: () => Promise<Result>,
): Promise<Result> {
  const before = [await shop.watermark(), await shop.destinationRows()];
  const result = await fail();
  assert.equal(result.code, 1, result.stderr);
  assert.match(result.stderr, text);
  assert.deepEqual([await shop.watermark(), await shop.destinationRows()], before);
  await assertNoSessions(shop);
  const [last] = await shop.admin`select state, error from etl.runs order by started_at desc limit 1`;
  assert.equal(last?.state, "failed");
  assert.match(`error: ${last?.error}`, text);
  await assertHeals(shop, rows);
  return result;
}

const count = (proxy: HttpProxy, step: RegExp): number => proxy.requests.filter((line) => step.test(line)).length;
const retries = ({ stderr }: Result): number[] =>
  [...stderr.matchAll(/step=retry attempt=\d in_seconds=(\S+) /g)].map((match) => Number(match[1]));
/** About 1, 2 and 4 s. */
function assertBackOff(result: Result, times: number): void {
  const waits = retries(result);
  assert.equal(waits.length, times, result.stderr);
  for (const [index, wait] of waits.entries())
    assert.ok(wait >= 0.7 * 2 ** index && wait <= 1.3 * 2 ** index, `${waits}`);
}
/** Each attempt had a staging table of its own, numbered from 1, and dropped it. */
async function assertStaging(shop: Shop, proxy: HttpProxy, attempts: number): Promise<void> {
  const dropped = proxy.requests
    .map((line) => /^DELETE .*\/orders_staging_\w+_1_(\d+)$/.exec(line)?.[1])
    .filter(Boolean);
  assert.deepEqual(
    dropped,
    Array.from({ length: attempts }, (_, index) => String(index + 1)),
  );
  assert.deepEqual(await shop.stagingTables(), []);
}

suite("the source dies in mid-COPY", { concurrency: 2 }, () => {
  test("its backend terminated: nothing is merged and nothing moved", async () => {
    await using shop = await changedShop(inFlight);
    await using proxy = await createProxy(shop.env.BIGQUERY_ENDPOINT);
    const upload = pause(1000);
    proxy.fault(steps.upload, upload);
    const text =
      /error: reading the source failed after \d+ rows: (terminating connection due to administrator command|write CONNECTION_CLOSED)/;
    await assertFailsCleanly(shop, text, inFlight, async () => {
      const run = shop.start(orders, { BIGQUERY_ENDPOINT: proxy.url });
      await shop.admin`select pg_terminate_backend(${await copyBlocked(shop)})`;
      upload.release();
      return await ending(run);
    });
    assert.equal(count(proxy, steps.merge), 0);
  });

  for (const how of ["reset", "fin"] as const) {
    test(`its connection ended by a ${how} at a row's end: nothing is merged and nothing moved`, async () => {
      await using shop = await changedShop(10_000);
      await using source = await createPostgresProxy(shop.env.SOURCE_DATABASE_URL, how, 500_000);
      await using proxy = await createProxy(shop.env.BIGQUERY_ENDPOINT);
      const text = /error: reading the source failed after \d+ rows: .*(ECONNRESET|CONNECTION_CLOSED)/;
      await assertFailsCleanly(shop, text, 10_000, async () => {
        const run = shop.start(orders, { SOURCE_DATABASE_URL: source.url, BIGQUERY_ENDPOINT: proxy.url });
        await reach(run, source.cut);
        return await ending(run);
      });
      assert.equal(count(proxy, steps.merge), 0);
      assert.equal(count(proxy, steps.upload), 1, "what the source breaks is not retried");
    });
  }

  test("its connection open and silent: the run meets its deadline", async () => {
    await using shop = await changedShop(10_000);
    await using source = await createPostgresProxy(shop.env.SOURCE_DATABASE_URL, "stall", 500_000);
    const text = /error: the run's deadline of 5 s \(RUN_TIMEOUT_SECONDS\) has passed/;
    await assertFailsCleanly(shop, text, 10_000, async () => {
      const run = shop.start(orders, { SOURCE_DATABASE_URL: source.url, RUN_TIMEOUT_SECONDS: "5" });
      await reach(run, source.cut);
      return await ending(run);
    });
  });
});

suite("the destination fails for a moment, and the run succeeds", { concurrency: 3 }, () => {
  const attempts: { when: string; step: RegExp; fault: Fault; times: number; rows?: number }[] = [
    { when: "503 to the upload, twice", step: steps.upload, fault: answer(503), times: 2 },
    {
      when: "503 while the upload streams",
      step: steps.upload,
      fault: answer(503, { early: true }),
      times: 1,
      rows: inFlight,
    },
    { when: "the connection reset at once in an upload", step: steps.upload, fault: reset(), times: 1 },
    {
      when: "the connection reset in mid-upload",
      step: steps.upload,
      fault: reset(200_000),
      times: 1,
      rows: inFlight,
    },
    {
      when: "the connection lost after a load that was done",
      step: steps.upload,
      fault: loseAnswer,
      times: 1,
    },
    { when: "a load that is short by one line", step: steps.upload, fault: dropLines(1), times: 1 },
  ];
  for (const { when, step, fault, times, rows = changed } of attempts) {
    test(`${when}: retried with back-off into a new staging table`, async () => {
      await using shop = await changedShop(rows);
      await using proxy = await createProxy(shop.env.BIGQUERY_ENDPOINT);
      proxy.fault(step, fault, times);
      const result = await ending(shop.start(orders, { BIGQUERY_ENDPOINT: proxy.url }));
      assert.equal(result.code, 0, result.stderr);
      assertBackOff(result, times);
      assert.match(result.stderr, new RegExp(`step=done rows=${rows} `));
      await assertEqualRows(shop);
      await assertStaging(shop, proxy, times + 1);
      await assertNoSessions(shop);
    });
  }

  for (const { when, step, fault } of [
    { when: "503 to the staging table's creation", step: steps.createStaging, fault: answer(503) },
    { when: "the connection reset before the staging table was created", step: steps.createStaging, fault: reset() },
    { when: "503 to the table's description", step: steps.tableGet, fault: answer(503) },
    { when: "503 to the load's state", step: steps.loadState, fault: answer(503) },
    { when: "503 to the MERGE", step: steps.merge, fault: answer(503) },
    { when: "503 to the MERGE's result", step: steps.mergeResult, fault: answer(503) },
    { when: "the connection reset before the MERGE ran", step: steps.merge, fault: reset() },
    { when: "the connection lost after the MERGE ran", step: steps.merge, fault: loseAnswer },
    { when: "the connection lost with the MERGE's result", step: steps.mergeResult, fault: loseAnswer },
    { when: "the connection lost with the MERGE's state", step: steps.mergeState, fault: loseAnswer },
    { when: "the connection lost after the staging table was created", step: steps.createStaging, fault: loseAnswer },
  ]) {
    test(`${when}: the rows are right`, async () => {
      await using shop = await changedShop();
      await using proxy = await createProxy(shop.env.BIGQUERY_ENDPOINT);
      proxy.fault(step, fault, 1);
      const result = await ending(shop.start(orders, { BIGQUERY_ENDPOINT: proxy.url }));
      assert.equal(result.code, 0, result.stderr);
      assert.match(result.stderr, new RegExp(`step=done rows=${changed} `));
      await assertEqualRows(shop);
      await assertHeals(shop, 0);
    });
  }
});

test("a staging table that cannot be dropped costs a warning, and expires", async () => {
  await using shop = await changedShop();
  await using proxy = await createProxy(shop.env.BIGQUERY_ENDPOINT);
  proxy.fault(steps.dropStaging, answer(403, { reason: "accessDenied" }));
  const { stderr } = await shop.succeed(orders, { BIGQUERY_ENDPOINT: proxy.url });
  assert.match(
    stderr,
    /step=warning warning="staging table orders_staging_\w+_1_1 was not dropped and expires in 24 h" error="answered 403 by the test"/,
  );
  await assertEqualRows(shop);
  await assertExpiring(shop, 1);
});

suite("the destination fails for good: four attempts, then exit 1, and nothing moved", { concurrency: 3 }, () => {
  for (const { when, step, fault, text, rows = changed } of [
    { when: "503 to every upload", step: steps.upload, fault: answer(503), text: /error: answered 503 by the test/ },
    {
      when: "503 while every upload streams",
      step: steps.upload,
      fault: answer(503, { early: true }),
      text: /error: answered 503 by the test/,
      rows: inFlight,
    },
    {
      when: "every upload's connection reset",
      step: steps.upload,
      fault: reset(200_000),
      text: /error: .*(ECONNRESET|EPIPE|socket hang up)/,
      rows: inFlight,
    },
    {
      when: "every load short by two lines",
      step: steps.upload,
      fault: dropLines(2),
      text: /error: the counts differ: 100 rows were read from the source, and 98 were loaded; nothing of it was merged/,
    },
  ]) {
    test(when, async () => {
      await using shop = await changedShop(rows);
      await using proxy = await createProxy(shop.env.BIGQUERY_ENDPOINT);
      proxy.fault(step, fault);
      const result = await assertFailsCleanly(shop, text, rows, () =>
        ending(shop.start(orders, { BIGQUERY_ENDPOINT: proxy.url })),
      );
      assertBackOff(result, 3);
      assert.equal(count(proxy, steps.merge), 0);
    });
  }

  test("503 to everything: it stops before a row moves", async () => {
    await using shop = await changedShop();
    await using proxy = await createProxy(shop.env.BIGQUERY_ENDPOINT);
    proxy.fault(steps.anything, answer(503));
    await assertFailsCleanly(shop, /error: .*answered 503 by the test/, changed, () =>
      ending(shop.start(orders, { BIGQUERY_ENDPOINT: proxy.url })),
    );
  });

  test("an error that trying again does not help (403) is not retried", async () => {
    await using shop = await changedShop();
    await using proxy = await createProxy(shop.env.BIGQUERY_ENDPOINT);
    proxy.fault(steps.upload, answer(403, { reason: "accessDenied" }));
    const result = await assertFailsCleanly(shop, /error: answered 403 by the test/, changed, () =>
      ending(shop.start(orders, { BIGQUERY_ENDPOINT: proxy.url })),
    );
    assertBackOff(result, 0);
  });
});

for (const { when, fault } of [
  { when: "is refused with 503", fault: answer(503, { early: true }) },
  { when: "loses its connection", fault: reset(200_000) },
]) {
  test(`an upload that ${when} while rows are in flight leaves no session in COPY behind`, async () => {
    await using shop = await changedShop(inFlight);
    await using proxy = await createProxy(shop.env.BIGQUERY_ENDPOINT);
    const second = hold();
    proxy.fault(steps.createStaging, async ({ send, reply }) => reply(await send()), 1);
    proxy.fault(steps.createStaging, second);
    proxy.fault(steps.upload, fault);
    const run = shop.start(orders, { BIGQUERY_ENDPOINT: proxy.url });
    await reach(run, second.reached); // the second attempt has begun, and its COPY has not
    await until(
      "no session of the first attempt",
      async () => (await sessions(shop)).every(({ state }) => state !== "active"),
      3,
    );
    run.child.kill("SIGKILL");
    await ending(run);
  });
}

suite("a destination that hangs: the run meets its deadline and cancels its job", { concurrency: 3 }, () => {
  for (const { when, step, job } of [
    { when: "the table's description", step: steps.tableGet },
    { when: "the staging table's creation", step: steps.createStaging },
    { when: "the upload", step: steps.upload, job: "load" },
    { when: "the load's state", step: steps.loadState, job: "load" },
    { when: "the MERGE", step: steps.merge, job: "merge" },
  ]) {
    test(when, async () => {
      await using shop = await changedShop();
      await using proxy = await createProxy(shop.env.BIGQUERY_ENDPOINT);
      const gate = hold();
      proxy.fault(step, gate);
      const text =
        /error: the run's deadline of 5 s \(RUN_TIMEOUT_SECONDS\) has passed: nothing is half done, the next run goes on from the watermark\. Next: make status/;
      await assertFailsCleanly(shop, text, changed, async () => {
        const run = shop.start(orders, { BIGQUERY_ENDPOINT: proxy.url, RUN_TIMEOUT_SECONDS: "5" });
        await reach(run, gate.reached);
        return await ending(run);
      });
      const cancelled = proxy.requests
        .filter((line) => steps.cancel.test(line))
        .map((line) => /_(\w+)\/cancel$/.exec(line)?.[1]?.split("_").at(-1));
      assert.deepEqual(cancelled, job ? [job] : []);
    });
  }

  for (const { when, step } of [
    { when: "the MERGE's result, of a MERGE that was done", step: steps.mergeResult },
    { when: "the MERGE's state, of a MERGE that was done", step: steps.mergeState },
  ]) {
    test(when, async () => {
      await using shop = await changedShop();
      await using proxy = await createProxy(shop.env.BIGQUERY_ENDPOINT);
      const before = await shop.watermark();
      proxy.fault(step, hold());
      const { code, stderr } = await ending(
        shop.start(orders, { BIGQUERY_ENDPOINT: proxy.url, RUN_TIMEOUT_SECONDS: "5" }),
      );
      assert.equal(code, 1);
      assert.match(stderr, /error: the run's deadline of 5 s \(RUN_TIMEOUT_SECONDS\) has passed/);
      assert.equal(await shop.watermark(), before);
      assert.equal(count(proxy, steps.cancel), 1);
      await assertNoSessions(shop);
      await assertHeals(shop, changed);
    });
  }

  test("everything after the upload began, the cancelling too: the run ends all the same", async () => {
    await using shop = await changedShop(inFlight);
    await using proxy = await createProxy(shop.env.BIGQUERY_ENDPOINT);
    proxy.fault(steps.upload, pause(1000));
    const cancel = hold();
    proxy.fault(steps.cancel, cancel);
    await assertFailsCleanly(
      shop,
      /error: the run's deadline of 5 s \(RUN_TIMEOUT_SECONDS\) has passed/,
      inFlight,
      async () => {
        const run = shop.start(orders, { BIGQUERY_ENDPOINT: proxy.url, RUN_TIMEOUT_SECONDS: "5" });
        await reach(run, cancel.reached);
        const started = performance.now();
        const result = await ending(run);
        assert.ok(performance.now() - started < 10_000, "undoing costs at most 5 s");
        return result;
      },
    );
  });
});
