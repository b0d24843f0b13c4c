// The archive of events where S3 or the source fails, for a moment or for good: a day is whole or not there, the other days are
// archived, and the same command again repairs it. Needs the local stack (make up).
import assert from "node:assert/strict";
import { suite } from "node:test";
import { addDays } from "../../shared/events/archive.ts";
import { removeObjects } from "../../shared/events/s3.ts";
import { ending, type Fault, hold, lastRun, loseAnswer, reach, reset, sessions, withhold } from "../lib/faults.ts";
import { createCutLink } from "../lib/link.ts";
import {
  archiveSuite,
  assertArchivedClean,
  backfill,
  breakBody,
  type Case,
  insertWide,
  objectKeys,
  ofDay,
  refuse,
  s3Steps,
} from "../lib/s3.ts";
import { type Result, type Shop, until } from "../lib/shop.ts";
import type { Env } from "../stack/env.ts";

const daily = "scripts/events.ts";
const verifier = "scripts/ops/verify-events.ts";
const onePart = { CHUNK_ROWS: "1000" };

/** A day is not archived; what there is of it are parts, which verify lists: they are deleted as CLEAN=1 does after a day. */
async function assertOnlyStrays(shop: Shop, day: string): Promise<void> {
  const strays = (await objectKeys(shop, day)).map((key) => shop.bucket.prefix + key);
  const { code, stderr } = await shop.run(verifier, { FROM: day, TO: addDays(day) });
  assert.equal(code, 1);
  assert.match(stderr, new RegExp(`^  ${day}: is not archived; .* Next: make backfill-events FROM=${day} TO=${addDays(day)}$`, "m"));
  const listed = [...stderr.matchAll(/ step=stray what="a part that no manifest names" key="(\S+)" age_hours=/g)];
  assert.deepEqual(
    listed.map((match) => match[1]),
    strays,
  );
  assert.ok(strays.length > 0);
  await removeObjects(shop.bucket, strays);
}

/** One day failed, of so many; it is listed, with its error, and what repairs it. Nothing of it is in the bucket. */
async function assertDayFailed({ shop, day }: Case, result: Result, error: string, days = 1): Promise<void> {
  assert.equal(result.code, 1, result.stderr);
  const next = `Next: make backfill-events FROM=${day} TO=${addDays(day)} \\(days that are done are skipped\\)$`;
  const failed = `^error: 1 of ${days} days failed:`;
  assert.match(result.stderr, new RegExp(`${failed}\n  ${day}: ${error}\n${next}`, "m"));
  assert.match(result.stderr, new RegExp(` step=days archived=${days - 1} skipped=0 failed=1$`, "m"));
  assert.deepEqual(await objectKeys(shop, day), []);
  const { state, error: recorded } = await lastRun(shop);
  assert.equal(state, "failed");
  assert.match(recorded ?? "", new RegExp(error));
  const [chunk] = await shop.admin`select state, error from etl.chunks where chunk_from = ${`${day}Z`}::text::timestamptz`;
  assert.equal(chunk?.state, "failed");
  assert.match(chunk?.error, new RegExp(error));
}

const partOf = ({ shop, day }: Case, number = 1): string =>
  `s3://archive/${shop.bucket.prefix}events/dt=${day}/part-000${number}-\\w+\\.ndjson\\.gz`;

