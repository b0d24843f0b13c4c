// The archive of events where S3, its disk or the source fails, for a moment or for good: a day is whole or not there, the other days are
// archived, and the same command again mends it. Needs the local stack (make up).
import assert from "node:assert/strict";
import { type ChildProcess, spawn } from "node:child_process";
import { randomBytes } from "node:crypto";
import { once } from "node:events";
import { mkdtempSync, rmSync } from "node:fs";
import { type AddressInfo, connect, createServer, type Socket } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { buffer } from "node:stream/consumers";
import { after, before, suite, test } from "node:test";
import { gunzipSync } from "node:zlib";
import { addDays, type Manifest } from "../shared/events/archive.ts";
import {
  type Bucket,
  createBucket,
  getStream,
  getText,
  listObjects,
  listUploads,
  removeObjects,
} from "../shared/events/s3.ts";
import {
  assertNoSessions,
  copyBlocked,
  createPostgresProxy,
  ending,
  type Fault,
  type HttpProxy,
  hold,
  lastRun,
  loseAnswer,
  pass,
  reach,
  reset,
  sessions,
  trickle,
  withhold,
} from "./lib/faults.ts";
import { createS3Proxy, ofDay, refuse, s3Steps } from "./lib/s3.ts";
import { connectBucket, createShop, freePort, type Process, type Result, type Shop, until } from "./lib/shop.ts";
import type { Env } from "./stack/env.ts";
import { stackPath } from "./stack/stack.ts";

const script = "scripts/ops/backfill-events.ts";
const verifier = "scripts/ops/verify-events.ts";
const slowDown = refuse(503, "SlowDown");
/** Of the manifest: it is put by the first attempt, and found by the second. */
const loseAll: Fault = (exchange) => loseAnswer(exchange);

/** The keys of a day that are in the bucket, and the uploads that were begun and not ended. */
async function left({ bucket }: { bucket: Bucket }, day: string): Promise<string[]> {
  const folder = `${bucket.prefix}events/dt=${day}/`;
  const found: string[] = [];
  for await (const { key } of listObjects(bucket, folder)) found.push(key);
  for await (const { key } of listUploads(bucket, folder)) found.push(`upload of ${key}`);
  return found.sort();
}

