/**
 * The archive when its state, its source or another run says otherwise: a day is done where its manifest is, the first manifest
 * stays, and rows that are only in the archive stay there.
 */
import assert from "node:assert/strict";
import { after, before, suite, test } from "node:test";
import { addDays, daysBetween, manifestKey, readManifest } from "../../shared/events/archive.ts";
import { removeObjects } from "../../shared/events/s3.ts";
import { createProxy, ending, hold, lastRun, loseAnswer, pass, reach, withhold } from "../lib/faults.ts";
import {
  assertArchived,
  assertArchivedClean,
  createS3Proxy,
  objectKeys,
  ofDay,
  readArchived,
  refuse,
  s3Steps,
  startHeld,
  strays,
  suiteOfDays,
} from "../lib/s3.ts";
import { createShop, type Shop } from "../lib/shop.ts";
import type { Env } from "../stack/env.ts";

const script = "scripts/ops/backfill-events.ts";
const daily = "scripts/events.ts";
const backfill = (from: string, to = addDays(from), more: Env = {}): Env => ({
  FROM: from,
  TO: to,
  CHUNK_ROWS: "60",
  ...more,
});
const again = (day: string, more: Env = {}): Env => backfill(day, addDays(day), { FORCE: "1", ...more });

interface Chunk {
  state: string;
  rows: number;
  error: string | null;
  run_id: string;
}

async function chunk({ admin }: Shop, day: string): Promise<Chunk | undefined> {
  const [row] = await admin<Chunk[]>`
    select state, rows::int, error, run_id from etl.chunks where chunk_from = ${`${day}Z`}::text::timestamptz`;
  return row;
}

async function deleteEvents({ admin }: Shop, day: string): Promise<void> {
  await admin`
    delete from public.events where created_at >= ${`${day}Z`}::text::timestamptz and created_at < ${`${addDays(day)}Z`}::text::timestamptz`;
}

/** Ends the session that holds the pipeline's lock, as a failover or a careless administrator would. */
async function loseLock({ admin }: Shop): Promise<void> {
  const ended = await admin`
    select pg_terminate_backend(pid, 5000) from pg_locks
    where locktype = 'advisory' and granted and database = (select oid from pg_database where datname = current_database())`;
  assert.equal(ended.length, 1);
}

