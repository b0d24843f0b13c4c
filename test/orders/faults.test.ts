import assert from "node:assert/strict";
import { suite, test } from "node:test";
import { isTransient } from "../../shared/bigquery/client.ts";
import { SourceError } from "../../shared/copy.ts";
import {
  answer,
  assertEqualRows,
  assertExpiring,
  assertHeals,
  assertNoSessions,
  type Change,
  changed,
  copyBlocked,
  dropLines,
  ending,
  type Fault,
  type HttpProxy,
  hold,
  lastRun,
  loseAnswer,
  narrow,
  pass,
  pause,
  reach,
  reset,
  sessions,
  sharedShop,
  steps,
  widen,
} from "../lib/faults.ts";
import { createCutLink } from "../lib/link.ts";
import { type Process, type Result, type Shop, stepsOfPipeline, until } from "../lib/shop.ts";

/** Waits for a run that has to end with exit 1 and a text, having merged and moved nothing; then heals it. */
async function assertFailsCleanly(change: Change, text: RegExp, start: () => Promise<Process>): Promise<Result> {
  const { shop, before } = change;
  const watermark = await shop.watermark();
  const result = await ending(await start());
  assert.equal(result.code, 1, result.stderr);
  assert.match(result.stderr, text);
  assert.deepEqual([await shop.watermark(), await shop.destinationRows()], [watermark, before]);
  await assertNoSessions(shop);
  const last = await lastRun(shop);
  assert.equal(last.state, "failed");
  assert.match(`error: ${last.error}`, text);
  await narrow(change);
  await assertHeals(shop, changed);
  return result;
}

const count = (proxy: HttpProxy, step: RegExp): number => proxy.requests.filter((line) => step.test(line)).length;
/** It tried again so often, after about 1, 2, 4, 8, 16 and 32 s. */
function assertBackOff({ stderr }: Result, times: number): void {
  const waits = [...stderr.matchAll(/step=retry attempt=\d in_seconds=(\S+) /g)].map((match) => Number(match[1]));
  assert.equal(waits.length, times, stderr);
  for (const [index, wait] of waits.entries()) assert.ok(wait >= 0.7 * 2 ** index && wait <= 1.3 * 2 ** index, `${waits}`);
}

/** A deadline that only a run that is held meets: how long the last one took tells how busy the machine is. */
async function deadline(shop: Shop): Promise<{ RUN_TIMEOUT_SECONDS: string }> {
  const [last] = await shop.admin`
    select extract(epoch from finished_at - started_at)::float8 as seconds from etl.runs
    where state = 'succeeded' order by started_at desc limit 1`;
  return { RUN_TIMEOUT_SECONDS: String(Math.ceil(3 + 2 * last?.seconds)) };
}

test("what Google says to try again is tried again, also with the token's server, and nothing else is", () => {
  const reasons = "backendError internalError jobBackendError jobInternalError rateLimitExceeded jobRateLimitExceeded";
  for (const reason of `${reasons} userRateLimitExceeded tableUnavailable`.split(" "))
    assert.ok(isTransient({ code: 400, errors: [{ reason }] }), reason);
  for (const message of [
    "Transaction is aborted due to concurrent update against table orders",
    "Could not serialize access to table orders due to concurrent update",
    "request to https://oauth2.googleapis.com/token failed, reason: connect ETIMEDOUT",
    "network timeout at: https://oauth2.googleapis.com/token",
    "The operation was aborted due to timeout",
  ])
    assert.ok(isTransient(new Error(message)), message);
  for (const reason of "accessDenied billingNotEnabled quotaExceeded invalid invalidQuery notFound stopped".split(" "))
    assert.ok(!isTransient({ code: 400, errors: [{ reason }] }), reason);
  assert.ok(!isTransient(new SourceError("canceling statement due to statement timeout")));
});