/** A day of the archive is what the source has, each row once, in order, and nothing lies beside what its manifest names. */
async function assertRight(shop: Shop, day: string, bucket = shop.bucket): Promise<Manifest> {
  const object = await getText(bucket, `${bucket.prefix}events/dt=${day}/manifest.json`);
  const manifest = JSON.parse(object?.text ?? assert.fail(`${day} has no manifest`)) as Manifest;
  const parts = manifest.parts.map(({ key }) => key);
  assert.deepEqual(await left({ bucket }, day), [`${bucket.prefix}events/dt=${day}/manifest.json`, ...parts]);
  let text = "";
  for (const key of parts) text += gunzipSync(await buffer(await getStream(bucket, key))).toString();
  const archived = [...text.matchAll(/^\{"id":(\d+),/gm)].map((match) => Number(match[1]));
  const there = await shop.admin`
    select id::int from public.events where created_at >= ${`${day}Z`}::text::timestamptz and created_at < ${`${addDays(day)}Z`}::text::timestamptz
    order by created_at, id`;
  assert.deepEqual(
    archived,
    there.map(({ id }) => id),
  );
  assert.equal(manifest.rows, archived.length);
  return manifest;
}

const retries = ({ stderr }: Result): number => stderr.match(/step=retry /g)?.length ?? 0;

/** A day is not archived; what there is of it are parts, which verify lists: they are deleted as CLEAN=1 does after a day. */
async function assertOnlyStrays(shop: Shop, day: string): Promise<void> {
  const strays = await left(shop, day);
  const { code, stderr } = await shop.run(verifier, { FROM: day, TO: addDays(day) });
  assert.equal(code, 1);
  assert.match(
    stderr,
    new RegExp(`^  ${day}: is not archived; .* Next: make backfill-events FROM=${day} TO=${addDays(day)}$`, "m"),
  );
  const listed = [...stderr.matchAll(/ step=stray run=\w+ what="a part that no manifest names" key="(\S+)" age=/g)];
  assert.deepEqual(
    listed.map((match) => match[1]),
    strays,
  );
  await removeObjects(shop.bucket, strays);
}

interface Case {
  shop: Shop;
  proxy: HttpProxy;
  /** Of seven rows: in parts of three, three parts. The days after it have none yet. */
  day: string;
  /** Starts a backfill of so many days from `day` on, by way of the proxy. */
  start(variables?: Env, days?: number): Process;
  /** The same, to its end. */
  run(variables?: Env, days?: number): Promise<Result>;
  /** The same command again with nothing in its way mends it. */
  heal(variables?: Env, days?: number): Promise<Result>;
}

/** Tests that share a shop, one after the other; each has the days that it asks for to itself. At the end verify passes over all of them. */
function archiveSuite(
  name: string,
  tests: (test: (name: string, body: (one: Case) => Promise<void>) => void) => void,
): void {
  suite(name, { concurrency: 1 }, () => {
    let shop: Shop;
    let next = "2017-01-01";
    before(async () => {
      shop = await createShop({ pushgateway: name === "the source" });
    });
    after(() => shop?.[Symbol.asyncDispose]());
    tests((name, body) =>
      test(name, async () => {
        const day = next;
        next = addDays(day);
        await shop.insertEvents(day, 7);
        await using proxy = await createS3Proxy(shop.env.S3_ENDPOINT);
        const window = (days: number): Env => {
          const TO = addDays(day, days);
          if (TO > next) next = TO;
          return { FROM: day, TO, CHUNK_ROWS: "3" };
        };
        const start: Case["start"] = (variables = {}, days = 1) =>
          shop.start(script, { ...window(days), S3_ENDPOINT: proxy.url, ...variables });
        const heal: Case["heal"] = async (variables = {}, days = 1) => {
          const result = await shop.run(script, { ...window(days), ...variables });
          assert.equal(result.code, 0, result.stderr);
          for (let index = 0; index < days; index++) await assertRight(shop, addDays(day, index));
          return result;
        };
        await body({ shop, proxy, day, start, run: (...given) => ending(start(...given)), heal });
        await assertNoSessions(shop);
      }),
    );
    test("after all of it verify passes", async () => {
      const [FROM, TO] = ["2017-01-01", next];
      // Those that a test has archived elsewhere.
      await shop.succeed(script, { FROM, TO, CONCURRENCY: "8" });
      const { code, stderr } = await shop.run(verifier, { FROM, TO });
      assert.equal(code, 0, stderr);
    });
  });
}

/** Adds rows to a day that gzip cannot make smaller: each so many of 100 KB. */
async function insertWide(shop: Shop, day: string, count: number): Promise<void> {
  for (let index = 0; index < count; index++) {
    const payload = JSON.stringify({ noise: randomBytes(75_000).toString("base64") });
    await shop.admin`insert into public.events (type, payload, created_at) values ('wide', ${payload}::text::jsonb, ${`${day} 12:00Z`}::text::timestamptz)`;
  }
}
/** Of 9 MB. */
const large = 90;
const onePart = { CHUNK_ROWS: "1000" };

/** One day failed, of so many; it is listed, with its error, and what mends it. Nothing of it is in the bucket. */
async function assertDayFailed({ shop, day }: Case, result: Result, error: string, days = 1): Promise<void> {
  assert.equal(result.code, 1, result.stderr);
  const text = `^error: 1 of ${days} days failed(; the others are archived)?:\n  ${day}: ${error}\nNext: make backfill-events FROM=${day} TO=${addDays(day)} \\(days that are done are skipped\\)$`;
  assert.match(result.stderr, new RegExp(text, "m"));
  assert.match(result.stderr, new RegExp(` step=days archived=${days - 1} skipped=0 failed=1$`, "m"));
  assert.deepEqual(await left(shop, day), []);
  const { state, error: recorded } = await lastRun(shop);
  assert.equal(state, "failed");
  assert.match(recorded ?? "", new RegExp(error));
  const [chunk] =
    await shop.admin`select state, error from etl.chunks where chunk_from = ${`${day}Z`}::text::timestamptz`;
  assert.equal(chunk?.state, "failed");
  assert.match(chunk?.error, new RegExp(error));
}

const partOf = ({ shop, day }: Case, number = 1): string =>
  `s3://archive/${shop.bucket.prefix}events/dt=${day}/part-000${number}-\\w+\\.ndjson\\.gz`;

suite("archive", { concurrency: true }, () => {
  archiveSuite("S3 fails for a moment: the day is done, and nothing is left beside it", (test) => {
    for (const { when, step, fault, times, again, wide = false } of [
      {
        when: "503 to a part once: S3's client sends it again",
        step: s3Steps.putPart,
        fault: slowDown,
        times: 1,
        again: 0,
      },
      {
        when: "503 to the last part three times: the day begins anew",
        step: /part-0003-/,
        fault: slowDown,
        times: 3,
        again: 1,
      },
      {
        when: "503 to the manifest three times: the first attempt's parts are gone again, too",
        step: s3Steps.putManifest,
        fault: slowDown,
        times: 3,
        again: 1,
      },
      { when: "503 to the look for a manifest", step: s3Steps.getManifest, fault: slowDown, times: 3, again: 1 },
      { when: "the connection reset before a part", step: s3Steps.putPart, fault: reset(), times: 3, again: 1 },
      {
        when: "the connection lost after a part that was put",
        step: s3Steps.putPart,
        fault: loseAnswer,
        times: 3,
        again: 1,
      },
      {
        when: "the connection reset before the manifest",
        step: s3Steps.putManifest,
        fault: reset(),
        times: 1,
        again: 0,
      },
      {
        when: "the connection lost after the manifest was put",
        step: s3Steps.putManifest,
        fault: loseAnswer,
        times: 1,
        again: 0,
      },
      { when: "every answer to the manifest lost", step: s3Steps.putManifest, fault: loseAll, times: 3, again: 1 },
      {
        when: "the connection lost once after a part that was put: the client's next request meets it",
        step: s3Steps.putPart,
        fault: loseAnswer,
        times: 1,
        again: 0,
      },
      {
        when: "the connection reset in the middle of a large part",
        step: s3Steps.putPart,
        fault: reset(100_000),
        times: 3,
        again: 1,
        wide: true,
      },
    ]) {
      test(when, async ({ shop, proxy, day, run }) => {
        if (wide) await insertWide(shop, day, large);
        proxy.fault(step, fault, times);
        const result = await run(wide ? onePart : {});
        assert.equal(result.code, 0, result.stderr);
        assert.equal(retries(result), again, result.stderr);
        const { parts, run_id } = await assertRight(shop, day);
        assert.match(result.stderr, /step=days archived=1 skipped=0 failed=0$/m);
        const suffix = again && fault !== loseAll ? `_${again + 1}` : "";
        assert.deepEqual(
          parts.map(({ key }) => key.slice(key.indexOf("part-"))),
          parts.map((_, index) => `part-000${index + 1}-${run_id}${suffix}.ndjson.gz`),
        );
      });
    }

    test("an S3 that answers late costs time only", async ({ proxy, shop, day, run }) => {
      proxy.fault(s3Steps.anything, async (exchange) => {
        await new Promise((resolve) => setTimeout(resolve, 300));
        await pass(exchange);
      });
      const result = await run();
      assert.equal(result.code, 0, result.stderr);
      assert.equal(retries(result), 0);
      await assertRight(shop, day);
    });
  });

  archiveSuite("S3 fails for good: that day is named, and the others are archived", (test) => {
    test("503 to a day's parts: four attempts", async (one) => {
      const { shop, proxy, day, run, heal } = one;
      await shop.insertEvents(addDays(day, 2), 4);
      proxy.fault(ofDay(day, s3Steps.putPart), slowDown);
      const result = await run({}, 3);
      await assertDayFailed(one, result, `${partOf(one)}: SlowDown 503 answered 503 by the test`, 3);
      assert.equal(retries(result), 3);
      const waits = [...result.stderr.matchAll(/ step=retry attempt=(\d) in_seconds=(\S+) error="(.*)"$/gm)];
      assert.deepEqual(
        waits.map((match) => match[1]),
        ["1", "2", "3"],
      );
      for (const [index, [, , seconds, error]] of waits.entries()) {
        assert.ok(Number(seconds) >= 0.7 * 2 ** index && Number(seconds) <= 1.3 * 2 ** index, seconds);
        assert.match(error ?? "", new RegExp(partOf(one)));
      }
      await assertRight(shop, addDays(day));
      await assertRight(shop, addDays(day, 2));
      const { stderr } = await heal({}, 3);
      assert.match(stderr, /step=days archived=1 skipped=2 failed=0/);
    });

    test("403 to a day that is archived again: it stays as it was, and the command to run archives it again", async ({
      shop,
      proxy,
      day,
      run,
      heal,
    }) => {
      await heal();
      const stays = await assertRight(shop, day);
      proxy.fault(ofDay(day, s3Steps.putPart), refuse(403, "AccessDenied"));
      const { code, stderr } = await run({ FORCE: "1" });
      assert.equal(code, 1);
      assert.deepEqual(await assertRight(shop, day), stays);
      assert.match(stderr, new RegExp(`^Next: make backfill-events FROM=${day} TO=${addDays(day)} FORCE=1( |$)`, "m"));
    });

    test("403 to a part: not tried again", async (one) => {
      one.proxy.fault(ofDay(one.day, s3Steps.putPart), refuse(403, "AccessDenied"));
      const result = await one.run({}, 2);
      await assertDayFailed(one, result, `${partOf(one)}: AccessDenied 403 answered 403 by the test`, 2);
      assert.equal(retries(result), 0);
      await one.heal({}, 2);
    });

    test("403 to a day's last part: the parts before it are gone again", async (one) => {
      one.proxy.fault(/part-0003-/, refuse(403, "AccessDenied"));
      await assertDayFailed(one, await one.run(), `${partOf(one, 3)}: AccessDenied 403 answered 403 by the test`);
      await one.heal();
    });

    test("403 to the manifest: the day is not there; its parts, which a manifest may yet name, are what verify lists", async ({
      shop,
      proxy,
      day,
      run,
      heal,
    }) => {
      proxy.fault(s3Steps.putManifest, refuse(403, "AccessDenied"));
      const { code, stderr } = await run();
      assert.equal(code, 1);
      const manifest = `s3://archive/${shop.bucket.prefix}events/dt=${day}/manifest\\.json`;
      assert.match(stderr, new RegExp(`^  ${day}: ${manifest}: AccessDenied 403 answered 403 by the test$`, "m"));
      await assertOnlyStrays(shop, day);
      await heal();
    });

    test("it refuses connections from the start", async ({ shop, day, heal, run }) => {
      const S3_ENDPOINT = `http://127.0.0.1:${await freePort()}`;
      const { code, stderr, seconds } = await run({ S3_ENDPOINT });
      assert.equal(code, 1);
      assert.match(stderr, /^error: s3:\/\/archive\/: .*ECONNREFUSED/m);
      assert.ok(seconds < 20);
      assert.deepEqual(await left(shop, day), []);
      const verify = await shop.run(verifier, { FROM: day, TO: addDays(day), S3_ENDPOINT });
      assert.equal(verify.code, 1);
      assert.match(verify.stderr, /^error: s3:\/\/archive\/: .*ECONNREFUSED/m);
      await heal();
    });

    test("it goes away in mid-run", async (one) => {
      const { proxy, start, heal } = one;
      const second = hold();
      proxy.fault(s3Steps.putPart, pass, 1);
      proxy.fault(s3Steps.putPart, second);
      const run = start();
      await reach(run, second.reached);
      await proxy[Symbol.asyncDispose]();
      const result = await ending(run);
      assert.equal(result.code, 1);
      assert.equal(retries(result), 3);
      assert.match(result.stderr, new RegExp(`^  ${one.day}: s3://archive/\\S+: .*ECONNREFUSED`, "m"));
      // The first part cannot be deleted, since nothing can: that is said, and the next command that can lists it.
      assert.match(
        result.stderr,
        new RegExp(
          `step=warning warning="parts of ${one.day} were left that no manifest names; make verify-events removes them with CLEAN=1"`,
        ),
      );
      await assertOnlyStrays(one.shop, one.day);
      await heal();
    });

    test("its disk is full", async (one) => {
      const { shop, day, run } = one;
      await insertWide(shop, day, 20);
      await insertWide(shop, addDays(day, 2), large);
      await using full = await startS3(shop.env, 1000);
      await createBucket(full.bucket, "us-east-1");
      const variables = { S3_ENDPOINT: full.url, CHUNK_ROWS: "1000", CONCURRENCY: "3" };
      const result = await run(variables, 3);
      assert.equal(result.code, 1);
      for (const failed of [day, addDays(day, 2)]) {
        assert.match(
          result.stderr,
          new RegExp(`^  ${failed}: s3://archive/\\S+/dt=${failed}/part-0001-\\w+\\.ndjson\\.gz: `, "m"),
        );
        assert.deepEqual(await left(full, failed), []);
      }
      await assertRight(shop, addDays(day), full.bucket);
      await full.restart();
      const healed = await run(variables, 3);
      assert.equal(healed.code, 0, healed.stderr);
      for (const days of [0, 1, 2]) await assertRight(shop, addDays(day, days), full.bucket);
    });

    for (const { when, variables, error } of [
      {
        when: "a wrong secret key",
        variables: { AWS_SECRET_ACCESS_KEY: "not-this-one" },
        error: "SignatureDoesNotMatch",
      },
      {
        when: "a wrong key id",
        variables: { AWS_ACCESS_KEY_ID: "nobody" },
        error: "(InvalidAccessKeyId|XAdminUserNotFound)",
      },
      { when: "a wrong region", variables: { AWS_REGION: "eu-central-1" }, error: "AuthorizationHeaderMalformed" },
    ]) {
      test(`${when} is named before a row moves: exit 2`, async ({ shop, proxy, day, run }) => {
        for (const command of [
          () => run(variables),
          () => shop.run(verifier, { FROM: day, TO: addDays(day), ...variables }),
        ]) {
          const { code, stderr } = await command();
          assert.equal(code, 2, stderr);
          assert.match(
            stderr,
            new RegExp(
              `^error: bucket archive \\(S3_BUCKET\\) may not be used: ${error} .+\\. Check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION and the bucket's policy$`,
              "m",
            ),
          );
          assert.doesNotMatch(stderr, /not-this-one|local-only/);
        }
        assert.ok(!proxy.requests.some((line) => line.startsWith("PUT")));
        assert.equal((await lastRun(shop)).state, "failed");
      });
    }

    test("a bucket that is missing: exit 2, and make migrate", async ({ shop, day, run }) => {
      const S3_BUCKET = "there-is-no-such-bucket";
      for (const command of [
        () => run({ S3_BUCKET }),
        () => shop.run(verifier, { FROM: day, TO: addDays(day), S3_BUCKET }),
      ]) {
        const { code, stderr } = await command();
        assert.equal(code, 2);
        assert.match(
          stderr,
          /^error: bucket there-is-no-such-bucket \(S3_BUCKET\) does not exist\. Run: make migrate$/m,
        );
      }
    });
  });

  archiveSuite("S3 that is silent, and the pace", (test) => {
    const deadline = { RUN_TIMEOUT_SECONDS: "4" };
    const text =
      /^error: the run's deadline of 4 s \(RUN_TIMEOUT_SECONDS\) has passed\. No chunk is half applied; days that are done stay so\. To resume: the same command again$/m;

    for (const { when, step, fault = hold, wide = false } of [
      { when: "the look at the bucket", step: s3Steps.list },
      { when: "the look for a manifest, at a byte every half second", step: s3Steps.getManifest, fault: () => trickle },
      { when: "a part", step: s3Steps.putPart },
      { when: "a part that was put", step: s3Steps.putPart, fault: withhold },
      { when: "a large part", step: s3Steps.putPart, wide: true },
    ]) {
      test(`${when}: the run meets its deadline, and leaves nothing`, async ({ shop, proxy, day, run, heal }) => {
        if (wide) await insertWide(shop, day, large);
        proxy.fault(step, fault());
        const { code, stderr, seconds } = await run({ ...deadline, ...(wide && onePart) });
        assert.equal(code, 1);
        assert.match(stderr, text);
        assert.ok(seconds < 20, `${seconds} s`);
        assert.deepEqual(await left(shop, day), []);
        assert.equal((await lastRun(shop)).state, "failed");
        await assertNoSessions(shop);
        await heal(wide ? onePart : {});
      });
    }

    test("the manifest, which was put: the run meets its deadline, and the day is done", async ({
      shop,
      proxy,
      day,
      run,
      heal,
    }) => {
      proxy.fault(s3Steps.putManifest, withhold());
      const { code, stderr } = await run(deadline);
      assert.equal(code, 1);
      assert.match(stderr, text);
      await assertRight(shop, day);
      assert.match((await heal()).stderr, /step=days archived=0 skipped=1 failed=0/);
    });

    test("everything from the first part on, the deleting too: the run ends all the same", async ({
      proxy,
      start,
      heal,
    }) => {
      const part = hold();
      proxy.fault(s3Steps.putPart, part, 1);
      const run = start(deadline);
      await reach(run, part.reached);
      proxy.fault(s3Steps.anything, hold());
      const { code, stderr, seconds } = await ending(run);
      assert.equal(code, 1);
      assert.match(stderr, text);
      assert.ok(seconds < 25, `${seconds} s: the deadline, and undoing costs at most 5 s`);
      await heal();
    });

    test("the deadline is a day's: a backfill of days that are each shorter, and together longer, succeeds", async ({
      shop,
      day,
      run,
    }) => {
      for (const index of [0, 1, 2, 3]) await shop.insertEvents(addDays(day, index), index ? 400 : 393);
      const result = await run({ RUN_TIMEOUT_SECONDS: "6", MAX_ROWS_PER_SECOND: "200", CHUNK_ROWS: "100" }, 4);
      assert.equal(result.code, 0, result.stderr);
      assert.ok(result.seconds > 7.9, `${result.seconds} s`);
      for (const index of [0, 1, 2, 3]) await assertRight(shop, addDays(day, index));
    });

    for (const { when, days, variables } of [
      { when: "in one part", days: 1, variables: { CHUNK_ROWS: "10000" } },
      { when: "in many", days: 1, variables: { CHUNK_ROWS: "40" } },
      { when: "of days at once, all together", days: 3, variables: { CHUNK_ROWS: "1000", CONCURRENCY: "3" } },
    ]) {
      test(`MAX_ROWS_PER_SECOND limits the rows ${when}`, async ({ shop, day, run }) => {
        for (let index = 0; index < days; index++)
          await shop.insertEvents(addDays(day, index), 1500 / days - (index ? 0 : 7));
        const result = await run({ MAX_ROWS_PER_SECOND: "500", ...variables }, days);
        assert.equal(result.code, 0, result.stderr);
        const [, rows, seconds] = /step=done rows=(\d+) .* seconds=(\S+) /.exec(result.stderr) ?? [];
        assert.equal(rows, "1500");
        assert.ok(Number(seconds) >= 2.95, `1500 rows at 500 a second took ${seconds} s`);
      });
    }
  });

  archiveSuite("the source", (test) => {
    test("its backend terminated in mid-COPY: the day fails, and leaves nothing", async (one) => {
      const { shop, day, start, heal } = one;
      await insertWide(shop, day, 250);
      const run = start({ ...onePart, MAX_ROWS_PER_SECOND: "20" }, 2); // so that the COPY waits
      await shop.admin`select pg_terminate_backend(${await copyBlocked(shop)})`;
      const error = `reading the source failed after \\d+ rows: (terminating connection due to administrator command|write CONNECTION_CLOSED).*`;
      await assertDayFailed(one, await ending(run), error, 2);
      await heal(onePart, 2);
    });

    for (const how of ["reset", "fin", "stall"] as const) {
      test(`its connection ends in mid-COPY by a ${how} at a row's end: the day fails, and leaves nothing`, async (one) => {
        const { shop, day, run, heal } = one;
        await insertWide(shop, day, 30);
        await using source = await createPostgresProxy(shop.env.SOURCE_DATABASE_URL, how, 1_000_000);
        const timeout = how === "stall" ? { RUN_TIMEOUT_SECONDS: "4" } : {};
        const result = await run({ SOURCE_DATABASE_URL: source.url, ...onePart, ...timeout }, 1);
        if (how === "stall") {
          assert.equal(result.code, 1);
          assert.match(result.stderr, /error: the run's deadline of 4 s/);
          assert.deepEqual(await left(shop, day), []);
        } else {
          const error = `reading the source failed after \\d+ rows: .*(ECONNRESET|CONNECTION_CLOSED).*`;
          await assertDayFailed(one, result, error);
        }
        await heal(onePart);
      });
    }

    test("a COPY that is short by a row is caught by the count, and the day is read again", async ({
      shop,
      day,
      run,
    }) => {
      await using source = await createLossyProxy(shop.env.SOURCE_DATABASE_URL, 1);
      const result = await run({ SOURCE_DATABASE_URL: source.url });
      assert.equal(result.code, 0, result.stderr);
      assert.match(
        result.stderr,
        new RegExp(
          `step=retry attempt=1 in_seconds=\\S+ error="the counts differ: \\d rows of ${day} were archived, and the source has 7; no manifest was written"`,
        ),
      );
      await assertRight(shop, day);
    });

    test("COPYs that are short each time: the day fails, and leaves nothing", async (one) => {
      const { shop, run, heal, day } = one;
      await using source = await createLossyProxy(shop.env.SOURCE_DATABASE_URL, Number.POSITIVE_INFINITY);
      const error = `the counts differ: 0 rows of ${day} were archived, and the source has 7; no manifest was written`;
      await assertDayFailed(one, await run({ SOURCE_DATABASE_URL: source.url }), error);
      await heal();
    });

    for (const { when, change, found } of [
      {
        when: "a row written with an old created_at",
        change: "insert into public.events (type, created_at) values ('late', $1::text::timestamptz)",
        found: 8,
      },
      { when: "a row deleted", change: "delete from public.events where created_at = $1::text::timestamptz", found: 6 },
    ]) {
      test(`${when} between the parts and the count: the day is read again, and is right`, async ({
        shop,
        proxy,
        day,
        start,
      }) => {
        const last = hold();
        proxy.fault(/part-0003-/, last, 1);
        const run = start();
        await reach(run, last.reached);
        await shop.admin.unsafe(change, [`${day}T00:00:00Z`]);
        last.release();
        const result = await ending(run);
        assert.equal(result.code, 0, result.stderr);
        assert.match(
          result.stderr,
          new RegExp(`error="the counts differ: 7 rows of ${day} were archived, and the source has ${found};`),
        );
        const { rows, parts, run_id } = await assertRight(shop, day);
        assert.equal(rows, found);
        assert.ok(parts.every(({ key }) => key.endsWith(`-${run_id}_2.ndjson.gz`)));
      });
    }

    test("a part that is cut at 32 MB: its COPY has ended before it is put, and the next part starts after its last row", async ({
      shop,
      proxy,
      day,
      start,
    }) => {
      await insertWide(shop, day, 450);
      const put = hold();
      proxy.fault(s3Steps.putPart, put, 1);
      const run = start(onePart);
      await reach(run, put.reached);
      await until("no COPY", async () => (await sessions(shop)).every(({ state }) => state !== "active"), 3);
      put.release();
      const { code, stderr } = await ending(run);
      assert.equal(code, 0, stderr);
      const [first = 0, second = 0, ...others] = (await assertRight(shop, day)).parts.map(({ bytes }) => bytes);
      assert.ok(first > 31 * 2 ** 20 && first <= 32 * 2 ** 20 && second > 0, `${[first, second]}`);
      assert.deepEqual(others, []);
    });

    test("metrics: a backfill pushes nothing; a daily run its rows, its success and its watermark; one that fails its failure", async ({
      shop,
      proxy,
      heal,
    }) => {
      const pushed = async (): Promise<Record<string, number>> =>
        Object.fromEntries(Object.entries(await shop.metrics("events")).filter(([name]) => name.startsWith("etl_")));
      await heal();
      assert.deepEqual(await pushed(), {});
      const [today] =
        await shop.admin`select (now() at time zone 'UTC')::date::text as day, extract(epoch from now())::float8 as now`;
      const yesterday = addDays(today?.day, -1);
      await shop.insertEvents(yesterday, 5);
      const S3_ENDPOINT = proxy.url;
      proxy.fault(ofDay(yesterday, s3Steps.putPart), refuse(403, "AccessDenied"), 1);
      const failed = await shop.run("scripts/events.ts", { S3_ENDPOINT });
      assert.equal(failed.code, 1);
      assert.match(
        failed.stderr,
        new RegExp(
          `step=first-run archives=${yesterday} older_days_from=2017-01-01 next="make backfill-events FROM=2017-01-01 TO=${yesterday}"`,
        ),
      );
      assert.deepEqual(Object.keys(await pushed()).sort(), [
        "etl_last_failure_timestamp_seconds",
        "etl_last_run_timestamp_seconds",
        "etl_unknown_source_columns",
        "etl_watermark_hold_seconds",
      ]);
      assert.equal(await shop.watermark("events"), undefined);
      await shop.succeed("scripts/events.ts");
      const metrics = await pushed();
      assert.equal(metrics.etl_rows, 5);
      assert.ok((metrics.etl_bytes ?? 0) > 50);
      assert.equal(metrics.etl_watermark_timestamp_seconds, Date.parse(today?.day) / 1000);
      for (const name of ["etl_last_success_timestamp_seconds", "etl_last_run_timestamp_seconds"])
        assert.ok(Math.abs((metrics[name] ?? 0) - today?.now) < 60, name);
      assert.ok((metrics.etl_last_success_timestamp_seconds ?? 0) > (metrics.etl_last_failure_timestamp_seconds ?? 0));
      await heal({ FORCE: "1" });
      assert.deepEqual(await pushed(), metrics);
      assert.equal(await shop.watermark("events"), `${today?.day}T00:00:00+00`);
    });
  });
});

interface OwnS3 extends AsyncDisposable {
  url: string;
  bucket: Bucket;
  /** Starts it again over the same folder, with no limit. */
  restart(): Promise<void>;
}

/** An S3 server of the test's own, which cannot write a file of more than so many KB: what it sees of a full disk. */
async function startS3(env: Env, limit: number): Promise<OwnS3> {
  const folder = mkdtempSync(join(tmpdir(), "etl-s3-"));
  const port = await freePort();
  const url = `http://127.0.0.1:${port}`;
  let child: ChildProcess;
  const start = async (ulimit: string): Promise<void> => {
    const server = `exec ${stackPath("bin", "versitygw")} --port=127.0.0.1:${port} --region=${env.AWS_REGION} --health=/health --quiet posix ${folder}`;
    child = spawn("bash", ["-c", `trap '' XFSZ; ulimit -f ${ulimit}; ${server}`], {
      env: { ROOT_ACCESS_KEY_ID: env.AWS_ACCESS_KEY_ID, ROOT_SECRET_ACCESS_KEY: env.AWS_SECRET_ACCESS_KEY },
      stdio: "ignore",
    });
    await until("the S3 server answers", () =>
      fetch(`${url}/health`).then(
        ({ ok }) => ok,
        () => false,
      ),
    );
  };
  const stop = async (): Promise<void> => {
    const gone = once(child, "close");
    child.kill("SIGKILL");
    await gone;
  };
  await start(String(limit));
  const bucket = connectBucket({ ...env, S3_ENDPOINT: url });
  return {
    url,
    bucket,
    restart: async () => {
      await stop();
      await start("unlimited");
    },
    [Symbol.asyncDispose]: async () => {
      bucket.client.destroy();
      await stop();
      rmSync(folder, { recursive: true, force: true });
    },
  };
}

/** A TCP proxy in front of a Postgres in which the first rows of COPYs get lost: a stream that is short, and ends well. */
async function createLossyProxy(target = "", rows: number): Promise<AsyncDisposable & { url: string }> {
  const url = new URL(target);
  const [host, port] = [url.hostname, Number(url.port)];
  const sockets = new Set<Socket>();
  let lost = 0;
  const server = createServer((client) => {
    const upstream = connect(port, host);
    for (const socket of [client, upstream]) {
      sockets.add(socket);
      socket.on("error", () => {}).on("close", () => sockets.delete(socket));
    }
    client.pipe(upstream);
    let pending = Buffer.alloc(0);
    upstream.on("data", (data: Buffer) => {
      pending = Buffer.concat([pending, data]);
      while (pending.length >= 5 && pending.length > pending.readUInt32BE(1)) {
        const end = 1 + pending.readUInt32BE(1);
        const row = pending[0] === "d".charCodeAt(0);
        if (row && lost < rows) lost += 1;
        else client.write(pending.subarray(0, end));
        pending = pending.subarray(end);
      }
    });
    upstream.on("close", () => client.end());
    client.on("close", () => upstream.destroy());
  });
  server.listen(0, "127.0.0.1");
  await once(server, "listening");
  url.hostname = "127.0.0.1";
  url.port = String((server.address() as AddressInfo).port);
  return {
    url: url.href,
    [Symbol.asyncDispose]: async () => {
      for (const socket of sockets) socket.destroy();
      server.close();
      await once(server, "close");
    },
  };
}
