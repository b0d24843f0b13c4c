// Which rows are in which day's archive, in which parts, under which keys: the days of UTC, however they are asked for. Needs the local
// stack (make up).
import assert from "node:assert/strict";
import { after, suite, test } from "node:test";
import { DeleteBucketCommand, HeadObjectCommand } from "@aws-sdk/client-s3";
import { addDays, readManifest } from "../../shared/events/archive.ts";
import { type Bucket, createBucket, listObjects, removeObjects } from "../../shared/events/s3.ts";
import { assertArchivedClean } from "../lib/s3.ts";
import { connectBucket, createShop, lowestPeaks, type Result } from "../lib/shop.ts";
import type { Env } from "../stack/env.ts";

const [shop, memoryShop] = await Promise.all([createShop({ bigquery: false }), createShop({ bigquery: false })]);
after(() => Promise.all([shop, memoryShop].map((one) => one[Symbol.asyncDispose]())));

const script = "scripts/ops/backfill-events.ts";
const keysBelow = async (bucket: Bucket, prefix: string): Promise<string[]> =>
  (await Array.fromAsync(listObjects(bucket, prefix))).map(({ key }) => key).sort();
const runOf = ({ stderr }: Result): string => /run=(\w+) step=/.exec(stderr)?.[1] ?? "";

const archive = (FROM: string, TO: string, variables: Env = {}): Promise<Result> => shop.succeed(script, { FROM, TO, ...variables });

/** Inserts events with ids and times of one's own. */
async function insert(rows: { id: bigint; at: string }[]): Promise<void> {
  const text = JSON.stringify(rows.map(({ id, at }) => ({ id: String(id), at })));
  await shop.admin`
    insert into public.events (id, type, created_at) overriding system value
    select id::bigint, 'row ' || id, at::timestamptz from jsonb_to_recordset(${text}::text::jsonb) r (id text, at text)`;
}

const verify = (FROM: string, TO: string, variables: Env = {}): Promise<Result> =>
  shop.run("scripts/ops/verify-events.ts", { FROM, TO, ...variables });

/** A day in the bucket is what the source has of it, in parts of these sizes, under the keys of the design, and nothing else. */
async function assertArchived(day: string, run: Result, sizes: number[], bucket = shop.bucket): Promise<void> {
  const { manifest } = await assertArchivedClean({ ...shop, bucket }, day);
  const run_id = runOf(run);
  const folder = `${bucket.prefix}events/dt=${day}/`;
  const parts = sizes.map((rows, index) => ({ key: `${folder}part-${String(index + 1).padStart(4, "0")}-${run_id}.ndjson.gz`, rows }));
  assert.deepEqual(
    manifest.parts.map(({ key, rows }) => ({ key, rows })),
    parts,
  );
  assert.deepEqual(Object.keys(manifest).sort(), ["created_at", "day", "max_id", "min_id", "parts", "rows", "run_id"]);
  assert.equal(manifest.run_id, run_id);
  assert.match(manifest.created_at, /^20\d\d-\d\d-\d\dT\S+Z$/);
  for (const Key of [`${folder}manifest.json`, ...parts.map(({ key }) => key)]) {
    const { Metadata } = await bucket.client.send(new HeadObjectCommand({ Bucket: bucket.name, Key }));
    assert.deepEqual(Metadata, { run: run_id }, Key);
  }
}

