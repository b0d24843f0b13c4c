// Which rows are in which day's archive, in which parts, under which keys: the days of UTC, however they are asked for. Needs the local
// stack (make up).
import assert from "node:assert/strict";
import { after, suite, test } from "node:test";
import { HeadObjectCommand } from "@aws-sdk/client-s3";
import { addDays, readManifest } from "../../shared/events/archive.ts";
import { assertArchivedClean, backfill, type EventRow, insertRows, objectKeys } from "../lib/s3.ts";
import { createShop, lowestPeaks, type Result } from "../lib/shop.ts";
import type { Env } from "../stack/env.ts";

const shop = await createShop({ bigquery: false });
after(() => shop[Symbol.asyncDispose]());
// Days are UTC's, whatever the zone of the database and of the machine. (This session is older.)
const TZ = "Asia/Kathmandu";
await shop.admin.unsafe(`alter database ${shop.dataset} set timezone = '${TZ}'`);

const archive = (FROM: string, TO: string, variables: Env = {}): Promise<Result> => shop.succeed(backfill, { FROM, TO, TZ, ...variables });

/** A day in the bucket is what the source has of it, in parts of these sizes, under the keys of the design, and nothing else. */
async function assertArchived(day: string, { stderr }: Result, sizes: number[]): Promise<void> {
  const { manifest } = await assertArchivedClean(shop, day);
  const [, run_id = ""] = /run=(\w+) step=/.exec(stderr) ?? [];
  const { bucket } = shop;
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
      [{ ...days, FROM: "2017-01-01T05:45" }, needs], // no midnight
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
    test("a leap day, and the days around it, of which one is empty: its manifest says so; they are verified and restored", async () => {
      await shop.insertEvents("2020-02-28", 3);
      await shop.insertEvents("2020-02-29", 5);
      await shop.insertEvents("2020-03-02", 1); // not asked for
      const [from, to] = ["2020-02-28", "2020-03-02"];
      const S3_PREFIX = `//${shop.bucket.prefix}/`; // is the same prefix
      const result = await archive(from, to, { CHUNK_ROWS: "2", S3_PREFIX });
      await assertArchived("2020-02-28", result, [2, 1]);
      await assertArchived("2020-02-29", result, [2, 2, 1]);
      await assertArchived("2020-03-01", result, []);
      assert.deepEqual(await objectKeys(shop, to), []);
      assert.match(
        (await shop.succeed("scripts/ops/verify-events.ts", { FROM: from, TO: to, TZ })).stderr,
        /step=done days=3 rows=8 bytes=\d+ failed=0 /,
      );
      await shop.succeed("scripts/ops/restore-events.ts", { FROM: from, TO: to, TZ });
      const days =
        await shop.admin`select created_at::date::text as day, count(*)::int as rows from etl.events_restored group by 1 order by 1`;
      assert.deepEqual(
        [...days],
        [
          { day: "2020-02-28", rows: 3 },
          { day: "2020-02-29", rows: 5 },
        ],
      );
    });

    test("the end of a year, and years with odd names", async () => {
      for (const day of ["2018-12-31", "2019-01-01", "1969-12-31", "1970-01-01", "0001-01-01"]) await shop.insertEvents(day, 2);
      const year = await archive("2018-12-31", "2019-01-03");
      await assertArchived("2018-12-31", year, [2]);
      await assertArchived("2019-01-01", year, [2]);
      const epoch = await archive("1969-12-31", "1970-01-02", { CONCURRENCY: "2", CHUNK_ROWS: "1" });
      await assertArchived("1969-12-31", epoch, [1, 1]);
      await assertArchived("1970-01-01", epoch, [1, 1]);
      await assertArchived("0001-01-01", await archive("0001-01-01", "0001-01-02"), [2]);
    });

    test("parts of CHUNK_ROWS rows: one less than the day has, exactly as many, one more", async () => {
      await shop.insertEvents("2017-03-01", 6);
      // Archived again each time: the parts before are gone.
      for (const [CHUNK_ROWS, ...sizes] of [
        [5, 5, 1],
        [6, 6],
        [7, 6],
      ])
        await assertArchived("2017-03-01", await archive("2017-03-01", "2017-03-02", { CHUNK_ROWS: `${CHUNK_ROWS}`, FORCE: "1" }), sizes);
    });

    test("many rows of one time, at midnight and in the last microsecond, with any ids, are in the day once and in order", async () => {
      const day = "2017-04-01";
      const [least, most] = [-(2n ** 63n), 2n ** 63n - 1n];
      const ids = (first: bigint): bigint[] => Array.from({ length: 998 }, (_, i) => first + 7n * BigInt((i * 389) % 998));
      const midnight = [least, least + 1n, ...ids(-3_000_000n)];
      const last = [most, most - 1n, ...ids(-9_000_000n)]; // older ids, later in the day
      const noon = [2n ** 53n, 2n ** 53n + 1n, -(2n ** 53n) - 1n, -1n, 0n];
      const rows = (created_at: string, some: bigint[]): Partial<EventRow>[] => some.map((id) => ({ id: `${id}`, created_at }));
      await insertRows(shop, [
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
      await insertRows(shop, rows("2017-04-05 00:00:00Z", [least, least + 100n]));
      await insertRows(shop, rows("2017-04-05 23:59:59.999999Z", [least + 101n, most]));
      await assertArchived("2017-04-05", await archive("2017-04-05", "2017-04-06", { CHUNK_ROWS: "1" }), [1, 1, 1, 1]);
      await assertArchived("2017-04-05", await archive("2017-04-05", "2017-04-06", { CHUNK_ROWS: "2", FORCE: "1" }), [2, 2]);
    });
  });

  suite("memory", { concurrency: 1 }, async () => {
    const shop = await createShop({ bigquery: false });
    after(() => shop[Symbol.asyncDispose]());

    test("peak memory does not grow with a day: many rows take at most 50 MB more than 10,000, and under 250 MB", async () => {
      const sizes = process.env.SOAK ? [10_000, 1_000_000, 5_000_000] : [10_000, 300_000];
      for (const [index, rows] of sizes.entries()) await shop.insertEvents(addDays("2017-01-01", index), rows);
      const peak = async (index: number): Promise<number> => {
        const FROM = addDays("2017-01-01", index);
        const { stderr } = await shop.succeed(backfill, { FROM, TO: addDays(FROM), FORCE: "1" });
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
      // Of one random text of 100 KB, longer than what gzip looks back; made there, since a process's peak begins with its parent's. The
      // last of the day: rows that come with a row's last bytes go into its part.
      for (const megabytes of [50, 10, 50]) {
        await shop.insertEvents(day, 3);
        await shop.admin`
          insert into public.events (type, payload, created_at)
          select 'large',
            jsonb_build_object('text', repeat(encode(string_agg(uuid_send(gen_random_uuid()), ''), 'base64'), ${megabytes * 10}::int)),
            ${`${day} 23:00Z`}::text::timestamptz from generate_series(1, 4700)`;
      }
      let lowest = Number.POSITIVE_INFINITY;
      for (let tries = 0; lowest >= 300 && tries < 3; tries++) {
        const { stderr } = await shop.succeed(backfill, { FROM: day, TO: addDays(day), FORCE: "1" });
        lowest = Math.min(lowest, Number(/step=done rows=12 .* peak_rss_mb=(\d+)$/m.exec(stderr)?.[1]));
      }
      assert.ok(lowest < 300, `${lowest} MB`);
      await shop.succeed("scripts/ops/verify-events.ts", { FROM: day, TO: addDays(day) });
      const { parts } = (await readManifest(shop.bucket, day))?.manifest ?? assert.fail();
      const large = parts.filter(({ bytes }) => bytes > 32 * 2 ** 20).map(({ rows }) => rows);
      assert.deepEqual(large, [1, 1]);
    });
  });
});
