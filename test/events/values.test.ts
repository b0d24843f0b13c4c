// What is archived can be read back as it was, whatever its values; what is damaged is found, named and repaired. Needs the local stack
// (make up).
import assert from "node:assert/strict";
import { createHash } from "node:crypto";
import { after, before, suite, test } from "node:test";
import { gunzipSync, gzipSync } from "node:zlib";
import { PutObjectCommand } from "@aws-sdk/client-s3";
import fc from "fast-check";
import { addDays, type Manifest, type Part, readManifest } from "../../shared/events/archive.ts";
import { removeObjects } from "../../shared/events/s3.ts";
import { anyJson, anyText, seed } from "../lib/random.ts";
import { backfill as archiver, type EventRow, insertRows, objectKeys, readObject } from "../lib/s3.ts";
import { createShop, type Result, type Shop } from "../lib/shop.ts";
import { jsons, texts } from "../lib/texts.ts";
import type { Env } from "../stack/env.ts";

const [verifier, restorer] = ["scripts/ops/verify-events.ts", "scripts/ops/restore-events.ts"] as const;
const backfill = (shop: Shop, FROM: string, TO: string, variables: Env = {}): Promise<Result> =>
  shop.succeed(archiver, { FROM, TO, ...variables });
const verify = (shop: Shop, FROM: string, TO: string): Promise<Result> => shop.succeed(verifier, { FROM, TO });
const restore = (shop: Shop, FROM: string, TO: string): Promise<Result> => shop.succeed(restorer, { FROM, TO });

const folder = (shop: Shop, day: string): string => `${shop.bucket.prefix}events/dt=${day}/`;
const read = (shop: Shop, key: string): Promise<Buffer> => readObject(shop.bucket, key);
const put = async (shop: Shop, Key: string, Body: Buffer | string): Promise<unknown> =>
  shop.bucket.client.send(new PutObjectCommand({ Bucket: shop.bucket.name, Key, Body }));
const manifestOf = async ({ bucket }: Shop, day: string): Promise<Manifest> =>
  (await readManifest(bucket, day))?.manifest ?? assert.fail(`${day} has no manifest`);

/** Source and restored table are equal: a record as text keeps NULL, '' and JSON's null apart, and each digit. */
async function assertRestored(shop: Shop): Promise<void> {
  const differ = await shop.admin`
    select id::text, left(e::text, 200) as source, left(r::text, 200) as restored
    from public.events e full join etl.events_restored r using (id)
    where e::text is distinct from r::text or to_jsonb(e) is distinct from to_jsonb(r)
      or (e.payload is null) is distinct from (r.payload is null) order by id limit 10`;
  assert.deepEqual([...differ], []);
}

const payloads = [
  ...jsons,
  ...["null", "-0", '""', '"null"', "[null]", '{"a": null}', "[0.10, 1E400, 1.00]"],
  "[-9223372036854775809, 123456789012345678901234567890.12345678901234567890]",
  '{"id": 5, "created_at": "x", "payload": null}',
  ...texts.map((text) => JSON.stringify({ [text]: text })),
];
const users = ["0", "-1", "9223372036854775807", "-9223372036854775808", "9007199254740993", "-9007199254740993"];