suite("archive", { concurrency: true }, () => {
  test("days that are missing or none, and no concurrency, are refused with exit 2, before anything is connected to", async () => {
    const needs = "make COMMAND needs FROM and TO as dates, of UTC: the first day, and the day after the last. Example: make COMMAND FROM=";
    const days = { FROM: "2017-01-01", TO: "2017-01-03" };
    for (const [variables, ...texts] of [
      [{ ...days, TO: days.FROM }, needs],
      [{ ...days, TO: "2017-01-03T00:00:00.000001Z" }, needs],
      [{ ...days, FROM: "2017-01-01T00:00+05:45" }, needs], // a day of Kathmandu's
      [{ ...days, CONCURRENCY: "0", MAX_ROWS_PER_SECOND: "-1" }, "  CONCURRENCY must be", "  MAX_ROWS_PER_SECOND must be"],
      [{}, needs],
    ] as [Env, ...string[]][]) {
      const nowhere = { SOURCE_DATABASE_URL: "postgres://nobody@127.0.0.1:1/x", S3_ENDPOINT: "http://127.0.0.1:1" };
      for (const command of variables.TO ? ["backfill-events"] : ["backfill-events", "restore-events"]) {
        const { code, stderr } = await shop.run(`scripts/ops/${command}.ts`, { ...nowhere, ...variables });
        for (const text of texts) assert.ok(stderr.includes(text.replaceAll("COMMAND", command)), stderr);
        assert.equal(code, 2);
      }
    }
  });

  suite("days", { concurrency: 1 }, () => {
    test("a leap day, and the days around it, of which one is empty; its manifest says so, and verify agrees", async () => {
      await shop.insertEvents("2020-02-28", 3);
      await shop.insertEvents("2020-02-29", 5);
      await shop.insertEvents("2020-03-02", 1); // not asked for
      const result = await archive("2020-02-28", "2020-03-02", { CHUNK_ROWS: "2" });
      await assertArchived("2020-02-28", result, [2, 1]);
      await assertArchived("2020-02-29", result, [2, 2, 1]);
      await assertArchived("2020-03-01", result, []);
      assert.deepEqual(await keysBelow(shop.bucket, `${shop.bucket.prefix}events/dt=2020-03-02`), []);
      const { code, stderr } = await verify("2020-02-28", "2020-03-02");
      assert.equal(code, 0, stderr);
      assert.match(stderr, /step=done days=3 rows=8 bytes=\d+ failed=0 /);
    });

    test("the end of a year, and years with odd names", async () => {
      for (const day of ["2018-12-31", "2019-01-01", "1969-12-31", "1970-01-01", "0001-01-01"]) await shop.insertEvents(day, 2);
      await assertArchived("2018-12-31", await archive("2018-12-31", "2019-01-01"), [2]);
      const both = await archive("2018-12-30", "2019-01-03");
      assert.match(both.stderr, /step=days archived=3 skipped=1 failed=0/);
      await assertArchived("2019-01-01", both, [2]);
      const epoch = await archive("1969-12-31", "1970-01-02", { CONCURRENCY: "2", CHUNK_ROWS: "1" });
      await assertArchived("1969-12-31", epoch, [1, 1]);
      await assertArchived("1970-01-01", epoch, [1, 1]);
      await assertArchived("0001-01-01", await archive("0001-01-01", "0001-01-02"), [2]);
    });

    test("parts of CHUNK_ROWS rows: one less than the day has, exactly as many, one more", async () => {
      await shop.insertEvents("2017-03-01", 6);
      const [from, to] = ["2017-03-01", "2017-03-02"];
      for (const [CHUNK_ROWS, sizes] of [
        ["5", [5, 1]],
        ["6", [6]],
        ["7", [6]],
      ] as const) {
        // Archived again each time: the parts before are gone.
        await assertArchived(from, await archive(from, to, { CHUNK_ROWS, FORCE: "1" }), [...sizes]);
      }
    });

    test("many rows of one time, at midnight and in the last microsecond, with any ids, are in the day once and in order", async () => {
      const day = "2017-04-01";
      const [least, most] = [-(2n ** 63n), 2n ** 63n - 1n];
      const ids = (first: bigint): bigint[] => Array.from({ length: 998 }, (_, i) => first + 7n * BigInt((i * 389) % 998));
      const midnight = [least, least + 1n, ...ids(-3_000_000n)];
      const last = [most, most - 1n, ...ids(-9_000_000n)]; // older ids, later in the day
      const noon = [2n ** 53n, 2n ** 53n + 1n, -(2n ** 53n) - 1n, -1n, 0n];
      const rows = (at: string, some: bigint[]): { id: bigint; at: string }[] => some.map((id) => ({ id, at }));
      await insert([
        ...rows(`${day} 23:59:59.999999Z`, last),
        ...rows(`${day} 12:00:00Z`, noon),
        ...rows(`${day} 00:00:00Z`, midnight),
        ...rows("2017-04-02 00:00:00Z", [most - 2n, least + 2n, 1_000_000n]),
        ...rows("2017-03-31 23:59:59.999999Z", [most - 3n, least + 3n]),
      ]);
      const split = await archive(day, addDays(day), { CHUNK_ROWS: "300" });
      await assertArchived(day, split, [300, 300, 300, 300, 300, 300, 205]);
      await assertArchived("2017-04-02", await archive("2017-04-02", "2017-04-03", { CHUNK_ROWS: "1" }), [1, 1, 1]);
      // A part's last row is the smallest id that there is, and the largest.
      await shop.admin`delete from public.events where id in (${String(least)}, ${String(most)})`;
      await insert(rows("2017-04-05 00:00:00Z", [least, least + 100n]));
      await insert(rows("2017-04-05 23:59:59.999999Z", [least + 101n, most]));
      await assertArchived("2017-04-05", await archive("2017-04-05", "2017-04-06", { CHUNK_ROWS: "1" }), [1, 1, 1, 1]);
      await assertArchived("2017-04-05", await archive("2017-04-05", "2017-04-06", { CHUNK_ROWS: "2", FORCE: "1" }), [2, 2]);
    });

    test("the time zone of the database, of the role and of the machine change nothing: days are UTC's", async () => {
      const day = "2018-03-01";
      const times = ["00:00:00", "05:44:59.999999", "18:14:59.999999", "18:15:00", "23:59:59.999999"];
      await insert([
        ...times.map((time, index) => ({ id: 800_000n + BigInt(index), at: `${day} ${time}Z` })),
        { id: 800_010n, at: `${addDays(day)} 00:00:00Z` },
        { id: 800_011n, at: `${addDays(day, -1)} 23:59:59.999999Z` },
      ]);
      const set = (to: string): Promise<unknown> =>
        shop.admin.unsafe(
          `alter database ${shop.dataset} ${to}; alter role etl_reader in database ${shop.dataset} ${to}; alter role etl_metadata in database ${shop.dataset} ${to}`,
        );
      await set("set timezone = 'Asia/Kathmandu'");
      const TZ = "Asia/Kathmandu";
      try {
        await assertArchived(day, await archive(day, addDays(day), { TZ, CHUNK_ROWS: "2" }), [2, 2, 1]);
        const verified = await verify(day, addDays(day), { TZ });
        assert.equal(verified.code, 0, verified.stderr);
        await shop.succeed("scripts/ops/restore-events.ts", { FROM: day, TO: addDays(day), TZ });
      } finally {
        await set("reset timezone");
      }
      const restored = await shop.admin`select id::text from etl.events_restored order by created_at`;
      assert.deepEqual(
        restored.map(({ id }) => id),
        times.map((_, index) => String(800_000 + index)),
      );
    });

    test("S3_PREFIX stands before every key, whatever it holds, with one slash behind it and none before", async () => {
      const day = "2017-05-01";
      await shop.insertEvents(day, 3);
      const prefix = `${shop.dataset}/odd a b+c%2Bd%/'e"f=&g?h#i;ü👩/(j)*!~`;
      const S3_PREFIX = `//${prefix}//`;
      const bucket = connectBucket({ ...shop.env, S3_PREFIX: `${prefix}/` });
      await assertArchived(day, await archive(day, addDays(day), { S3_PREFIX, CHUNK_ROWS: "2" }), [2, 1], bucket);
      const verified = await verify(day, addDays(day), { S3_PREFIX });
      assert.equal(verified.code, 0, verified.stderr);
      assert.doesNotMatch(verified.stderr, /stray/);
      // Again: the parts that it replaces are found under their keys.
      await assertArchived(day, await archive(day, addDays(day), { S3_PREFIX, FORCE: "1" }), [3], bucket);
    });

    test("an S3_PREFIX of slashes only is none: a bucket of the archive's own has events/ at its root", async () => {
      const day = "2017-05-01";
      const S3_BUCKET = shop.dataset.replaceAll("_", "-");
      const bucket = connectBucket({ ...shop.env, S3_BUCKET, S3_PREFIX: "" });
      await createBucket(bucket);
      try {
        const result = await archive(day, addDays(day), { S3_BUCKET, S3_PREFIX: "//" });
        await assertArchived(day, result, [3], bucket);
        const key = `events/dt=2017-05-01/part-0001-${runOf(result)}.ndjson.gz`;
        assert.deepEqual(await keysBelow(bucket, ""), ["events/dt=2017-05-01/manifest.json", key]);
      } finally {
        await removeObjects(bucket, await keysBelow(bucket, ""));
        await bucket.client.send(new DeleteBucketCommand({ Bucket: S3_BUCKET }));
      }
    });
  });

  suite("memory", { concurrency: 1 }, () => {
    test("peak memory does not grow with a day: many rows take at most 50 MB more than 10,000, and under 250 MB", async () => {
      const sizes = process.env.SOAK ? [10_000, 1_000_000, 5_000_000] : [10_000, 300_000];
      for (const [index, rows] of sizes.entries()) await memoryShop.insertEvents(addDays("2017-01-01", index), rows);
      const peak = async (index: number): Promise<number> => {
        const FROM = addDays("2017-01-01", index);
        const { stderr } = await memoryShop.succeed(script, { FROM, TO: addDays(FROM), FORCE: "1" });
        const done = /step=done rows=(\d+) .* peak_rss_mb=(\d+)$/m.exec(stderr);
        assert.equal(Number(done?.[1]), sizes[index]);
        return Number(done?.[2]);
      };
      const peaks = await lowestPeaks(sizes.length, peak);
      const [small = 0] = peaks;
      assert.ok(Math.max(...peaks) - small <= 50, `${peaks} MB at ${sizes} rows`);
      assert.ok(Math.max(...peaks) < 250, `${peaks} MB`);
    });

    test("whatever a row's size, memory stays under 300 MB, a part at 32 MB, and what is larger is a part of its own", async () => {
      const day = "2017-02-01";
      // Of random text, which gzip makes a quarter smaller; made there, since a process's peak begins with its parent's.
      const insertLarge = async (megabytes: number): Promise<unknown> => memoryShop.admin`
        insert into public.events (type, payload, created_at)
        select 'large', jsonb_build_object('text', encode(string_agg(uuid_send(gen_random_uuid()), ''), 'base64')),
          ${`${day} 12:00Z`}::text::timestamptz from generate_series(1, ${(megabytes * 3_000_000) / 64}::int)`;
      for (const megabytes of [60, 10, 50]) {
        await memoryShop.insertEvents(day, 3);
        await insertLarge(megabytes);
      }
      let lowest = Number.POSITIVE_INFINITY;
      for (let tries = 0; lowest >= 300 && tries < 3; tries++) {
        const { stderr } = await memoryShop.succeed(script, { FROM: day, TO: addDays(day), FORCE: "1" });
        lowest = Math.min(lowest, Number(/step=done rows=12 .* peak_rss_mb=(\d+)$/m.exec(stderr)?.[1]));
      }
      assert.ok(lowest < 300, `${lowest} MB`);
      const { code, stderr } = await memoryShop.run("scripts/ops/verify-events.ts", { FROM: day, TO: addDays(day) });
      assert.equal(code, 0, stderr);
      const { parts } = (await readManifest(memoryShop.bucket, day))?.manifest ?? assert.fail();
      const large = parts.filter(({ bytes }) => bytes > 32 * 2 ** 20);
      assert.deepEqual(
        large.map(({ rows }) => rows),
        [1, 1],
      );
    });
  });
});
