/**
 * The archive when its run is killed, anywhere: a day is there whole, by its manifest, or not at all.
 *   SOAK=1  fifty kills
 */
import assert from "node:assert/strict";
import { utimesSync } from "node:fs";
import { after, before, suite, test } from "node:test";
import { setTimeout as delay } from "node:timers/promises";
import { addDays, daysBetween, readManifest } from "../../shared/events/archive.ts";
import { assertNoSessions, ending, type Fault, type Gate, hold, kill, lastRun, pass, reach, withhold } from "../lib/faults.ts";
import { random } from "../lib/random.ts";
import {
  assertArchived,
  assertArchivedClean,
  createS3Proxy,
  objectKeys,
  ofDay,
  readArchived,
  s3Steps,
  sourceEvents,
  startHeld,
  strays,
  suiteOfDays,
} from "../lib/s3.ts";
import { createShop, type Process, type Shop, until } from "../lib/shop.ts";
import type { Env } from "../stack/env.ts";
import { stackPath } from "../stack/stack.ts";

const script = "scripts/ops/backfill-events.ts";
const verify = "scripts/ops/verify-events.ts";
const soak = process.env.SOAK === "1";
const backfill = (from: string, to: string, more: Env = {}): Env => ({
  FROM: from,
  TO: to,
  CHUNK_ROWS: "60",
  ...more,
});

/** Inserts rows whose part is more than 5 MB: all have one random text, which is longer than what gzip looks back. */
async function insertWide(shop: Shop, day: string): Promise<void> {
  await shop.admin`
    insert into public.events (user_id, type, payload, created_at)
    select i, 'wide', jsonb_build_object('text', (
        select encode(string_agg(uuid_send(gen_random_uuid()), ''), 'base64') from generate_series(1, 1900))),
      ${day}::text::timestamptz + i * interval '1 second'
    from generate_series(1, 180) i`;
}

/** What `make verify-events` says of the strays: it exits 0. */
async function verified(shop: Shop, from: string, to: string, variables: Env = {}): Promise<Record<string, string[]>> {
  const { stderr } = await shop.succeed(verify, { FROM: from, TO: to, ...variables });
  assert.match(stderr, / failed=0 /);
  const said: Record<string, string[]> = { stray: [], removed: [] };
  const line =
    / step=(stray|removed) what="a part that no manifest names" key="([^"]+)" age=(?:"[^"]+"|\S+)(?: next="CLEAN=1 deletes it once it is older than a day")?$/gm;
  for (const [, step, key] of stderr.matchAll(line)) said[step ?? ""]?.push((key ?? "").slice(shop.bucket.prefix.length));
  return { stray: (said.stray ?? []).sort(), removed: (said.removed ?? []).sort() };
}

/** Sets an object's LastModified back, by so many hours: versitygw takes it from the file. */
function age(shop: Shop, key: string, hours: number): void {
  const at = Date.now() / 1000 - hours * 3600;
  utimesSync(stackPath("s3", shop.bucket.name, shop.bucket.prefix, key), at, at);
}