suite("archive", { concurrency: true }, () => {
  suite("values", { concurrency: 1 }, () => {
    let shop: Shop;
    before(async () => {
      shop = await createShop({ bigquery: false, pushgateway: true });
    });
    after(() => shop?.[Symbol.asyncDispose]());
    const clear = (): Promise<unknown> => shop.admin.unsafe("truncate public.events, etl.events_restored restart identity");
    const days = ["2017-01-01", "2017-01-02", "2017-01-03"];
    const moments = ["00:00:00", "00:00:00.000001", "12:34:56.7", "23:59:59.999999"];

    test("whatever a row holds is archived, verified and restored as it was", async () => {
      const rows: Partial<EventRow>[] = [
        {}, // NULL everywhere
        ...texts.map((type) => ({ type })),
        ...payloads.map((payload) => ({ payload })),
        ...users.map((user_id) => ({ user_id })),
        ...users.slice(1).map((id) => ({ id, type: "" })),
      ];
      const dated = rows.map((row, index) => ({
        id: String(index + 1),
        created_at: `${days[index % days.length]} ${moments[index % moments.length]}Z`,
        ...row,
      }));
      await insertRows(shop, dated);
      await backfill(shop, "2017-01-01", "2017-01-04", { CHUNK_ROWS: "7" });
      const { stderr } = await verify(shop, "2017-01-01", "2017-01-04");
      assert.match(stderr, new RegExp(`step=done days=3 rows=${rows.length} bytes=\\d+ failed=0 `));
      await restore(shop, "2017-01-01", "2017-01-04");
      await assertRestored(shop);
    });

    test("restoring a day again replaces that day's rows, and only those", async () => {
      await shop.admin.unsafe(`
        update etl.events_restored set type = 'touched', payload = '1' where created_at < '2017-01-03Z';
        delete from etl.events_restored where created_at = '2017-01-02 00:00:00.000001Z';
        insert into etl.events_restored (id, created_at)
          values (77777, '2017-01-02Z'), (77778, '2017-01-02 23:59:59.999999Z'), (77779, '2017-01-03Z')`);
      await restore(shop, "2017-01-02", "2017-01-03");
      const wrong = await shop.admin`
        select coalesce(e.created_at, r.created_at)::date::text as day, e.id is null as extra, count(*)::int > 1 as many
        from public.events e full join etl.events_restored r using (id) where e::text is distinct from r::text group by 1, 2 order by 1, 2`;
      assert.deepEqual(
        [...wrong],
        [
          { day: "2017-01-01", extra: false, many: true },
          { day: "2017-01-03", extra: true, many: false },
        ],
      );
      await restore(shop, "2017-01-01", "2017-01-04");
      await assertRestored(shop);
    });

    test("random rows are archived, verified and restored as they were", async () => {
      const microsecond = fc.integer({ min: 0, max: 3 * 86_400_000_000 - 1 });
      const row = fc.record({
        user_id: fc.option(fc.bigInt({ min: -(2n ** 63n), max: 2n ** 63n - 1n }).map(String)),
        type: fc.option(anyText()),
        payload: fc.option(anyJson(), { freq: 10 }),
        // Many of one time, too.
        created_at: fc.oneof(microsecond, microsecond, fc.constant(86_400_000_000)).map((at) => {
          const date = new Date(Date.UTC(2017, 1, 1) + Math.floor(at / 1000)).toISOString().slice(0, -1);
          return `${date}${String(at % 1000).padStart(3, "0")}Z`;
        }),
      });
      const ids = fc.uniqueArray(fc.bigInt({ min: -(2n ** 62n), max: 2n ** 62n }), { minLength: 900, maxLength: 900 });
      const [id = []] = fc.sample(ids, { seed, numRuns: 1 });
      await clear();
      await insertRows(
        shop,
        fc.sample(row, { seed, numRuns: id.length }).map((values, index) => ({ id: String(id[index]), ...values })),
      );
      const [from, to] = ["2017-02-01", "2017-02-04"];
      await backfill(shop, from, to, { CHUNK_ROWS: String(40 + (seed % 150)), CONCURRENCY: "2" });
      await verify(shop, from, to);
      await restore(shop, from, to);
      await assertRestored(shop);
    });

    test("a part that differs from its manifest is not restored: it is named, and the day stays as it is", async () => {
      const day = "2017-02-02";
      const { key } = (await manifestOf(shop, day)).parts[0] as Part;
      const whole = await read(shop, key);
      await put(shop, key, gzipSync(gunzipSync(whole), { level: 1 }));
      const { code, stderr } = await shop.run(restorer, { FROM: day, TO: addDays(day) });
      await put(shop, key, whole);
      assert.equal(code, 1);
      await assertRestored(shop);
      assert.ok(stderr.includes(`${key}: expected `), stderr);
      assert.match(stderr, new RegExp(`Nothing of ${day} was restored\\. Next: make verify-events FROM=${day} TO=${addDays(day)}`));
    });

    test("a row whose created_at moved to another day is named where both days are restored, and the commands repair it", async () => {
      await clear();
      const [first, second, end] = ["2017-03-01", "2017-03-02", "2017-03-03"] as const;
      await shop.insertEvents(first, 3);
      await backfill(shop, first, second);
      await shop.admin`update public.events set created_at = created_at + interval '1 day' where id = 2`;
      await backfill(shop, second, end);
      const { code, stderr } = await shop.run(restorer, { FROM: first, TO: end });
      assert.equal(code, 1);
      const next = `make verify-events FROM=${first} TO=${second}; make verify-events FROM=${second} TO=${end}`;
      assert.match(stderr, new RegExp(`^  ${second}: row id=2 is restored with ${first} already: .* Next: ${next}\\.`, "m"));
      const verified = await shop.run(verifier, { FROM: first, TO: end });
      assert.match(verified.stderr, new RegExp(`make backfill-events FROM=${first} TO=${second} FORCE=1 ALLOW_SHRINK=1`));
      await backfill(shop, first, second, { FORCE: "1", ALLOW_SHRINK: "1" });
      await restore(shop, first, end);
      await assertRestored(shop);
    });

    test("a cursor that may be null, a missing column and columns of other types are named, all at once, before a row moves", async () => {
      await clear();
      const [FROM, TO] = ["2017-04-01", "2017-04-02"];
      await shop.insertEvents(FROM, 3);
      const alter = (change: string): Promise<unknown> => shop.admin.unsafe(`alter table public.events ${change}`);
      await alter("alter user_id type int, alter payload type json, alter created_at drop not null");
      await alter("rename type to kind");
      const { code, stderr } = await shop.run(archiver, { FROM, TO });
      await alter("rename kind to type");
      await alter("alter user_id type bigint, alter payload type jsonb, alter created_at set not null");
      assert.equal(code, 2, stderr);
      const file = "(sql/etl/002_events_restored.sql)";
      for (const text of [
        "public.events.created_at: expected NOT NULL, since it is the cursor",
        `public.events.user_id: expected bigint ${file}, found integer`,
        `public.events.type: expected text ${file}, found no such column`,
        `public.events.payload: expected jsonb ${file}, found json`,
        "not in the contract: kind (was a column renamed?)\nBring the source, sql/events.sql and sql/etl/002_events_restored.sql together;",
      ])
        assert.ok(stderr.includes(text), `${text}\n${stderr}`);
      assert.deepEqual(await objectKeys(shop, FROM), []);
    });

    test("a new column is a warning and a metric; a restore into a table that has one more names the day and the column", async () => {
      const [FROM, TO] = ["2017-04-01", "2017-04-02"];
      await shop.admin`alter table public.events add channel text default 'web', add "odd name" int`;
      const { stderr } = await shop.succeed("scripts/events.ts");
      assert.match(stderr, /step=warning warning="public\.events has columns .* and are not synced" columns="channel,odd name"/);
      assert.equal((await shop.metrics("events")).etl_unknown_source_columns, 2);
      await backfill(shop, FROM, TO);
      await shop.admin.unsafe("alter table etl.events_restored add channel text not null"); // days of before a column are without it
      const failed = await shop.run(restorer, { FROM, TO });
      assert.equal(failed.code, 1);
      const named = new RegExp(
        `^  ${FROM}: .* column "channel".* Run: (alter table .*?); then: make restore-events FROM=${FROM} TO=${TO}$`,
        "m",
      );
      const [, remedy = ""] = named.exec(failed.stderr) ?? assert.fail(failed.stderr);
      await shop.admin.unsafe(remedy);
      await restore(shop, FROM, TO);
      // One that the archive's table no longer has is not lost in silence.
      await shop.admin.unsafe("alter table etl.events_restored drop column type");
      const lost = await shop.run(restorer, { FROM, TO });
      const [, add = ""] = / {2}2017-04-01: .* Run: (alter table .*?;) .* make restore-events FROM=2017/.exec(lost.stderr) ?? [];
      await shop.admin.unsafe(add);
      await restore(shop, FROM, TO);
      assert.equal((await shop.admin`select from etl.events_restored r join public.events e using (id, type, payload)`).count, 3);
    });
  });

  test("a row that the source refuses is named by its key, and the day is archived once it is corrected", async () => {
    await using shop = await createShop({ bigquery: false, encoding: "SQL_ASCII" }); // an old database takes any byte
    const [FROM, TO] = ["2017-01-01", "2017-01-02"];
    await shop.insertEvents(FROM, 40);
    await shop.admin`update public.events set type = 'caf' || chr(233) where id = 37`;
    const { code, stderr } = await shop.run(archiver, { FROM, TO, CHUNK_ROWS: "30" });
    assert.match(
      stderr,
      /^ {2}2017-01-01: row id=37, created_at=.+ of events is refused: .*invalid byte.* Correct it at the source, then: make events$/m,
    );
    assert.equal(code, 1);
    assert.deepEqual(await objectKeys(shop), []);
    await shop.admin`update public.events set type = 'coffee' where id = 37`;
    await backfill(shop, FROM, TO, { CHUNK_ROWS: "30" });
    await restore(shop, FROM, TO);
    await assertRestored(shop);
  });

  suite("verify", { concurrency: 1 }, () => {
    let shop: Shop;
    let found: Result;
    const manifestKey = (day: string): string => `${folder(shop, day)}manifest.json`;
    const partKey = async (day: string, index = 1): Promise<string> => ((await manifestOf(shop, day)).parts[index] as Part).key;
    /** Changes the bytes of a day's second part. */
    const alter =
      (change: (part: Buffer) => Buffer) =>
      async (day: string): Promise<unknown> => {
        const key = await partKey(day);
        return put(shop, key, change(await read(shop, key)));
      };
    const flip = alter((part) => {
      const changed = Buffer.from(part);
      changed[part.length >> 1] = (changed[part.length >> 1] ?? 0) ^ 0x10;
      return changed;
    });
    const lie =
      (change: (manifest: Manifest) => unknown) =>
      async (day: string): Promise<unknown> => {
        const manifest = await manifestOf(shop, day);
        change(manifest);
        return put(shop, manifestKey(day), JSON.stringify(manifest));
      };
    /** Another part in place of a day's second, whose size and hash its manifest has. */
    const replace =
      (change: (part: Buffer) => Buffer) =>
      async (day: string): Promise<unknown> => {
        await alter(change)(day);
        const other = await read(shop, await partKey(day));
        const is = { bytes: other.length, sha256: createHash("sha256").update(other).digest("hex") };
        return lie(({ parts: [, part] }) => Object.assign(part as Part, is))(day);
      };
    const source =
      (sql: string) =>
      async (day: string): Promise<unknown> =>
        shop.admin.unsafe(
          sql.replaceAll("DAY", `created_at >= '${day}Z' and created_at < '${addDays(day)}Z'`).replaceAll("NOON", `'${day} 12:00Z'`),
        );

    /** Seven rows a day, in parts of three, three and one. PART: the day's. */
    const forced: Record<string, [damage: (day: string) => Promise<unknown>, text: string]> = {
      "a flipped byte in a part's middle": [flip, "PART: expected sha256 \\w{64} \\(its manifest\\), found \\w{64}"],
      "something after a part's end, with its size and hash corrected in the manifest": [
        replace((part) => Buffer.concat([part, Buffer.from("more")])),
        "PART: it does not decompress \\(.+\\)",
      ],
      "a missing part": [async (day) => removeObjects(shop.bucket, [await partKey(day)]), "PART: it does not exist"],
      "other rows in a part, with all but its raw hash corrected in the manifest": [
        replace((part) => gzipSync(gunzipSync(part).toString().replace("purchase", "refunded"))),
        "PART: expected sha256_raw \\w{64} \\(its manifest\\), found \\w{64}",
      ],
      "a manifest without one of the parts": [
        lie(({ parts }) => parts.splice(1, 1)),
        "its 7 rows are not the source's 7: rows were added with an old created_at, changed or deleted",
      ],
      "a row written later with an old created_at": [
        source("insert into public.events (created_at) values (NOON)"),
        "its 7 rows are not the source's 8: rows were added with an old created_at, changed or deleted",
      ],
      "a value changed at the source": [
        source(`update public.events set payload = '{"changed": true}' where DAY and id % 7 = 3`),
        "its 7 rows are not the source's 7: rows were added with an old created_at, changed or deleted",
      ],
    };
    /** Those that the same options of backfill-events repair stand together. */
    const cases = [
      ...Object.entries(forced).map(([when, [damage, text]]) => ({ when, damage, text, options: " FORCE=1" })),
      {
        when: "a manifest that is missing",
        damage: (day: string) => removeObjects(shop.bucket, [manifestKey(day)]),
        text: "is not archived; the source has 7 rows of it",
        options: "",
      },
      {
        when: "some rows deleted at the source",
        damage: source("delete from public.events where DAY and created_at > NOON"),
        text: "its 7 rows are not the source's 4: rows were added with an old created_at, changed or deleted",
        options: " FORCE=1 ALLOW_SHRINK=1",
      },
    ];
    const dayOf = (index: number): string => addDays("2017-01-01", index);
    const purged = dayOf(cases.length);
    const lost = dayOf(cases.length + 1);
    const end = dayOf(cases.length + 2);
    let whole: Buffer;

    before(async () => {
      shop = await createShop({ bigquery: false });
      for (let day = dayOf(0); day < end; day = addDays(day)) await shop.insertEvents(day, 7);
      await backfill(shop, dayOf(0), end, { CHUNK_ROWS: "3", CONCURRENCY: "4" });
      await verify(shop, dayOf(0), end);
      for (const [index, { damage }] of cases.entries()) await damage(dayOf(index));
      for (const day of [purged, lost]) await source("delete from public.events where DAY")(day);
      whole = await read(shop, await partKey(lost));
      await removeObjects(shop.bucket, [await partKey(lost)]);
      found = await shop.run(verifier, { FROM: dayOf(0), TO: end });
    });
    after(() => shop?.[Symbol.asyncDispose]());

    test("the days that differ are counted, and the exit code is 1", () => {
      assert.equal(found.code, 1);
      const differ = cases.length + 1;
      assert.match(found.stderr, new RegExp(`step=days days=${cases.length + 2} rows=\\d+ bytes=\\d+ failed=${differ} `));
      assert.match(found.stderr, new RegExp(`^error: ${differ} of ${cases.length + 2} days failed:$`, "m"));
    });

    for (const [index, { when, text, options }] of cases.entries()) {
      const day = dayOf(index);
      test(`${when} is named, with the command`, () => {
        const lines = found.stderr.split("\n").filter((line) => line.startsWith(`  ${day}: `));
        assert.equal(lines.length, 1, found.stderr);
        const expected = text.replace("PART", `s3://archive/${folder(shop, day)}part-0002-\\w+\\.ndjson\\.gz`);
        assert.match(
          lines[0] ?? "",
          new RegExp(`^  ${day}: ${expected}\\. (Next|If .*): make backfill-events FROM=${day} TO=${addDays(day)}${options}$`),
        );
      });
    }

    test("the command that is named repairs it, each of these", async () => {
      for (const [options, days] of Map.groupBy(cases.keys(), (index) => cases[index]?.options ?? "")) {
        const variables = Object.fromEntries([...options.matchAll(/(\w+)=(\d)/g)].map(([, name, value]) => [name, value]));
        await backfill(shop, dayOf(days[0] ?? 0), addDays(dayOf(days.at(-1) ?? 0)), variables);
      }
    });

    test("a day whose rows are gone from the source is a note; damaged, its object is to be restored", async () => {
      const note = `step=note day=${purged} note="the source has none of its 7 rows any more"`;
      assert.ok(found.stderr.includes(note), found.stderr);
      assert.doesNotMatch(found.stderr, new RegExp(`^  ${purged}`, "m"));
      const key = await partKey(lost);
      const remedy = `restore the object from the bucket's versions or a copy, then: make verify-events FROM=${lost} TO=${addDays(lost)}`;
      const only = `The source has only 0 of its 7 rows: ${remedy}`;
      assert.match(found.stderr, new RegExp(`^  ${lost}: s3://archive/${key}: it does not exist\\. ${only}$`, "m"));
      await put(shop, key, whole);
    });

    test("after all of these, verify passes", async () => {
      const { stderr } = await verify(shop, dayOf(0), end);
      assert.equal(stderr.match(/step=note /g)?.length, 2);
    });

    test("a manifest that is no manifest is named, and does not keep the other days from being verified", async () => {
      const text = await read(shop, manifestKey(dayOf(0)));
      await put(shop, manifestKey(dayOf(0)), text.subarray(0, 100));
      const { code, stderr } = await shop.run(verifier, { FROM: dayOf(0), TO: dayOf(2) });
      await put(shop, manifestKey(dayOf(0)), text);
      assert.equal(code, 1);
      assert.match(stderr, new RegExp(`^  ${dayOf(0)}: .*${manifestKey(dayOf(0))}`, "m"));
      assert.match(stderr, / days=2 rows=\d+ bytes=\d+ failed=1 /);
    });

    test("a manifest of another day, and one without parts, are named, and no command removes what they name", async () => {
      const [text, others] = [await read(shop, manifestKey(dayOf(0))), await manifestOf(shop, dayOf(1))];
      for (const wrong of [JSON.stringify(others), `{"day":"${dayOf(0)}"}`, "null"]) {
        await put(shop, manifestKey(dayOf(0)), wrong);
        const [FROM, TO] = [dayOf(0), dayOf(1)];
        for (const script of [verifier, restorer, archiver]) {
          const { code, stderr } = await shop.run(script, { FROM, TO, FORCE: "1" });
          assert.match(
            stderr,
            new RegExp(`^  ${FROM}: s3://\\S+${manifestKey(FROM)}: it is not the manifest of ${FROM} .*versions or a copy`, "m"),
          );
          assert.equal(code, 1);
        }
      }
      await put(shop, manifestKey(dayOf(0)), text);
      assert.equal((await verify(shop, dayOf(0), dayOf(2))).code, 0);
    });

    test("a copy of the archive at another prefix reads its own parts, and archiving it again leaves the original as it is", async () => {
      const [FROM, TO, S3_PREFIX] = [dayOf(0), dayOf(1), `${shop.bucket.prefix}copy/`];
      for (const key of [manifestKey(FROM), ...(await manifestOf(shop, FROM)).parts.map((part) => part.key)])
        await put(shop, key.replace(shop.bucket.prefix, S3_PREFIX), await read(shop, key));
      const copied = await shop.succeed(verifier, { FROM, TO, S3_PREFIX });
      assert.doesNotMatch(copied.stderr, /step=stray/);
      await shop.succeed(archiver, { FROM, TO, S3_PREFIX, FORCE: "1" });
      assert.equal((await verify(shop, FROM, TO)).code, 0);
    });
  });
});