suite("races", { concurrency: true }, () => {
  suiteOfDays("done is what has a manifest", "2017-01-01", (shopOf, nextDay) => {
    test("a day without a manifest is archived, whatever etl.chunks says", async () => {
      const shop = shopOf();
      const [never, gone] = [await nextDay(), await nextDay()];
      await shop.succeed(script, backfill(gone));
      const before = (await assertArchivedClean(shop, gone)).manifest;
      await removeObjects(shop.bucket, [manifestKey(shop.bucket, gone)]);
      await shop.admin`
        insert into etl.chunks (pipeline, chunk_from, chunk_to, state, rows, bytes, run_id, finished_at)
        values ('events', ${`${never}Z`}::text::timestamptz, ${`${addDays(never)}Z`}::text::timestamptz, 'succeeded', 150, 10, 'x', now())`;
      assert.equal((await chunk(shop, gone))?.state, "succeeded");
      const { stderr } = await shop.succeed(script, backfill(never, addDays(gone)));
      assert.match(stderr, / step=days archived=6 skipped=0 failed=0/);
      await assertArchivedClean(shop, never);
      const { manifest } = await assertArchived(shop, gone);
      assert.notEqual(manifest.run_id, before.run_id);
      assert.deepEqual(
        await strays(shop, gone),
        before.parts.map(({ key }) => key.slice(shop.bucket.prefix.length)),
      );
      for (const day of [never, gone]) {
        const { state, rows, run_id } = (await chunk(shop, day)) ?? {};
        assert.deepEqual([state, rows, run_id], ["succeeded", 150, (await readManifest(shop.bucket, day))?.manifest.run_id]);
      }
    });

    test("a day with a manifest is skipped, and etl.chunks put right, whether that says failed, running or nothing", async () => {
      const shop = shopOf();
      const from = await nextDay(70);
      const to = addDays(from, 3);
      await shop.insertEvents(addDays(from), 80);
      await shop.insertEvents(addDays(from, 2), 90);
      await shop.succeed(script, backfill(from, to));
      const keys = await objectKeys(shop);
      const etags = await Promise.all(daysBetween(from, to).map(async (day) => (await readManifest(shop.bucket, day))?.etag));
      const chunks = async (): Promise<Chunk[]> =>
        (await Promise.all(daysBetween(from, to).map((day) => chunk(shop, day)))).filter((row) => row !== undefined);
      const right = await chunks();
      assert.deepEqual(
        right.map(({ rows }) => rows),
        [70, 80, 90],
      );
      const at = (day: string): string => `${day}Z`;
      await shop.admin`update etl.chunks set state = 'failed', error = 'e', rows = 0, run_id = 'y' where chunk_from = ${at(from)}::text::timestamptz`;
      await shop.admin`update etl.chunks set state = 'running', rows = 0, run_id = 'y' where chunk_from = ${at(addDays(from))}::text::timestamptz`;
      await shop.admin`delete from etl.chunks where chunk_from = ${at(addDays(from, 2))}::text::timestamptz`;
      const { stderr } = await shop.succeed(script, backfill(from, to));
      assert.match(stderr, / step=days archived=0 skipped=3 failed=0/);
      assert.match(stderr, / step=done rows=0 /);
      assert.deepEqual(await chunks(), right);
      assert.deepEqual(await objectKeys(shop), keys);
      assert.deepEqual(await Promise.all(daysBetween(from, to).map(async (day) => (await readManifest(shop.bucket, day))?.etag)), etags);
    });

    test("a day that was purged at the source keeps its archive under FORCE=1, and loses it with ALLOW_SHRINK=1", async () => {
      const shop = shopOf();
      const day = await nextDay();
      await shop.succeed(script, backfill(day));
      const before = await assertArchivedClean(shop, day);
      const keys = await objectKeys(shop, day);
      await deleteEvents(shop, day);
      const refused = await shop.run(script, again(day));
      assert.equal(refused.code, 1);
      const text = `${day} has 0 rows at the source and 150 in the archive, which may be the only copy of the others: it stays as it is. If they are to go: make backfill-events FROM=${day} TO=${addDays(day)} FORCE=1 ALLOW_SHRINK=1`;
      assert.ok(refused.stderr.includes(`error: 1 of 1 days failed:\n  ${day}: ${text}\n`), refused.stderr);
      assert.deepEqual(await readArchived(shop, day), before); // its hashes are those of its bytes
      assert.deepEqual(await objectKeys(shop, day), keys);
      const failed = await chunk(shop, day);
      assert.deepEqual([failed?.state, failed?.error], ["failed", text]);
      await shop.succeed(script, again(day, { ALLOW_SHRINK: "1" }));
      const { manifest } = await assertArchivedClean(shop, day);
      assert.deepEqual([manifest.rows, manifest.parts], [0, []]);
    });
  });

  suiteOfDays("two writers of a day, the lock lost", "2018-01-01", (shopOf, nextDay) => {
    /** The one that comes first to its manifest's PUT waits there. The other takes the day. */
    const race = async (variables: Env): Promise<{ winner: string; stderr: string }> => {
      const shop = shopOf();
      const gate = hold();
      await using first = await startHeld(shop, script, variables, s3Steps.putManifest, gate);
      await loseLock(shop);
      await shop.succeed(script, variables);
      const { run_id: winner } = await lastRun(shop);
      gate.release();
      const { code, stderr } = await ending(first);
      assert.equal(code, 0, stderr);
      return { winner, stderr };
    };

    for (const force of [false, true]) {
      test(`the second one's manifest stays, and nothing of the first is left${force ? ", with FORCE=1 on both: its ETag is stale" : ""}`, async () => {
        const shop = shopOf();
        const day = await nextDay();
        if (force) await shop.succeed(script, backfill(day));
        const { winner, stderr } = await race(force ? again(day) : backfill(day));
        assert.match(stderr, new RegExp(` step=lost day=${day} because="another run archived it meanwhile" holder=${winner}`));
        const { manifest } = await assertArchivedClean(shop, day);
        assert.equal(manifest.run_id, winner);
        assert.equal((await objectKeys(shop, day)).length, 4);
        const recorded = await chunk(shop, day);
        assert.deepEqual([recorded?.state, recorded?.rows, recorded?.run_id], ["succeeded", 150, winner]);
      });
    }

    test("the first one is stopped (SIGSTOP) before its last part is known to it, and goes on when the day is done", async () => {
      const shop = shopOf();
      const day = await nextDay();
      await using proxy = await createS3Proxy(shop.env.S3_ENDPOINT);
      const gate = withhold();
      proxy.fault(s3Steps.putPart, pass, 2);
      proxy.fault(s3Steps.putPart, gate, 1);
      const first = shop.start(script, backfill(day, addDays(day), { S3_ENDPOINT: proxy.url }));
      await reach(first, gate.reached);
      first.child.kill("SIGSTOP");
      gate.release();
      await loseLock(shop);
      await shop.succeed(script, backfill(day));
      const { run_id: winner } = await lastRun(shop);
      first.child.kill("SIGCONT");
      const { code, stderr } = await ending(first);
      assert.equal(code, 0, stderr);
      assert.match(stderr, new RegExp(` step=lost .*holder=${winner}`));
      assert.equal((await assertArchivedClean(shop, day)).manifest.run_id, winner);
    });

    test("where a run fails while another of its days is under way, that day is published with its parts or not at all", async () => {
      const shop = shopOf();
      const day = await nextDay();
      const beside = addDays(day);
      await shop.insertEvents(beside, 150);
      await using proxy = await createS3Proxy(shop.env.S3_ENDPOINT);
      const [manifest, part, published] = [hold(), hold(), hold()];
      proxy.fault(ofDay(day, s3Steps.putManifest), manifest);
      proxy.fault(ofDay(beside, s3Steps.putPart), part, 1);
      proxy.fault(ofDay(beside, s3Steps.putManifest), published);
      published.release();
      const run = shop.start(script, backfill(day, addDays(day, 2), { CONCURRENCY: "2", S3_ENDPOINT: proxy.url }));
      // Its parts are removed at the worst moment: once a manifest names them.
      proxy.fault(s3Steps.deleteObjects, async (exchange) => {
        await Promise.race([published.reached, run.ended]);
        await pass(exchange);
      });
      await reach(run, Promise.all([manifest.reached, part.reached]));
      await shop.admin`alter table etl.chunks rename to away`; // the run cannot record its days
      manifest.release();
      await run.line(/ step=day .*failed=/);
      part.release();
      assert.equal((await ending(run)).code, 2);
      await shop.admin`alter table etl.away rename to chunks`;
      await shop.succeed(script, backfill(day, addDays(day, 2)));
      for (const each of [day, beside]) await assertArchived(shop, each);
    });

    test("a manifest that is deleted while the day is archived again: the run does not take the day for done", async () => {
      const shop = shopOf();
      const day = await nextDay();
      await shop.succeed(script, backfill(day));
      const gate = hold();
      await using run = await startHeld(shop, script, again(day), s3Steps.putManifest, gate);
      await removeObjects(shop.bucket, [manifestKey(shop.bucket, day)]);
      gate.release();
      const { code, stderr } = await ending(run);
      const there = await readManifest(shop.bucket, day);
      assert.equal(code === 0, there !== undefined, `exit ${code}, and ${there ? "a" : "no"} manifest:\n${stderr}`);
      assert.equal((await chunk(shop, day))?.state, there ? "succeeded" : "failed");
    });

    for (const [times, force] of [
      [1, false],
      [6, true],
    ] as const) {
      test(`the answer to the manifest is lost ${times === 1 ? "once" : "each time but the last"}${force ? ", with FORCE=1" : ""}: the day is done, nothing of it is deleted`, async () => {
        const shop = shopOf();
        const day = await nextDay();
        if (force) await shop.succeed(script, backfill(day));
        await using proxy = await createS3Proxy(shop.env.S3_ENDPOINT);
        proxy.fault(s3Steps.putManifest, loseAnswer, times);
        const variables = (force ? again : backfill)(day);
        const { stderr } = await shop.succeed(script, { ...variables, S3_ENDPOINT: proxy.url });
        const { run_id } = await lastRun(shop);
        assert.doesNotMatch(stderr, / step=lost /);
        assert.match(stderr, / step=days archived=1 skipped=0 failed=0/);
        const { manifest } = await assertArchived(shop, day);
        assert.equal(manifest.run_id, run_id);
        assert.equal((await chunk(shop, day))?.run_id, run_id);
        assert.deepEqual(await strays(shop, day), []);
        if (!force)
          assert.deepEqual(
            proxy.requests.filter((line) => s3Steps.deleteObjects.test(line)),
            [],
          );
      });
    }
  });

  suiteOfDays("two runs at once", "2019-01-01", (shopOf, nextDay) => {
    test("the daily run during a backfill says so and exits 0: it pushes and records nothing; afterwards it works", async () => {
      const shop = shopOf();
      const day = await nextDay();
      await using gateway = await createProxy(shop.env.PUSHGATEWAY_URL);
      const gate = hold();
      await using first = await startHeld(shop, script, backfill(day), s3Steps.putPart, gate);
      const recorded = await shop.admin`select * from etl.runs order by started_at`;
      const skipped = await shop.succeed(daily, { PUSHGATEWAY_URL: gateway.url });
      const holder = `because="another run holds the lock" holder=${first.id} host=\\S+ pid=${first.child.pid} postgres_pid=\\d+ since=\\d{4}-\\S+`;
      assert.match(skipped.stderr, new RegExp(`^\\S+ pipeline=events run=\\w+ step=skipped ${holder}$`));
      assert.equal(gateway.requests.length, 0);
      assert.deepEqual(await shop.admin`select * from etl.runs order by started_at`, recorded);
      gate.release();
      assert.equal((await ending(first)).code, 0);
      assert.equal(await shop.watermark("events"), undefined);
      const { stderr } = await shop.succeed(daily, { PUSHGATEWAY_URL: gateway.url });
      assert.match(stderr, / step=days archived=1 skipped=0 failed=0/);
      assert.equal(gateway.requests.filter((line) => line.startsWith("POST ")).length, 1);
      assert.ok(await shop.watermark("events"));
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

    test("while a transaction is prepared, before there is a watermark: archives nothing, and says who holds it", async () => {
      await shop.admin.unsafe(`begin; create table t (); prepare transaction '${shop.dataset}'`);
      try {
        const { code, stderr } = await shop.run(daily);
        assert.match(stderr, new RegExp(` step=held by=".*prepared transaction .*${shop.dataset}`));
        assert.deepEqual(await archivedDays(), []);
        assert.equal(await shop.watermark("events"), undefined);
        assert.doesNotMatch(stderr, /Invalid time value/);
        assert.equal(code, 0, stderr);
      } finally {
        await shop.admin.unsafe(`rollback prepared '${shop.dataset}'`);
      }
    });

    test("the first time archives yesterday only, and prints the backfill of the older days that have events", async () => {
      await shop.insertEvents("1970-01-01", 1);
      await shop.admin`insert into public.events (created_at) values ('0044-03-15 12:00Z BC')`; // no day of the archive
      const { stderr } = await shop.succeed(daily);
      assert.ok(
        stderr.includes(
          ` step=first-run archives=${addDays(today, -1)} older_days=5 next="make backfill-events FROM=1970-01-01 TO=1970-01-02; make backfill-events FROM=${addDays(today, -5)} TO=${addDays(today, -1)}"`,
        ),
        stderr,
      );
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
      assert.match(
        stderr,
        new RegExp(
          `error: 1 of 5 days failed; the others are archived:\\n  ${bad}: s3://\\S+/dt=${bad}/part-0001-\\w+\\.ndjson\\.gz: AccessDenied 403 .*\\nNext: make backfill-events FROM=${bad} TO=${addDays(bad)} \\(days that are done are skipped\\)$`,
        ),
      );
      assert.match(stderr, / step=days archived=3 skipped=1 failed=1/);
      assert.deepEqual(await archivedDays(), [5, 3, 2, 1]);
      assert.equal(await shop.watermark("events"), midnight(4));
      assert.equal((await chunk(shop, bad))?.state, "failed");

      const mended = await shop.succeed(daily);
      assert.match(mended.stderr, / step=days archived=1 skipped=3 failed=0/);
      assert.equal(await shop.watermark("events"), midnight(0));
      assert.equal((await chunk(shop, bad))?.state, "succeeded");
      for (const ago of [5, 4, 3, 2, 1]) await assertArchivedClean(shop, addDays(today, -ago));
      assert.deepEqual(await archivedDays(), [5, 4, 3, 2, 1]);
    });

    test("a backfill leaves the watermark alone, and lists the days that are not over yet, exit 1; an open transaction is named", async () => {
      const [from, to] = [addDays(today, -1), addDays(today, 2)];
      await removeObjects(shop.bucket, [manifestKey(shop.bucket, from)]);
      await shop.admin`update etl.watermarks set watermark = ${midnight(3)}::text::timestamptz`;
      const writer = shop.connect("checkout");
      const { code, stderr, pid } = await writer.begin(async (sql) => {
        const [backend] = await sql<{ pid: number }[]>`select pg_backend_pid() as pid`;
        return { ...(await shop.run(script, backfill(from, to))), pid: backend?.pid };
      });
      assert.equal(code, 1);
      assert.match(
        stderr,
        new RegExp(` step=held by="pid ${pid}, application \\\\"checkout\\\\", role postgres, state idle in transaction, open for `),
      );
      const text = "is not over yet: the source can still get rows before its end \\(the safe bound is \\d{4}-\\S+\\)";
      assert.match(
        stderr,
        new RegExp(
          `error: 2 of 3 days failed; the others are archived:\\n  ${today}: ${text}\\n  ${addDays(today)}: ${text}\\nNext: make backfill-events FROM=${today} TO=${to} `,
        ),
      );
      assert.deepEqual(await archivedDays(), [5, 4, 3, 2, 1]);
      await assertArchived(shop, from);
      assert.equal(await shop.watermark("events"), midnight(3));
    });
  });
});
