/**
 * The archive when its state, its source or another run says otherwise: a day is done where its manifest is, the first manifest
 * stays, and rows that are only in the archive stay there.
 */
import assert from "node:assert/strict";
import { after, before, suite, test } from "node:test";
import { addDays, manifestKey, readManifest } from "../../shared/events/archive.ts";
import { removeObjects } from "../../shared/events/s3.ts";
import { ending, hold, lastRun, loseAnswer, loseLock } from "../lib/faults.ts";
import {
  archiveSuite,
  assertArchived,
  assertArchivedClean,
  backfill,
  createS3Proxy,
  objectKeys,
  ofDay,
  readArchived,
  refuse,
  s3Steps,
  strays,
} from "../lib/s3.ts";
import { createShop, type Shop } from "../lib/shop.ts";

const daily = "scripts/events.ts";
const FORCE = { FORCE: "1" };

/** What etl.chunks says of a day. */
async function chunk(
  { admin }: Shop,
  day: string,
): Promise<{ state: string; rows: number; error: string | null; run_id: string } | undefined> {
  const [row] = await admin`select state, rows::int, error, run_id from etl.chunks where chunk_from = ${`${day}Z`}::text::timestamptz`;
  return row as Awaited<ReturnType<typeof chunk>>;
}

suite("races", { concurrency: true }, () => {
  archiveSuite("done is what has a manifest", {}, (test) => {
    test("a day without a manifest is archived, whatever etl.chunks says", async ({ shop, day, run, heal }) => {
      await heal();
      const before = await objectKeys(shop, day);
      const { run_id } = (await chunk(shop, day)) ?? {};
      await removeObjects(shop.bucket, [manifestKey(shop.bucket, day)]);
      assert.match((await run()).stderr, / step=days archived=1 skipped=0 failed=0/);
      const { manifest } = await assertArchived(shop, day);
      assert.notEqual(manifest.run_id, run_id);
      assert.deepEqual([...(await strays(shop, day)), `events/dt=${day}/manifest.json`].sort(), before.sort());
      assert.deepEqual(await chunk(shop, day), { state: "succeeded", rows: 7, error: null, run_id: manifest.run_id });
    });

    test("a day with a manifest is skipped, and etl.chunks put right, whether that says failed, running or nothing", async (one) => {
      const { shop, day, heal } = one;
      const days = [day, addDays(day), addDays(day, 2)];
      await heal({}, 3);
      const state = async (): Promise<unknown[]> => [
        await Promise.all(days.map((each) => chunk(shop, each))),
        await Promise.all(days.map(async (each) => (await readManifest(shop.bucket, each))?.etag)),
      ];
      const right = await state();
      const [failed, running, nothing] = days.map((each) => `chunk_from = '${each}Z'`);
      await shop.admin.unsafe(`update etl.chunks set state = 'failed', error = 'e', rows = 0, run_id = 'y' where ${failed};
        update etl.chunks set state = 'running', rows = 0, run_id = 'y' where ${running}; delete from etl.chunks where ${nothing}`);
      const { stderr } = await heal({}, 3);
      assert.match(stderr, / step=days archived=0 skipped=3 failed=0/);
      assert.match(stderr, / step=done rows=0 /);
      assert.deepEqual(await state(), right);
    });

    test("a day that was purged at the source keeps its archive under FORCE=1, and loses it with ALLOW_SHRINK=1", async (one) => {
      const { shop, day, run, heal } = one;
      await heal();
      const before = [await readArchived(shop, day), await objectKeys(shop, day)];
      await shop.admin`delete from public.events where created_at >= ${`${day}Z`}::text::timestamptz`;
      const refused = await run(FORCE);
      assert.equal(refused.code, 1);
      const why = `${day} has 0 rows at the source and 7 in the archive, which may be the only copy of the others: it stays as it is.`;
      const text = `${why} If they are to go: make backfill-events FROM=${day} TO=${addDays(day)} FORCE=1 ALLOW_SHRINK=1`;
      assert.ok(refused.stderr.includes(`error: 1 of 1 days failed:\n  ${day}: ${text}\n`), refused.stderr);
      assert.deepEqual([await readArchived(shop, day), await objectKeys(shop, day)], before); // its hashes are those of its bytes
      const failed = await chunk(shop, day);
      assert.deepEqual([failed?.state, failed?.error], ["failed", text]);
      await heal({ ...FORCE, ALLOW_SHRINK: "1" });
      assert.deepEqual(await objectKeys(shop, day), [`events/dt=${day}/manifest.json`]);
    });
  });

  archiveSuite("two writers of a day, the lock lost", {}, (test) => {
    for (const force of [false, true])
      test(`the second one's manifest stays, and nothing of the first is left${force ? ", with FORCE=1 on both" : ""}`, async (one) => {
        const { shop, day, startHeld, heal } = one;
        if (force) await heal();
        const gate = hold();
        const first = await startHeld(s3Steps.putManifest, gate, force ? FORCE : {});
        await loseLock(shop);
        await shop.succeed(backfill, { FROM: day, TO: addDays(day), ...(force && FORCE) });
        const { run_id: winner } = await lastRun(shop);
        gate.release();
        const { code, stderr } = await ending(first);
        assert.equal(code, 0, stderr);
        assert.match(stderr, new RegExp(` step=lost day=${day} because="another run archived it meanwhile" holder=${winner}`));
        assert.equal((await assertArchivedClean(shop, day)).manifest.run_id, winner);
        assert.deepEqual(await chunk(shop, day), { state: "succeeded", rows: 7, error: null, run_id: winner });
      });

    test("the daily run during a backfill says who holds the lock, exits 0 and records nothing", async (one) => {
      const { shop, startHeld } = one;
      const gate = hold();
      const { id, ended } = await startHeld(s3Steps.putPart, gate);
      assert.match((await shop.succeed(daily)).stderr, new RegExp(` step=skipped because="another run holds the lock" holder=${id} `));
      assert.equal((await lastRun(shop)).run_id, id);
      gate.release();
      assert.equal((await ended).code, 0);
    });

    test("a manifest that is deleted while the day is archived again: the run does not take the day for done", async (one) => {
      const { shop, day, startHeld, heal } = one;
      await heal();
      const gate = hold();
      const run = await startHeld(s3Steps.putManifest, gate, FORCE);
      await removeObjects(shop.bucket, [manifestKey(shop.bucket, day)]);
      gate.release();
      const { code, stderr } = await ending(run);
      const there = await readManifest(shop.bucket, day);
      assert.equal(code === 0, there !== undefined, `exit ${code}, and ${there ? "a" : "no"} manifest:\n${stderr}`);
      assert.equal((await chunk(shop, day))?.state, there ? "succeeded" : "failed");
    });

    test("the answer to the manifest is lost each time but the last: the day is done, and nothing of it is deleted", async (one) => {
      const { shop, proxy, day, run, heal } = one;
      await heal();
      proxy.fault(s3Steps.putManifest, loseAnswer, 6);
      const { code, stderr } = await run(FORCE);
      assert.equal(code, 0, stderr);
      assert.doesNotMatch(stderr, / step=lost /);
      assert.match(stderr, / step=days archived=1 skipped=0 failed=0/);
      const { run_id } = await lastRun(shop);
      assert.equal((await assertArchivedClean(shop, day)).manifest.run_id, run_id);
      assert.equal((await chunk(shop, day))?.run_id, run_id);
    });
  });

  suite("the daily run", { concurrency: 1 }, () => {
    let shop: Shop;
    let today: string;
    before(async () => {
      shop = await createShop({ bigquery: false });
      today = new Date().toISOString().slice(0, 10);
      for (const ago of [5, 4, 3, 2, 1, 0]) await shop.insertEvents(addDays(today, -ago), 70);
    });
    after(() => shop[Symbol.asyncDispose]());
    const midnight = (ago: number): string => `${addDays(today, -ago)}T00:00:00+00`;
    const archivedDays = async (): Promise<number[]> => {
      const keys = await objectKeys(shop);
      return [5, 4, 3, 2, 1, 0].filter((ago) => keys.includes(`events/dt=${addDays(today, -ago)}/manifest.json`));
    };

    test("the first time archives yesterday only, and prints the backfill of the older days that have events", async () => {
      await shop.insertEvents("1970-01-01", 1);
      await shop.admin`insert into public.events (created_at) values ('0044-03-15 12:00Z BC')`; // no day of the archive
      const { stderr } = await shop.succeed(daily);
      const [from, to] = [addDays(today, -5), addDays(today, -1)];
      const next = `make backfill-events FROM=1970-01-01 TO=1970-01-02; make backfill-events FROM=${from} TO=${to}`;
      assert.ok(stderr.includes(` step=first-run archives=${to} older_days=5 next="${next}"`), stderr);
      assert.deepEqual(await archivedDays(), [1]);
      assert.equal(await shop.watermark("events"), midnight(0));
      await assertArchivedClean(shop, addDays(today, -1));
      const second = await shop.succeed(daily);
      assert.match(second.stderr, / step=days archived=0 skipped=0 failed=0/);
      assert.equal(await shop.watermark("events"), midnight(0));
    });

    test("then archives every complete day since the watermark; a day that fails stops the watermark, not the later days", async () => {
      await shop.admin`update etl.watermarks set watermark = ${midnight(5)}::text::timestamptz`;
      await using proxy = await createS3Proxy(shop.env.S3_ENDPOINT);
      proxy.fault(ofDay(addDays(today, -4), s3Steps.putPart), refuse(403, "AccessDenied"));
      const { code, stderr } = await shop.run(daily, { S3_ENDPOINT: proxy.url });
      assert.equal(code, 1);
      const bad = addDays(today, -4);
      const part = `s3://\\S+/dt=${bad}/part-0001-\\w+\\.ndjson\\.gz: AccessDenied 403 .*`;
      const next = `Next: make backfill-events FROM=${bad} TO=${addDays(bad)} \\(days that are done are skipped\\)$`;
      assert.match(stderr, new RegExp(`error: 1 of 5 days failed:\\n  ${bad}: ${part}\\n${next}`));
      assert.match(stderr, / step=days archived=3 skipped=1 failed=1/);
      assert.deepEqual(await archivedDays(), [5, 3, 2, 1]);
      assert.equal(await shop.watermark("events"), midnight(4));
      assert.equal((await chunk(shop, bad))?.state, "failed");

      const healed = await shop.succeed(daily);
      assert.match(healed.stderr, / step=days archived=1 skipped=3 failed=0/);
      assert.equal(await shop.watermark("events"), midnight(0));
      assert.equal((await chunk(shop, bad))?.state, "succeeded");
      for (const ago of [5, 4, 3, 2, 1]) await assertArchivedClean(shop, addDays(today, -ago));
      assert.deepEqual(await archivedDays(), [5, 4, 3, 2, 1]);
    });

    test("a backfill leaves the watermark alone, lists the days that are not over yet, and names an open transaction", async () => {
      const [from, to] = [addDays(today, -1), addDays(today, 2)];
      await removeObjects(shop.bucket, [manifestKey(shop.bucket, from)]);
      await shop.admin`update etl.watermarks set watermark = ${midnight(3)}::text::timestamptz`;
      const writer = shop.connect("checkout");
      const { code, stderr, pid } = await writer.begin(async (sql) => {
        const [backend] = await sql<{ pid: number }[]>`select pg_backend_pid() as pid`;
        return { ...(await shop.run(backfill, { FROM: from, TO: to })), pid: backend?.pid };
      });
      assert.equal(code, 1);
      assert.match(stderr, new RegExp(` step=held by="pid ${pid}, application \\\\"checkout\\\\", role postgres, `));
      const text = "is not over yet: the source can still get rows before its end";
      const both = `  ${today}: ${text}\\n  ${addDays(today)}: ${text}\\nNext: make backfill-events FROM=${today} TO=${to} `;
      assert.match(stderr, new RegExp(`error: 2 of 3 days failed:\\n${both}`));
      assert.deepEqual(await archivedDays(), [5, 4, 3, 2, 1]);
      await assertArchived(shop, from);
      assert.equal(await shop.watermark("events"), midnight(3));
    });
  });
});