suite("archive", { concurrency: true }, () => {
  archiveSuite("S3 fails for a moment: the day is done, and nothing is left beside it", {}, (test) => {
    const { getManifest, putManifest } = s3Steps;
    const cases: Record<string, [step: RegExp, fault: Fault, times: number][]> = {
      "503 and 500, at each step": [
        [getManifest, refuse(503, "SlowDown"), 3],
        [/^PUT .*part-0001-/, refuse(503, "SlowDown"), 1],
        [/^PUT .*part-0003-/, refuse(500, "InternalError"), 5],
        [putManifest, refuse(503, "SlowDown"), 1],
      ],
      "the connection reset before parts, in the middle of one and before the manifest, and lost after parts that were put": [
        [/^PUT .*part-0001-/, reset(), 2],
        [/^PUT .*part-0001-/, loseAnswer, 1],
        [/^PUT .*part-0002-/, reset(100_000), 3],
        [/^PUT .*part-0003-/, loseAnswer, 3],
        [putManifest, reset(), 3],
      ],
    };
    for (const [when, faults] of Object.entries(cases)) {
      test(when, async ({ shop, proxy, day, run }) => {
        await insertWide(shop, day, 2); // in the second part
        let failed = 0;
        for (const [step, fault, times] of faults) proxy.fault(step, (exchange) => fault(exchange).finally(() => (failed += 1)), times);
        const { code, stderr } = await run();
        assert.equal(code, 0, stderr);
        assert.equal(
          failed,
          faults.reduce((sum, [, , times]) => sum + times, 0),
        );
        assert.match(stderr, /step=days archived=1 skipped=0 failed=0$/m);
        const { parts, run_id } = (await assertArchivedClean(shop, day)).manifest;
        assert.deepEqual(
          parts.map(({ key }) => key.slice(key.indexOf("part-"))),
          [1, 2, 3].map((part) => `part-000${part}-${run_id}.ndjson.gz`),
        );
      });
    }
  });

  archiveSuite("S3 fails for good: that day is named, and the others are archived", {}, (test) => {
    test("500 to a day's parts: seven requests", async (one) => {
      const { shop, proxy, day, run, heal } = one;
      await shop.insertEvents(addDays(day, 2), 4);
      const part = ofDay(day, s3Steps.putPart);
      proxy.fault(part, refuse(500, "InternalError"));
      const result = await run({}, 3);
      await assertDayFailed(one, result, `${partOf(one)}: InternalError 500 answered 500 by the test`, 3);
      assert.equal(proxy.requests.filter((line) => part.test(line)).length, 7);
      for (const other of [1, 2]) await assertArchivedClean(shop, addDays(day, other));
      assert.match((await heal({}, 3)).stderr, /step=days archived=1 skipped=2 failed=0/);
    });

    test("403 to a day that is archived again: it stays as it was, and the command to run archives it again", async (one) => {
      const { shop, proxy, day, run, heal } = one;
      await heal();
      const stays = await assertArchivedClean(shop, day);
      proxy.fault(ofDay(day, s3Steps.putPart), refuse(403, "AccessDenied"));
      const { code, stderr } = await run({ FORCE: "1" });
      assert.equal(code, 1);
      assert.deepEqual(await assertArchivedClean(shop, day), stays);
      assert.match(stderr, new RegExp(`^Next: make backfill-events FROM=${day} TO=${addDays(day)} FORCE=1( |$)`, "m"));
    });

    test("403 to a day's last part: not tried again, and the parts before it are gone again", async (one) => {
      one.proxy.fault(ofDay(one.day, /^PUT .*part-0003-/), refuse(403, "AccessDenied"));
      const result = await one.run({}, 2);
      await assertDayFailed(one, result, `${partOf(one, 3)}: AccessDenied 403 answered 403 by the test`, 2);
      assert.equal(one.proxy.requests.filter((line) => /^PUT .*part-0003-/.test(line)).length, 1);
      await one.heal({}, 2);
    });

    test("every answer to the manifest lost: the day is named, and is done", async ({ shop, proxy, day, run, heal }) => {
      proxy.fault(s3Steps.putManifest, loseAnswer);
      const { code, stderr } = await run();
      assert.equal(code, 1);
      assert.match(stderr, new RegExp(`^  ${day}: s3://archive/\\S+/dt=${day}/manifest\\.json: `, "m"));
      await assertArchivedClean(shop, day);
      assert.match((await heal()).stderr, /step=days archived=0 skipped=1 failed=0/);
    });

    test("parts that cannot be deleted again are a warning, and what verify lists", async (one) => {
      one.proxy.fault(/^PUT .*part-0002-/, refuse(403, "AccessDenied"));
      one.proxy.fault(s3Steps.deleteObjects, refuse(403, "AccessDenied"));
      const { code, stderr } = await one.run();
      assert.equal(code, 1);
      const left = "parts were left that no manifest names; make verify-events removes them with CLEAN=1";
      assert.ok(stderr.includes(` step=warning warning="${left}" error=`), stderr);
      await assertOnlyStrays(one.shop, one.day);
      await one.heal();
    });

    test("a wrong secret key and a missing bucket are named before a row moves, with what to do: exit 2", async (one) => {
      const { shop, proxy, day, run } = one;
      const check = "Check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION and the bucket's policy";
      for (const [variables, says] of [
        [{ AWS_SECRET_ACCESS_KEY: "not-this-one" }, `S3_BUCKET may not be used: s3://archive/: SignatureDoesNotMatch .+\\. ${check}`],
        [{ S3_BUCKET: "no-such-bucket" }, "bucket no-such-bucket \\(S3_BUCKET\\) does not exist\\. Run: make migrate"],
      ] as [Env, string][])
        for (const command of [() => run(variables), () => shop.run(verifier, { FROM: day, TO: addDays(day), ...variables })]) {
          const { code, stderr } = await command();
          assert.equal(code, 2, stderr);
          assert.match(stderr, new RegExp(`^error: ${says}$`, "m"));
          assert.doesNotMatch(stderr, /not-this-one|local-only/);
        }
      assert.ok(!proxy.requests.some((line) => line.startsWith("PUT")));
      assert.equal((await lastRun(shop)).state, "failed");
    });
  });

  archiveSuite("S3 that is silent, and the pace", {}, (test) => {
    const deadline = { RUN_TIMEOUT_SECONDS: "4" };
    const assertMet = ({ code, stderr }: Result, seconds = 4): void => {
      assert.equal(code, 1);
      const next = "days that are done stay so. To resume: the same command again";
      const text = `error: the run's deadline of ${seconds} s (RUN_TIMEOUT_SECONDS) has passed. No chunk is half applied; ${next}`;
      assert.ok(stderr.includes(text), stderr);
    };

    test("a part that was put: the run meets its deadline, and the day is not done", async ({ shop, proxy, day, run, heal }) => {
      proxy.fault(s3Steps.putPart, withhold());
      assertMet(await run(deadline));
      await assertOnlyStrays(shop, day);
      assert.equal((await lastRun(shop)).state, "failed");
      await heal();
    });

    test("the manifest, which was put: the run meets its deadline, and the day is done", async ({ shop, proxy, day, run, heal }) => {
      proxy.fault(s3Steps.putManifest, withhold());
      assertMet(await run(deadline));
      await assertArchivedClean(shop, day);
      assert.match((await heal()).stderr, /step=days archived=0 skipped=1 failed=0/);
    });

    test("everything from the first part on: the run ends all the same", async ({ proxy, startHeld, heal }) => {
      const run = await startHeld(s3Steps.putPart, hold(), deadline);
      proxy.fault(s3Steps.anything, hold());
      assertMet(await ending(run));
      await heal();
    });

    test("the deadline is a day's, and MAX_ROWS_PER_SECOND that of all days at once", async ({ shop, day, run, heal }) => {
      for (const index of [0, 1, 2]) await shop.insertEvents(addDays(day, index), index ? 200 : 193);
      const pace = (MAX_ROWS_PER_SECOND: string, CONCURRENCY: string): Env => ({
        RUN_TIMEOUT_SECONDS: "8",
        ...onePart,
        MAX_ROWS_PER_SECOND,
        CONCURRENCY,
      });
      assertMet(await run(pace("60", "3"), 3), 8); // ten seconds for all of them
      // Three seconds for each.
      assert.equal((await run({ ...pace("66", "1"), CHUNK_ROWS: "100" }, 3)).code, 0);
      assert.match((await heal({}, 3)).stderr, /step=days archived=0 skipped=3 failed=0/);
    });
  });

  archiveSuite("S3 that breaks off in the middle of an answer", {}, (test) => {
    test("a moment is waited out; else the day is named, with the next command, and the next day is read", async (one) => {
      const { shop, proxy, day } = one;
      await shop.insertEvents(addDays(day), 7);
      await one.heal({}, 2);
      const read = (): Promise<Result> => shop.run(verifier, { FROM: day, TO: addDays(day, 2), S3_ENDPOINT: proxy.url });
      proxy.fault(ofDay(day, s3Steps.getManifest), breakBody("reset"), 3);
      proxy.fault(ofDay(day, s3Steps.getPart), breakBody("stall"), 1);
      proxy.fault(ofDay(day, s3Steps.getPart), breakBody("reset"), 2);
      const momentary = await read();
      assert.equal(momentary.code, 0, momentary.stderr);
      assert.match(momentary.stderr, / days=2 rows=14 bytes=\d+ failed=0 /);

      proxy.fault(ofDay(day, s3Steps.getPart), breakBody("reset"));
      const { code, stderr } = await read();
      assert.equal(code, 1);
      assert.match(stderr, / days=2 rows=7 bytes=\d+ failed=1 /);
      const next = `Next: make verify-events FROM=${day} TO=${addDays(day)}`;
      assert.match(stderr, new RegExp(`^  ${day}: ${partOf(one)}: aborted\\. ${next}$`, "m"));
    });
  });

  archiveSuite("the source", { pushgateway: true }, (test) => {
    test("its connection ends in mid-COPY at a row's end, without an error: the day fails, and leaves nothing", async (one) => {
      const { shop, day, run, heal } = one;
      await insertWide(shop, day, 30);
      await using source = await createCutLink(shop.env.SOURCE_DATABASE_URL, "fin", 1_000_000);
      const error = `reading the source failed after \\d+ rows: .*(ECONNRESET|the server closed the connection).*`;
      await assertDayFailed(one, await run({ SOURCE_DATABASE_URL: source.url, ...onePart }, 1), error);
      await heal(onePart);
    });

    test("a row written with an old created_at between the parts and the count: the day fails, and is right the next time", async (one) => {
      const last = hold();
      one.proxy.fault(/part-0003-/, last, 1);
      const run = one.start();
      await reach(run, last.reached);
      await one.shop.admin`insert into public.events (type, created_at) values ('late', ${`${one.day}T00:00:00Z`}::text::timestamptz)`;
      last.release();
      const error = "the counts differ: 7 rows were read, and the source has 8; no manifest was written";
      await assertDayFailed(one, await ending(run), error);
      await one.heal();
    });

    test("a part that is cut at 32 MB: its COPY has ended before it is put, and the next part starts after its last row", async (one) => {
      const { shop, day, startHeld } = one;
      await insertWide(shop, day, 470);
      const put = hold();
      const run = await startHeld(s3Steps.putPart, put, onePart);
      await until("no transaction", async () => (await sessions(shop)).every(({ state }) => state === "idle"));
      put.release();
      assert.equal((await ending(run)).code, 0);
      const [first = 0, second = 0, ...others] = (await assertArchivedClean(shop, day)).manifest.parts.map(({ bytes }) => bytes);
      assert.ok(first > 31 * 2 ** 20 && first <= 32 * 2 ** 20 && second > 0 && !others.length, `${[first, second, others]}`);
    });

    const pushed = async (shop: Shop): Promise<Record<string, number>> =>
      Object.fromEntries(Object.entries(await shop.metrics("events")).filter(([name]) => name.startsWith("etl_")));
    const yesterday = addDays(new Date().toISOString().slice(0, 10), -1);

    test("metrics: a backfill pushes nothing; a daily run its success and its watermark, or its failure", async ({ shop, proxy, heal }) => {
      await heal();
      assert.deepEqual(await pushed(shop), {});
      await shop.insertEvents(yesterday, 5);
      proxy.fault(ofDay(yesterday, s3Steps.putPart), refuse(403, "AccessDenied"), 1);
      assert.equal((await shop.run(daily, { S3_ENDPOINT: proxy.url })).code, 1);
      const failed = await pushed(shop);
      assert.ok((failed.etl_last_failure_timestamp_seconds ?? 0) > Date.parse(yesterday) / 1000);
      assert.ok(!("etl_last_success_timestamp_seconds" in failed || "etl_watermark_timestamp_seconds" in failed));
      assert.equal(await shop.watermark("events"), undefined);
      await shop.succeed(daily);
      const metrics = await pushed(shop);
      assert.equal(metrics.etl_rows, 5);
      assert.ok((metrics.etl_bytes ?? 0) > 50);
      assert.equal(metrics.etl_watermark_timestamp_seconds, Date.parse(addDays(yesterday)) / 1000);
      assert.ok((metrics.etl_last_success_timestamp_seconds ?? 0) > (metrics.etl_last_failure_timestamp_seconds ?? 0));
    });

    test("metrics: make verify-events of the last eight days pushes how many differ, one of FROM and TO nothing", async (one) => {
      const { shop } = one;
      await shop.succeed(daily);
      const verified = async (): Promise<(number | undefined)[]> => {
        const metrics = await pushed(shop);
        return [metrics.etl_verify_differences, metrics.etl_verify_last_success_timestamp_seconds];
      };
      const window = { FROM: addDays(yesterday, -1), TO: addDays(yesterday) };
      assert.equal((await shop.run(verifier, window)).code, 1);
      assert.deepEqual(await verified(), [undefined, undefined]);
      assert.equal((await shop.run(verifier)).code, 1);
      assert.deepEqual(await verified(), [7, undefined]); // older days are archived, these are not
      await shop.succeed(backfill, { ...window, FROM: addDays(yesterday, -7) });
      assert.match((await shop.succeed(verifier)).stderr, / days=8 rows=5 /);
      const [differences, success = 0] = await verified();
      assert.equal(differences, 0);
      assert.ok(success > Date.parse(yesterday) / 1000);
    });
  });
});
