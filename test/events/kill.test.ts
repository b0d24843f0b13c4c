/**
 * The archive when its run is killed, anywhere: a day is there whole, by its manifest, or not at all.
 *   SOAK=1  fifty kills
 */
import assert from "node:assert/strict";
import { utimesSync } from "node:fs";
import { suite, test } from "node:test";
import { setTimeout as delay } from "node:timers/promises";
import { addDays, daysBetween, readManifest } from "../../shared/events/archive.ts";
import { removeObjects } from "../../shared/events/s3.ts";
import { assertNoSessions, ending, type Fault, type Gate, hold, kill, lastRun, pass, reach, withhold } from "../lib/faults.ts";
import { random } from "../lib/random.ts";
import {
  archiveSuite,
  assertArchived,
  backfill,
  createS3Proxy,
  objectKeys,
  ofDay,
  readArchived,
  s3Steps,
  sourceEvents,
  strays,
} from "../lib/s3.ts";
import { createShop, type Process, type Shop, until } from "../lib/shop.ts";
import type { Env } from "../stack/env.ts";
import { stackPath } from "../stack/stack.ts";

const verify = "scripts/ops/verify-events.ts";
const soak = process.env.SOAK === "1";

suite("killed", { concurrency: true }, () => {
  test("at random points, again and again: every day ends up there once and whole, and what is left over is listed", async (t) => {
    const below = random();
    const [days, kills] = soak ? [100, 50] : [12, 8];
    const [from, to] = ["2017-02-01", addDays("2017-02-01", days)];
    await using shop = await createShop({ bigquery: false });
    for (const day of daysBetween(from, to)) await shop.insertEvents(day, 50 + below(250));
    // A day without rows, one of exactly two parts, and one where many rows share the timestamps at which parts are cut.
    await shop.admin.unsafe(`
      delete from public.events where created_at >= '2017-02-04Z' and created_at < '2017-02-06Z';
      update public.events set created_at = timestamptz '2017-02-06Z' + id % 3 * interval '6 hours'
        where created_at >= '2017-02-06Z' and created_at < '2017-02-07Z'`);
    await shop.insertEvents("2017-02-05", 120);
    const source = await sourceEvents(shop, from, to);

    /** What has a manifest can be read, whole; nothing else counts. */
    const whole = async (): Promise<number> => {
      const rows = await Promise.all(daysBetween(from, to).map((day) => readArchived(shop, day)));
      const ids = rows.flatMap((day) => day?.rows.map(({ id }) => id) ?? []);
      const archived = rows.flatMap((day) => day?.manifest.day ?? []);
      const of = new Set(archived);
      assert.deepEqual(
        ids,
        source.filter(({ created_at }) => of.has(created_at.slice(0, 10))).map(({ id }) => id),
      );
      return archived.length;
    };

    const window = { FROM: from, TO: to, CHUNK_ROWS: "60" };
    const write = /^(PUT|POST) /;
    let done = 0;
    const campaign = async (count: number, more: Env = {}): Promise<void> => {
      for (let n = 0; n < count; n++) {
        const writes = 1 + below(8);
        const how = ["before", "stored", "answered", "later"][below(4)] ?? "";
        const pause = below(150);
        const CONCURRENCY = n % 2 ? "3" : "1";
        await using proxy = await createS3Proxy(shop.env.S3_ENDPOINT);
        const answered = Promise.withResolvers<void>();
        const after: Fault = async ({ send, reply }) => {
          await reply(await send());
          answered.resolve();
        };
        const fault = (how === "before" ? hold() : how === "stored" ? withhold() : after) as Fault & Partial<Gate>;
        if (writes > 1) proxy.fault(write, pass, writes - 1);
        proxy.fault(write, fault, 1);
        const run = shop.start(backfill, { ...window, S3_ENDPOINT: proxy.url, CONCURRENCY, ...more });
        await reach(run, fault.reached ?? answered.promise);
        if (how === "later") await delay(pause);
        await kill(run);
        await assertNoSessions(shop);
        const there = await whole();
        assert.ok(there >= done, `${there} days are archived, and ${done} were before`);
        done = there;
        const at = proxy.requests.filter((line) => write.test(line))[writes - 1]?.replace(/\?.*|.*events\//g, "");
        t.diagnostic(`killed at write ${writes}, ${how}, CONCURRENCY=${CONCURRENCY}: ${at}; ${there} days`);
      }
    };

    await campaign(kills * 0.5);
    assert.ok(done < days, `${done} of ${days} days before the last backfill`);
    await shop.succeed(backfill, { ...window, CONCURRENCY: "3" });
    assert.equal(await whole(), days);
    // In the middle of archiving them again no day is ever without its rows.
    await campaign(kills * 0.5, { FORCE: "1" });
    assert.equal(done, days);
    const { stderr } = await shop.succeed(backfill, window);
    assert.match(stderr, new RegExp(` step=days archived=0 skipped=${days} failed=0`));

    const archived = await Promise.all(daysBetween(from, to).map((day) => assertArchived(shop, day)));
    assert.deepEqual(
      archived.flatMap(({ rows }) => rows),
      source,
    );
    const keys = await objectKeys(shop);
    assert.equal(keys.filter((key) => key.endsWith("/manifest.json")).length, days);
    const chunks = await shop.admin`select run_id, rows::int, state from etl.chunks order by chunk_from`;
    assert.deepEqual(
      [...chunks],
      archived.map(({ manifest: { run_id, rows } }) => ({ run_id, rows, state: "succeeded" })),
    );

    // Of what is left over, CLEAN=1 removes what is older than a day; whatever else is old stays.
    const [old, ...young] = (await strays(shop)).sort();
    assert.ok(old && young.length > 0, "a campaign that leaves nothing proves little");
    for (const key of keys) {
      const at = Date.now() / 1000 - 3600 * (young.includes(key) ? 23.9 : 24.1);
      utimesSync(stackPath("s3", shop.bucket.name, shop.bucket.prefix, key), at, at); // versitygw takes LastModified from the file
    }
    const { stderr: verified } = await shop.succeed(verify, { ...window, CLEAN: "1" });
    const line = / step=(stray|removed) what="a part that no manifest names" key="([^"]+)" age_hours=/g;
    const said = [...verified.matchAll(line)].map(([, step, key = ""]) => `${step} ${key.slice(shop.bucket.prefix.length)}`);
    assert.deepEqual(said.sort(), [`removed ${old}`, ...young.map((key) => `stray ${key}`)]);
    assert.deepEqual(
      await objectKeys(shop),
      keys.filter((key) => key !== old),
    );
  });

  archiveSuite("at one point", {}, (test) => {
    for (const late of [true, false]) {
      const when = late ? "long after" : "before the next run's";
      test(`before its manifest is put: the day is not done, and is archived under new keys; the manifest arrives ${when}`, async (one) => {
        const { shop, day, startHeld } = one;
        const [first, second] = [hold(), hold()];
        const killed = await startHeld(s3Steps.putManifest, first);
        await kill(killed);
        const parts = [1, 2, 3].map((n) => `events/dt=${day}/part-000${n}-${killed.id}.ndjson.gz`);
        assert.deepEqual(await objectKeys(shop, day), parts);
        const unfinished = await shop.run(verify, { FROM: day, TO: addDays(day) });
        assert.equal(unfinished.code, 1);
        assert.match(unfinished.stderr, new RegExp(`${day}: is not archived; the source has 7 rows of it`));

        // The killed run's request, which had been on its way: whoever comes first has the day.
        const next = await startHeld(s3Steps.putManifest, second);
        if (!late) first.release();
        if (!late) await until("the manifest is there", () => readManifest(shop.bucket, day));
        second.release();
        const { code, stderr } = await ending(next);
        assert.equal(code, 0, stderr);
        first.release();
        if (late) await delay(200);
        const { manifest } = await assertArchived(shop, day);
        assert.equal(manifest.run_id, (late ? next : killed).id);
        assert.deepEqual(await strays(shop, day), late ? parts : []);
        const lost = new RegExp(` step=lost day=${day} because="another run archived it meanwhile" holder=${killed.id}`);
        assert.equal(lost.test(stderr), !late, stderr);
      });
    }

    test("in a re-archive, while a reader reads: the reader always gets the whole day", async ({ shop, day, startHeld, heal }) => {
      await heal();
      const source = await sourceEvents(shop, day, addDays(day));
      let [reads, reading] = [0, true];
      const versions = new Set<string>();
      const reader = (async () => {
        while (reading) {
          const there = await readArchived(shop, day);
          assert.deepEqual(there?.rows, source);
          versions.add(there.etag);
          reads += 1;
          await delay(5);
        }
      })();
      reader.catch(() => {}); // it is awaited below
      const furtherReads = async (): Promise<void> => {
        const goal = reads + 2;
        await Promise.race([reader, until("the reader reads on", () => reads >= goal)]);
      };
      try {
        for (const [step, gate, killed] of [
          [ofDay(day, s3Steps.putPart), withhold(), true],
          [s3Steps.putManifest, hold(), true],
          [s3Steps.putManifest, withhold(), false],
          [s3Steps.deleteObjects, hold(), false],
          [s3Steps.deleteObjects, withhold(), true],
        ] as const) {
          const run = await startHeld(step, gate, { FORCE: "1" });
          await furtherReads();
          if (killed) await kill(run);
          gate.release();
          if (!killed) assert.equal((await ending(run)).code, 0);
          await furtherReads();
        }
      } finally {
        reading = false;
      }
      await reader;
      assert.ok(versions.size >= 4, `${reads} reads saw ${versions.size} manifests`);
      await assertArchived(shop, day);
    });
  });

  archiveSuite("stopped by SIGTERM", {}, (test) => {
    /** The run ends in time, and says how to resume. */
    const stop = async (shop: Shop, run: Process): Promise<void> => {
      run.child.kill("SIGTERM");
      const { code, stderr } = await ending(run);
      assert.equal(code, 1);
      const text = "stopped by SIGTERM. No chunk is half applied; days that are done stay so. To resume: the same command again";
      assert.ok(stderr.endsWith(`error: ${text}`), stderr);
      const { state, error } = await lastRun(shop);
      assert.deepEqual([state, error], ["failed", text]);
    };

    test("in mid-backfill, of days at once: the unfinished day is not done, and the same command resumes", async (one) => {
      const { shop, proxy, day, startHeld, heal } = one;
      const last = addDays(day, 3);
      for (const each of daysBetween(addDays(day), addDays(last))) await shop.insertEvents(each, 7);
      proxy.fault(ofDay(last, s3Steps.putPart), pass, 1);
      const run = await startHeld(ofDay(last, s3Steps.putPart), hold(), { CONCURRENCY: "3" }, 4);
      await until("the other days are done", async () => (await objectKeys(shop)).filter((key) => key.includes("manifest")).length === 3);
      await stop(shop, run);
      assert.equal(await readManifest(shop.bucket, last), undefined);
      await removeObjects(
        shop.bucket,
        (await strays(shop, last)).map((key) => shop.bucket.prefix + key),
      );
      assert.match((await heal({}, 4)).stderr, / step=days archived=1 skipped=3 failed=0/);
    });
  });
});