// Three parts at a time, each with its shop: most of these tests wait, for a deadline or before an attempt.
stepsOfPipeline((pipeline) => {
  suite("silence, and the source", { concurrency: 1 }, () => {
    const test = sharedShop({ pipeline });

    suite("a destination that hangs: the run meets its deadline and cancels its job", () => {
      const text = /error: the run's deadline of \d+ s \(RUN_TIMEOUT_SECONDS\) has passed\. No chunk is half applied; .* Next: make status/;

      test("the MERGE", async (change) => {
        await assertFailsCleanly(change, text, async () => change.startHeld(steps.merge, hold(), await deadline(change.shop)));
        assert.equal(count(change.proxy, /_merge\/cancel$/), 1);
      });

      test("everything after the upload began, the cancelling too: the run ends all the same", async (change) => {
        await widen(change);
        change.proxy.fault(steps.upload, pause(1000));
        const variables = await deadline(change.shop);
        await assertFailsCleanly(change, text, () => change.startHeld(steps.cancel, hold(), variables));
        assert.equal(count(change.proxy, /_load\/cancel$/), 1);
      });
    });

    suite("the source dies in mid-COPY", () => {
      test("its backend terminated: nothing is merged and nothing moved", async (change) => {
        const { shop, proxy } = change;
        await widen(change);
        const upload = pause(1000);
        const text =
          /error: reading the source failed after \d+ rows: (terminating connection due to administrator command|the server closed the connection)/;
        await assertFailsCleanly(change, text, async () => {
          const run = await change.startHeld(steps.upload, upload);
          await shop.admin`select pg_terminate_backend(${await copyBlocked(shop)})`;
          upload.release();
          return run;
        });
        assert.equal(count(proxy, steps.merge), 0);
      });

      for (const [when, how, text] of [
        [
          "ended at a row's end, without an error",
          "fin",
          /error: reading the source failed after \d+ rows: .*(ECONNRESET|the server closed the connection)/,
        ],
        ["open and silent, until the deadline", "stall", /error: the run's deadline of \d+ s \(RUN_TIMEOUT_SECONDS\) has passed/],
      ] as const)
        test(`its connection ${when}: nothing is merged and nothing moved`, async (change) => {
          const { shop, proxy } = change;
          await widen(change);
          await using source = await createCutLink(shop.env.SOURCE_DATABASE_URL, how, 5_000_000);
          const result = await assertFailsCleanly(change, text, async () => {
            const variables = how === "stall" ? await deadline(shop) : {};
            const run = change.start({ SOURCE_DATABASE_URL: source.url, ...variables });
            await reach(run, source.broken);
            return run;
          });
          assert.equal(count(proxy, steps.merge), 0);
          assertBackOff(result, 0); // what the source breaks is not retried
        });

      test("the metadata's connection reset between two statements: the error says in which it was noticed", async (change) => {
        await using metadata = await createCutLink(change.shop.env.ETL_DATABASE_URL, "reset", 1000);
        const { code, stderr } = await ending(change.start({ ETL_DATABASE_URL: metadata.url }));
        assert.equal(code, 1, stderr);
        assert.match(stderr, /error: (read|write) ECONNRESET in: (select|insert|update) .* …\. Did the server restart, /m);
      });
    });
  });

  suite("the destination fails for a moment, and the run succeeds", { concurrency: 1 }, () => {
    const test = sharedShop({ pipeline });

    test("uploads: each is retried with back-off into a new staging table, and leaves no session in COPY", async (change) => {
      const { shop, proxy } = change;
      await widen(change);
      const faults = [answer(503, { early: true }), reset(200_000), loseAnswer, dropLines(1)];
      for (const fault of faults) proxy.fault(steps.upload, fault, 1);
      const second = hold();
      proxy.fault(steps.createStaging, pass, 1);
      proxy.fault(steps.createStaging, second, 1);
      const run = change.start();
      await reach(run, second.reached); // its COPY has not begun
      await until("no session of the first attempt", async () => (await sessions(shop)).every(({ state }) => state !== "active"), 3);
      second.release();
      const result = await ending(run);
      assert.equal(result.code, 0, result.stderr);
      assertBackOff(result, faults.length);
      assert.match(result.stderr, new RegExp(`step=done rows=${changed} `));
      await assertEqualRows(shop);
      const dropped = proxy.requests.map((line) => new RegExp(`^DELETE .*/${pipeline}_staging_\\w+_1_(\\d+)$`).exec(line)?.[1]);
      assert.deepEqual(dropped.filter(Boolean), ["1", "2", "3", "4", "5"]);
      await assertExpiring(shop, 0);
      await narrow(change);
      await assertHeals(shop, changed);
    });

    const { createStaging, tableGet, loadState, merge, mergeState } = steps;
    for (const { when, at, fault } of [
      { when: "503", at: [tableGet, createStaging, loadState, merge, mergeState], fault: answer(503) },
      { when: "the connection reset", at: [createStaging, merge], fault: reset() },
      { when: "the connection lost after what was asked for was done", at: [createStaging, merge, mergeState], fault: loseAnswer },
    ])
      test(`${when}, at each step but the upload: the rows are right`, async ({ shop, proxy, start }) => {
        const failed = new Set<RegExp>();
        const failing =
          (step: RegExp): Fault =>
          async (exchange) => {
            failed.add(step);
            await fault(exchange);
          };
        for (const step of at) proxy.fault(step, failing(step), 1);
        const { code, stderr } = await ending(start());
        assert.equal(code, 0, stderr);
        assert.deepEqual(failed, new Set(at));
        assert.match(stderr, new RegExp(`step=done rows=${changed} `));
        await assertEqualRows(shop);
      });
  });

  suite("the destination fails for good: exit 1, and nothing moves", { concurrency: 1 }, () => {
    const test = sharedShop({ pipeline });

    test("every upload, in one way after another: seven attempts, up to 32 s apart", async (change) => {
      const { proxy } = change;
      for (const fault of [answer(503), reset(), answer(400, { reason: "tableUnavailable" })]) proxy.fault(steps.upload, fault, 1);
      proxy.fault(steps.upload, dropLines(2));
      const text = new RegExp(
        `error: the counts differ: ${changed} rows were read from the source, and ${changed - 2} were loaded; nothing was merged`,
      );
      assertBackOff(await assertFailsCleanly(change, text, async () => change.start()), 6);
      assert.equal(count(proxy, steps.merge), 0);
    });

    for (const [step, reason, text] of [
      [steps.upload, "accessDenied", /error: answered 403 by the test/],
      [steps.merge, "billingNotEnabled", /error: answered 403 by the test\. Check BIGQUERY_PROJECT, its billing account/],
    ] as const)
      test(`an error that trying again does not help (403, ${reason}) is not retried`, async (change) => {
        change.proxy.fault(step, answer(403, { reason }));
        assertBackOff(await assertFailsCleanly(change, text, async () => change.start()), 0);
      });
  });
}, 3);