suite("killed", { concurrency: true }, () => {
  test("at random points, again and again: every day ends up there once and whole, and what is left over is listed", async (t) => {
    const below = random();
    const [days, kills] = soak ? [100, 50] : [20, 10];
    const [from, to] = ["2017-02-01", addDays("2017-02-01", days)];
    await using shop = await createShop({ bigquery: false });
    for (const day of daysBetween(from, to)) await shop.insertEvents(day, 50 + below(250));
    // A day without rows, one of exactly two parts, and one where many rows share the timestamps at which parts are cut.
    await shop.admin`delete from public.events where created_at >= ${"2017-02-04Z"}::text::timestamptz and created_at < ${"2017-02-05Z"}::text::timestamptz`;
    await shop.admin`delete from public.events where created_at >= ${"2017-02-05Z"}::text::timestamptz and created_at < ${"2017-02-06Z"}::text::timestamptz`;
    await shop.insertEvents("2017-02-05", 120);
    await shop.admin`update public.events set created_at = date_trunc('day', created_at at time zone 'UTC') at time zone 'UTC' + id % 3 * interval '6 hours'
      where created_at >= ${"2017-02-06Z"}::text::timestamptz and created_at < ${"2017-02-07Z"}::text::timestamptz`;
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

    const write = /^(PUT|POST) /;
    let done = 0;
    const campaign = async (count: number, more: Env = {}): Promise<void> => {
      for (let n = 0; n < count; n++) {
        const writes = 1 + below(8);
        const how = ["before", "stored", "answered", "later"][below(4)] ?? "";
        const pause = below(150);
        const concurrency = n % 2 ? "3" : "1";
        await using proxy = await createS3Proxy(shop.env.S3_ENDPOINT);
        const answered = Promise.withResolvers<void>();
        const after: Fault = async ({ send, reply }) => {
          await reply(await send());
          answered.resolve();
        };
        const faults: Record<string, Gate | Fault> = {
          before: hold(),
          stored: withhold(),
          answered: after,
          later: after,
        };
        const fault = faults[how] as Gate;
        if (writes > 1) proxy.fault(write, pass, writes - 1);
        proxy.fault(write, fault, 1);
        const run = shop.start(script, backfill(from, to, { S3_ENDPOINT: proxy.url, CONCURRENCY: concurrency, ...more }));
        await reach(run, fault.reached ?? answered.promise);
        if (how === "later") await delay(pause);
        await kill(run);
        await assertNoSessions(shop);
        const there = await whole();
        assert.ok(there >= done, `${there} days are archived, and ${done} were before`);
        done = there;
        const at = proxy.requests.filter((line) => write.test(line))[writes - 1]?.replace(/\?.*|.*events\//g, "");
        t.diagnostic(`killed at write ${writes}, ${how}, CONCURRENCY=${concurrency}: ${at}; ${there} days`);
      }
    };

    await campaign(kills * 0.6);
    assert.ok(done < days, `${done} of ${days} days before the last backfill`);
    await shop.succeed(script, backfill(from, to, { CONCURRENCY: "3" }));
    assert.equal(await whole(), days);
    // In the middle of archiving them again no day is ever without its rows.
    await campaign(kills * 0.4, { FORCE: "1" });
    assert.equal(done, days);
    const { stderr } = await shop.succeed(script, backfill(from, to));
    assert.match(stderr, new RegExp(` step=days archived=0 skipped=${days} failed=0`));

    const archived = await Promise.all(daysBetween(from, to).map((day) => assertArchived(shop, day)));
    assert.deepEqual(
      archived.flatMap(({ rows }) => rows),
      source,
    );
    const keys = await objectKeys(shop);
    assert.equal(keys.filter((key) => key.endsWith("/manifest.json")).length, days);
    const chunks = await shop.admin`select run_id, rows::int, bytes::int, state from etl.chunks order by chunk_from`;
    assert.deepEqual(
      [...chunks],
      archived.map(({ manifest: { run_id, rows, parts } }) => ({
        run_id,
        rows,
        bytes: parts.reduce((sum, { bytes }) => sum + bytes, 0),
        state: "succeeded",
      })),
    );

    const left = await strays(shop);
    assert.ok(left.length > 0, "a campaign that leaves nothing proves little");
    assert.deepEqual(await verified(shop, from, to), { stray: left, removed: [] });
    assert.deepEqual(await verified(shop, from, to, { CLEAN: "1" }), { stray: left, removed: [] });
    assert.deepEqual(await objectKeys(shop), keys);
    // Old ones go, whatever else is old stays.
    const parts = left.filter((key) => keys.includes(key));
    const old = parts.filter((_, at) => at % 2 === 0);
    for (const key of keys) if (!left.includes(key) || old.includes(key)) age(shop, key, 24.1);
    for (const key of parts.filter((each) => !old.includes(each))) age(shop, key, 23.9);
    const young = left.filter((key) => !old.includes(key));
    assert.deepEqual(await verified(shop, from, to, { CLEAN: "1" }), { stray: young, removed: old });
    assert.deepEqual(
      await objectKeys(shop),
      keys.filter((key) => !old.includes(key)),
    );
  });

  suiteOfDays("at one point", "2018-01-01", (shopOf, nextDay) => {
    const one = (of: string, more: Env = {}): Env => backfill(of, addDays(of), more);

    for (const late of ["long after", "before the next run's"]) {
      test(`before its manifest is put: the day is not done, and is archived under new keys; the manifest arrives ${late}`, async () => {
        const [shop, of] = [shopOf(), await nextDay()];
        const [first, second] = [hold(), hold()];
        await using killed = await startHeld(shop, script, one(of), s3Steps.putManifest, first);
        const { id: run_id } = killed;
        await kill(killed);
        const parts = [1, 2, 3].map((n) => `events/dt=${of}/part-000${n}-${run_id}.ndjson.gz`);
        assert.deepEqual(await objectKeys(shop, of), parts);
        const unfinished = await shop.run(verify, { FROM: of, TO: addDays(of) });
        assert.equal(unfinished.code, 1);
        assert.match(unfinished.stderr, new RegExp(`${of}: is not archived; the source has 150 rows of it`));

        await using next = await startHeld(shop, script, one(of), s3Steps.putManifest, second);
        const arrive = async (): Promise<void> => {
          const seen = await readManifest(shop.bucket, of);
          first.release();
          // The killed run's request, which had been on its way: whoever comes first has the day.
          if (!seen) await until("the manifest is there", () => readManifest(shop.bucket, of));
          else await delay(200);
        };
        if (late !== "long after") await arrive();
        second.release();
        const { code, stderr } = await ending(next);
        assert.equal(code, 0, stderr);
        if (late === "long after") await arrive();
        const { manifest } = await assertArchived(shop, of);
        if (late === "long after") {
          assert.equal(manifest.run_id, next.id);
          assert.deepEqual(await strays(shop, of), parts);
        } else {
          assert.equal(manifest.run_id, run_id);
          assert.match(stderr, new RegExp(` step=lost day=${of} because="another run archived it meanwhile" holder=${run_id}`));
          assert.deepEqual(await strays(shop, of), []);
        }
      });
    }

    test("in a re-archive, after the new manifest and before the old parts are deleted: the day verifies, the old parts are strays", async () => {
      const [shop, of] = [shopOf(), await nextDay()];
      await shop.succeed(script, one(of));
      const old = (await assertArchivedClean(shop, of)).manifest.parts.map(({ key }) => key.slice(shop.bucket.prefix.length));
      const gate = hold();
      await using run = await startHeld(shop, script, one(of, { FORCE: "1" }), s3Steps.deleteObjects, gate);
      await kill(run);
      assert.equal((await assertArchived(shop, of)).manifest.run_id, run.id);
      assert.deepEqual(await verified(shop, of, addDays(of)), { stray: old, removed: [] });
      gate.release(); // and a deletion that arrives late takes nothing else
      await until("the old parts are gone", async () => (await strays(shop, of)).length === 0);
      await assertArchivedClean(shop, of);
    });

    test("in a re-archive, while a reader reads: the reader always gets the whole day", async () => {
      const [shop, of] = [shopOf(), await nextDay()];
      await shop.succeed(script, one(of));
      const source = await sourceEvents(shop, of, addDays(of));
      let [reads, reading] = [0, true];
      const versions = new Set<string>();
      const reader = (async () => {
        while (reading) {
          const there = await readArchived(shop, of);
          assert.deepEqual(there?.rows, source);
          versions.add(there.etag);
          reads += 1;
          await delay(5);
        }
      })();
      reader.catch(() => {}); // it is awaited below
      const furtherReads = async (): Promise<void> => {
        const goal = reads + 2;
        await Promise.race([reader, until("the reader goes on", () => reads >= goal)]);
      };
      try {
        for (const [step, gate, killed] of [
          [ofDay(of, s3Steps.putPart), withhold(), true],
          [s3Steps.putManifest, hold(), true],
          [s3Steps.putManifest, withhold(), false],
          [s3Steps.deleteObjects, hold(), false],
          [s3Steps.deleteObjects, withhold(), true],
        ] as const) {
          await using run = await startHeld(shop, script, one(of, { FORCE: "1" }), step, gate);
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
      await assertArchived(shop, of);
    });
  });

  suite("stopped", { concurrency: 1 }, () => {
    let shop: Shop;
    let day = "2019-01-01";
    before(async () => {
      shop = await createShop({ bigquery: false });
    });
    after(() => shop[Symbol.asyncDispose]());

    /** The run is told to stop: it ends in time, says how to go on, and keeps nothing of the day that it was at. */
    const stop = async (run: Process, signal: "SIGTERM"): Promise<string> => {
      run.child.kill(signal);
      const { code, stderr } = await ending(run);
      assert.equal(code, 1);
      const text = `stopped by ${signal}. No chunk is half applied; days that are done stay so. To resume: the same command again`;
      assert.ok(stderr.endsWith(`error: ${text}`), stderr);
      const { state, error } = await lastRun(shop);
      assert.deepEqual([state, error], ["failed", text]);
      await assertNoSessions(shop);
      return stderr;
    };
    test("by SIGTERM in mid-backfill, of days at once: no part of an unfinished day, and the same command resumes", async () => {
      const days = 4;
      const from = addDays(day, 10);
      const to = addDays(from, days);
      day = to;
      for (const each of daysBetween(from, to)) await shop.insertEvents(each, 150);
      await using proxy = await createS3Proxy(shop.env.S3_ENDPOINT);
      const gate = hold();
      const last = ofDay(addDays(from, days - 1), s3Steps.putPart);
      proxy.fault(last, pass, 1);
      proxy.fault(last, gate, 1);
      const run = shop.start(script, backfill(from, to, { CONCURRENCY: "3", S3_ENDPOINT: proxy.url }));
      await reach(run, gate.reached);
      await until(
        "the other days are done",
        async () => (await objectKeys(shop)).filter((key) => key.includes("manifest") && key > `events/dt=${from}`).length === days - 1,
      );
      await stop(run, "SIGTERM");
      for (const each of daysBetween(from, addDays(to, -1))) await assertArchivedClean(shop, each);
      assert.deepEqual(await objectKeys(shop, addDays(to, -1)), []);
      assert.deepEqual(await strays(shop), []);
      const { stderr } = await shop.succeed(script, backfill(from, to));
      assert.match(stderr, new RegExp(` step=days archived=1 skipped=${days - 1} failed=0`));
      for (const each of daysBetween(from, to)) await assertArchivedClean(shop, each);
    });

    // What the server is doing at that moment comes to pass all the same, before or after what the run removes.
    for (const [what, gate] of [
      ["before the server has it", hold()],
      ["before its answer", withhold()],
    ] as const) {
      test(`by SIGTERM in the PUT of a part, ${what}, which goes on at the server: no part is left`, async () => {
        day = addDays(day, 1);
        await insertWide(shop, day);
        const variables = backfill(day, addDays(day), { CHUNK_ROWS: "1000" });
        await using run = await startHeld(shop, script, variables, s3Steps.putPart, gate);
        const landed = delay(300)
          .then(gate.release)
          .then(() => delay(300)); // after the run's end, if it does not wait for it
        await stop(run, "SIGTERM");
        await landed;
        assert.deepEqual(await objectKeys(shop, day), []);
        assert.deepEqual(await strays(shop), []);
      });
    }

    test("by SIGINT while it waits for a part's first row, which comes while it ends: the part is not uploaded any more", async () => {
      day = addDays(day, 10);
      await shop.insertEvents(day, 150);
      await using proxy = await createS3Proxy(shop.env.S3_ENDPOINT);
      const [first, second, remove] = [hold(), withhold(), hold()];
      proxy.fault(s3Steps.putPart, first, 1);
      proxy.fault(s3Steps.putPart, second, 1);
      proxy.fault(s3Steps.deleteObjects, remove, 1);
      const run = shop.start(script, backfill(day, addDays(day), { S3_ENDPOINT: proxy.url }));
      await reach(run, first.reached);
      const locker = shop.connect("locker");
      await locker.begin(async (sql) => {
        await sql`lock table public.events in access exclusive mode`;
        first.release();
        await until("the second part's COPY waits", async () => {
          const [waiting] = await shop.admin`
            select from pg_stat_activity where datname = current_database() and wait_event = 'relation' and query like '%copy (%'`;
          return waiting;
        });
        run.child.kill("SIGINT");
        await reach(run, remove.reached);
      });
      await Promise.race([second.reached, delay(500)]);
      remove.release();
      assert.equal((await ending(run)).code, 1);
      assert.deepEqual(await objectKeys(shop, day), []);
    });
  });
});
