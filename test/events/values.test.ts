// What is archived can be read back as it was, whatever its values; what is damaged is found, named and mended. Needs the local stack
// (make up).
import assert from "node:assert/strict";
import { createHash } from "node:crypto";
import { after, before, suite, test } from "node:test";
import { gunzipSync, gzipSync } from "node:zlib";
import { PutObjectCommand } from "@aws-sdk/client-s3";
import fc from "fast-check";
import { addDays, jsonLines, type Manifest, type Part } from "../../shared/events/archive.ts";
import { listObjects, removeObjects } from "../../shared/events/s3.ts";
import type { Column } from "../../shared/source.ts";
import { ending, hold } from "../lib/faults.ts";
import { seed } from "../lib/random.ts";
import { readObject, s3Steps, startHeld } from "../lib/s3.ts";
import { createShop, type Result, type Shop } from "../lib/shop.ts";
import { texts } from "../lib/texts.ts";
import type { Env } from "../stack/env.ts";

const [archiver, verifier, restorer] = ["scripts/ops/backfill-events.ts", "scripts/ops/verify-events.ts", "scripts/ops/restore-events.ts"];
const backfill = (shop: Shop, FROM: string, TO: string, variables: Env = {}): Promise<Result> =>
  shop.succeed(archiver, { FROM, TO, ...variables });
const verify = (shop: Shop, FROM: string, TO: string, variables: Env = {}): Promise<Result> =>
  shop.run(verifier, { FROM, TO, ...variables });
const restore = (shop: Shop, FROM: string, TO: string): Promise<Result> => shop.succeed(restorer, { FROM, TO });

const folder = (shop: Shop, day: string): string => `${shop.bucket.prefix}events/dt=${day}/`;
const read = (shop: Shop, key: string): Promise<Buffer> => readObject(shop.bucket, key);
const put = async (shop: Shop, Key: string, Body: Buffer | string): Promise<unknown> =>
  shop.bucket.client.send(new PutObjectCommand({ Bucket: shop.bucket.name, Key, Body }));
async function manifestOf(shop: Shop, day: string): Promise<Manifest> {
  return JSON.parse((await read(shop, `${folder(shop, day)}manifest.json`)).toString()) as Manifest;
}

type Row = Record<"id" | "user_id" | "type" | "payload" | "created_at", string | null>;
/** Inserts events from text. */
async function insert(shop: Shop, rows: Partial<Row>[]): Promise<void> {
  await shop.admin`
    insert into public.events (id, user_id, type, payload, created_at) overriding system value
    select id::bigint, user_id::bigint, type, payload::jsonb, created_at::timestamptz
    from jsonb_to_recordset(${JSON.stringify(rows)}::text::jsonb) r (id text, user_id text, type text, payload text, created_at text)`;
}

/** Where source and restored table differ: a record as text keeps NULL, '' and JSON's null apart, and each digit. */
async function differences(shop: Shop): Promise<unknown[]> {
  return [
    ...(await shop.admin`
      select id::text, left(e::text, 200) as source, left(r::text, 200) as restored
      from public.events e full join etl.events_restored r using (id)
      where e::text is distinct from r::text or to_jsonb(e) is distinct from to_jsonb(r)
        or (e.payload is null) is distinct from (r.payload is null) order by id limit 10`),
  ];
}

/** The JSON lines of a table, as the archive has them, in its order. */
async function linesOf(shop: Shop, table: string): Promise<string[]> {
  const names = ["id", "user_id", "type", "payload", "created_at"].map((name) => ({ name }) as Column);
  const sql = jsonLines(`select * from ${table} order by created_at, id`, names);
  return (await shop.admin.unsafe(sql).values()).map(([line]) => line as string);
}

async function assertRestored(shop: Shop, days: string[]): Promise<void> {
  assert.deepEqual(await differences(shop), []);
  const lines = await linesOf(shop, "public.events");
  const archived: string[] = [];
  for (const day of days)
    for (const { key } of (await manifestOf(shop, day)).parts)
      archived.push(
        ...gunzipSync(await read(shop, key))
          .toString()
          .split("\n")
          .slice(0, -1),
      );
  for (const [what, others] of Object.entries({ archived, restored: await linesOf(shop, "etl.events_restored") })) {
    const wrong = lines.findIndex((line, index) => line !== others[index]);
    assert.ok(wrong < 0, `source: ${lines[wrong]?.slice(0, 500)}\n${what}: ${others[wrong]?.slice(0, 500)}`);
    assert.equal(others.length, lines.length, what);
  }
}

const payloads = [
  ...["null", "{}", "[]", "0", "-0", "true", '""', '"null"', "[null]", '{"a": null}', '{"": {"": [null, false, {"a": []}]}}'],
  "[9223372036854775807, -9223372036854775809, 9007199254740993, 123456789012345678901234567890.12345678901234567890]",
  "[0.1, 0.10, 1e2, 1E400, -1.5e-7, 1.0, 1.00]",
  '{"\\u00e9\\ud83d\\ude00\\u0001\\u2028": "\\u0002\\n\\r\\t\\"\\\\\\/", "id": 5, "created_at": "x", "payload": null}',
  '{"a b": " \\\\u0041 ", "\\\\N": "\\\\."}',
  `${"[".repeat(500)}${"]".repeat(500)}`,
  ...texts.map((text) => JSON.stringify({ [text]: text })),
];
const users = ["0", "-1", "9223372036854775807", "-9223372036854775808", "9007199254740993", "-9007199254740993"];

suite("archive", { concurrency: true }, () => {
  suite("values", { concurrency: 1 }, () => {
    let shop: Shop;
    before(async () => {
      shop = await createShop({ bigquery: false });
    });
    after(() => shop?.[Symbol.asyncDispose]());
    const days = ["2017-01-01", "2017-01-02", "2017-01-03"];
    const moments = ["00:00:00", "00:00:00.000001", "12:34:56.7", "23:59:59.999999"];

    test("whatever a row holds is archived, verified and restored as it was", async () => {
      const rows: Partial<Row>[] = [
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
      await insert(shop, dated);
      await backfill(shop, "2017-01-01", "2017-01-04", { CHUNK_ROWS: "7" });
      const { code, stderr } = await verify(shop, "2017-01-01", "2017-01-04");
      assert.equal(code, 0, stderr);
      assert.match(stderr, new RegExp(`step=done days=3 rows=${rows.length} bytes=\\d+ failed=0 `));
      await restore(shop, "2017-01-01", "2017-01-04");
      await assertRestored(shop, days);
      const [apart] = await shop.admin`
        select count(*) filter (where payload = 'null')::int as json_null, count(*) filter (where payload is null)::int as none,
          count(*) filter (where type = '')::int as blank, count(*)::int as rows from etl.events_restored`;
      assert.deepEqual({ ...apart }, { json_null: 1, none: rows.length - payloads.length, blank: users.length, rows: rows.length });
    });

    test("restoring a day again replaces that day's rows, and only those", async () => {
      const touch = (day: string): Promise<unknown> =>
        shop.admin`update etl.events_restored set type = 'touched', payload = '1' where created_at::date = ${day}::text::date`;
      await touch("2017-01-01");
      await touch("2017-01-02");
      await shop.admin`insert into etl.events_restored (id, created_at) values (77777, '2017-01-02 13:00Z'), (77778, '2017-01-02 23:59:59.999999Z'), (77779, '2017-01-03 00:00Z')`;
      await shop.admin`delete from etl.events_restored where id = (select min(id) from etl.events_restored where created_at::date = '2017-01-02')`;
      await restore(shop, "2017-01-02", "2017-01-03");
      const [left] = await shop.admin`
        select count(*) filter (where r.type = 'touched')::int as touched, count(*) filter (where r.id in (77777, 77778))::int as extra,
          count(*) filter (where r.id = 77779)::int as other_day,
          (select count(*)::int from public.events where created_at::date = '2017-01-01') as first_day,
          count(*) filter (where r.created_at::date = '2017-01-02' and r::text = e::text)::int as same,
          (select count(*)::int from public.events where created_at::date = '2017-01-02') as second_day
        from etl.events_restored r left join public.events e using (id)`;
      assert.equal(left?.touched, left?.first_day);
      assert.deepEqual([left?.extra, left?.other_day], [0, 1]);
      assert.equal(left?.same, left?.second_day);
      await restore(shop, "2017-01-01", "2017-01-04");
      await assertRestored(shop, days);
    });

    test("random rows are archived, verified and restored as they were", async () => {
      const text = fc.string({ unit: "binary", maxLength: 30 }).map((value) => value.replaceAll("\0", "\u0001"));
      const json = fc
        .oneof(fc.jsonValue({ stringUnit: "binary" }), fc.dictionary(text, fc.jsonValue({ stringUnit: "binary" })))
        .map((value) => JSON.stringify(value).replaceAll("\\u0000", "\\u0002"));
      const microsecond = fc.integer({ min: 0, max: 3 * 86_400_000_000 - 1 });
      const row = fc.record({
        user_id: fc.option(fc.bigInt({ min: -(2n ** 63n), max: 2n ** 63n - 1n }).map(String)),
        type: fc.option(text),
        payload: fc.option(json, { freq: 10 }),
        // Many of one time, too.
        created_at: fc.oneof(microsecond, microsecond, fc.constant(86_400_000_000)).map((at) => {
          const date = new Date(Date.UTC(2017, 1, 1) + Math.floor(at / 1000)).toISOString().slice(0, -1);
          return `${date}${String(at % 1000).padStart(3, "0")}Z`;
        }),
      });
      const ids = fc.uniqueArray(fc.bigInt({ min: -(2n ** 62n), max: 2n ** 62n }), { minLength: 900, maxLength: 900 });
      const [id = []] = fc.sample(ids, { seed, numRuns: 1 });
      await shop.admin`truncate public.events, etl.events_restored`;
      await insert(
        shop,
        fc.sample(row, { seed, numRuns: id.length }).map((values, index) => ({ id: String(id[index]), ...values })),
      );
      const [from, to] = ["2017-02-01", "2017-02-04"];
      await backfill(shop, from, to, { CHUNK_ROWS: String(40 + (seed % 150)), CONCURRENCY: "2" });
      const { code, stderr } = await verify(shop, from, to);
      assert.equal(code, 0, stderr);
      await restore(shop, from, to);
      await assertRestored(shop, ["2017-02-01", "2017-02-02", "2017-02-03"]);
    });

    test("a part that differs from its manifest is not restored: it is named, and the day stays as it is", async () => {
      const day = "2017-02-02";
      const { key } = (await manifestOf(shop, day)).parts[0] as Part;
      const whole = await read(shop, key);
      await put(shop, key, gzipSync(gunzipSync(whole), { level: 1 }));
      const { code, stderr } = await shop.run(restorer, { FROM: day, TO: addDays(day) });
      await put(shop, key, whole);
      assert.equal(code, 1);
      await assertRestored(shop, ["2017-02-01", "2017-02-02", "2017-02-03"]);
      assert.ok(stderr.includes(`${key}: expected `), stderr);
      assert.match(stderr, new RegExp(`Nothing of ${day} was restored\\. Next: make verify-events FROM=${day} TO=${addDays(day)}`));
    });
  });

  test("a row whose created_at moved to another day is named where both days are restored, and the commands repair it", async () => {
    await using shop = await createShop({ bigquery: false });
    const [first, second, end] = ["2017-01-01", "2017-01-02", "2017-01-03"] as const;
    await shop.insertEvents(first, 3);
    await backfill(shop, first, second);
    await shop.admin`update public.events set created_at = created_at + interval '1 day' where id = 2`;
    await backfill(shop, second, end);
    const { code, stderr } = await shop.run(restorer, { FROM: first, TO: end });
    assert.equal(code, 1);
    const next = `make verify-events FROM=${first} TO=${second}; make verify-events FROM=${second} TO=${end}`;
    assert.match(stderr, new RegExp(`^  ${second}: row id=2 is restored with ${first} already: .* Next: ${next}\\.`, "m"));
    const [, FROM, TO] =
      /make backfill-events FROM=(\S+) TO=(\S+) FORCE=1 ALLOW_SHRINK=1/.exec((await verify(shop, first, end)).stderr) ?? [];
    assert.deepEqual([FROM, TO], [first, second]);
    await backfill(shop, first, second, { FORCE: "1", ALLOW_SHRINK: "1" });
    await restore(shop, first, end);
    await assertRestored(shop, [first, second]);
  });

  test("a row that the source refuses is named by its key, and the day is archived once it is corrected", async () => {
    await using shop = await createShop({ bigquery: false, encoding: "SQL_ASCII" }); // an old database takes any byte
    const [FROM, TO] = ["2017-01-01", "2017-01-02"];
    await shop.insertEvents(FROM, 40);
    await shop.admin`update public.events set type = 'caf' || chr(233) where id = 37`;
    const { code, stderr } = await shop.run(archiver, { FROM, TO, CHUNK_ROWS: "30" });
    assert.match(
      stderr,
      /^ {2}2017-01-01: row id=37 of events is refused: .*invalid byte sequence.* Correct it at the source, then: make events$/m,
    );
    assert.equal(code, 1);
    assert.deepEqual(await Array.fromAsync(listObjects(shop.bucket, shop.bucket.prefix)), []);
    await shop.admin`update public.events set type = 'coffee' where id = 37`;
    await backfill(shop, FROM, TO, { CHUNK_ROWS: "30" });
    await restore(shop, FROM, TO);
    await assertRestored(shop, [FROM]);
  });

  suite("the source's columns", { concurrency: 1 }, () => {
    let shop: Shop;
    before(async () => {
      shop = await createShop({ bigquery: false, pushgateway: true });
      await shop.insertEvents("2017-01-01", 3);
    });
    after(() => shop?.[Symbol.asyncDispose]());

    test("a cursor that may be null, a column that is gone and columns of other types are named, all at once, before a row moves", async () => {
      const alter = (change: string): Promise<unknown> => shop.admin.unsafe(`alter table public.events ${change}`);
      await alter("alter user_id type int, alter payload type json, alter created_at drop not null");
      await alter("rename type to kind");
      const { code, stderr } = await shop.run(archiver, { FROM: "2017-01-01", TO: "2017-01-02" });
      await alter("rename kind to type");
      await alter("alter user_id type bigint, alter payload type jsonb, alter created_at set not null");
      assert.equal(code, 2, stderr);
      const file = "(sql/etl/002_events_restored.sql)";
      const faults = [
        "created_at: expected NOT NULL, since it is the cursor and a row without it would never be read, found a nullable column. Run: alter table public.events alter created_at set not null;",
        `user_id: expected bigint ${file}, found integer`,
        `type: expected text ${file}, found no such column`,
        `payload: expected jsonb ${file}, found json\n  not in the contract: kind (was a column renamed?)`,
      ];
      const text = `error: the source differs from the contract, nothing was moved:\n${faults.map((fault) => `  column public.events.${fault}\n`).join("")}Bring the source, sql/events.sql and sql/etl/002_events_restored.sql together; schemas/README.md, "When the schema changes".`;
      assert.ok(stderr.endsWith(text), `${text}\n${stderr}`);
      assert.deepEqual(await Array.fromAsync(listObjects(shop.bucket, shop.bucket.prefix)), []);
    });

    test("a new column is a warning and a metric, and its table is archived", async () => {
      await shop.admin`alter table public.events add channel text default 'web', add "odd name" int`;
      const result = await shop.succeed("scripts/events.ts");
      assert.match(
        result.stderr,
        /step=warning warning="public\.events has columns that are not in sql\/etl\/002_events_restored\.sql, and are not synced" columns="channel,odd name"/,
      );
      assert.equal((await shop.metrics("events")).etl_unknown_source_columns, 2);
      await backfill(shop, "2017-01-01", "2017-01-02");
      await restore(shop, "2017-01-01", "2017-01-02");
      const restored = async (): Promise<unknown[]> =>
        (await shop.admin`select id::int from etl.events_restored order by id`).map(({ id }) => id);
      assert.deepEqual(await restored(), [1, 2, 3]);

      // Days of before a column of the archive are without it.
      await shop.admin.unsafe("delete from etl.events_restored; alter table etl.events_restored add channel text not null");
      const { code, stderr } = await shop.run(restorer, { FROM: "2017-01-01", TO: "2017-01-02" });
      assert.equal(code, 1);
      const [, remedy = ""] =
        /^ {2}2017-01-01: .* column "channel".* Run: (alter table .*?); then: make restore-events FROM=2017-01-01 TO=2017-01-02$/m.exec(
          stderr,
        ) ?? [];
      await shop.connect("owner").unsafe(remedy);
      await restore(shop, "2017-01-01", "2017-01-02");
      assert.deepEqual(await restored(), [1, 2, 3]);

      // A column that the archive no longer has is not lost in silence.
      await shop.admin.unsafe("alter table etl.events_restored drop column type");
      const lost = await shop.run(restorer, { FROM: "2017-01-01", TO: "2017-01-02" });
      const [, add = ""] = / {2}2017-01-01: .* Run: (alter table .*?;) .* make restore-events FROM=2017/.exec(lost.stderr) ?? [];
      await shop.connect("owner").unsafe(add);
      await restore(shop, "2017-01-01", "2017-01-02");
      assert.deepEqual([...(await shop.admin`select distinct type from etl.events_restored`)], [{ type: "purchase" }]);
    });
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
    const flip = (at: (length: number) => number): ((day: string) => Promise<unknown>) =>
      alter((part) => {
        const changed = Buffer.from(part);
        changed[at(part.length)] = (changed[at(part.length)] ?? 0) ^ 0x10;
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
    const FORCE = " FORCE=1";
    const CHANGED = "its 7 rows are not the source's: rows were changed there\\. If the archive is to have that too: ";

    /**
     * Seven rows a day, in parts of three, three and one. PART, MANIFEST, LEAST, MOST: the day's. Those that the same options of
     * backfill-events mend stand together.
     */
    const cases: { when: string; damage(day: string): Promise<unknown>; text: string; mend: string }[] = [
      {
        when: "a flipped byte in a part's middle",
        damage: flip((length) => length >> 1),
        text: "PART: expected sha256 \\w{64} \\(its manifest\\), found \\w{64}\\. Next: ",
        mend: FORCE,
      },
      {
        when: "a truncated part",
        damage: alter((part) => part.subarray(0, -9)),
        text: "PART: expected bytes \\d+ \\(its manifest\\), found \\d+\\. Next: ",
        mend: FORCE,
      },
      {
        when: "something after a part's end, with its size and hash corrected in the manifest",
        damage: replace((part) => Buffer.concat([part, Buffer.from("more")])),
        text: "PART: it does not decompress \\(.+\\)\\. Next: ",
        mend: FORCE,
      },
      {
        when: "a missing part",
        damage: async (day) => removeObjects(shop.bucket, [await partKey(day)]),
        text: "PART: it does not exist\\. Next: ",
        mend: FORCE,
      },
      {
        when: "other rows in a part, with all but its raw hash corrected in the manifest",
        damage: replace((part) => gzipSync(gunzipSync(part).toString().replace("purchase", "refunded"))),
        text: "PART: expected sha256_raw \\w{64} \\(its manifest\\), found \\w{64}\\. Next: ",
        mend: FORCE,
      },
      {
        when: "a manifest that says another id",
        damage: lie((manifest) => Object.assign(manifest, { max_id: "9999999" })),
        text: "its manifest says ids LEAST to 9999999; its rows have ids LEAST to MOST\\. Next: ",
        mend: FORCE,
      },
      {
        when: "a manifest that says fewer rows of a part",
        damage: lie(({ parts: [, part] }) => Object.assign(part as Part, { rows: 2 })),
        text: "PART: expected rows 2 \\(its manifest\\), found 3\\. Next: ",
        mend: FORCE,
      },
      {
        when: "a manifest without one of the parts",
        damage: lie(({ parts }) => parts.splice(1, 1)),
        text: "MANIFEST: it says 7 rows; its parts have 4\\. Next: ",
        mend: FORCE,
      },
      {
        when: "a row written later with an old created_at",
        damage: source("insert into public.events (created_at) values (NOON)"),
        text: "8 rows at the source, 7 in the archive: rows were written later with an old created_at\\. Next: ",
        mend: FORCE,
      },
      {
        when: "a value changed at the source",
        damage: source(`update public.events set payload = '{"changed": true}' where DAY and id % 7 = 3`),
        text: CHANGED,
        mend: FORCE,
      },
      {
        when: "a manifest that is missing",
        damage: (day) => removeObjects(shop.bucket, [manifestKey(day)]),
        text: "is not archived; the source has 7 rows of it\\. Next: ",
        mend: "",
      },
      {
        when: "some rows deleted at the source",
        damage: source("delete from public.events where DAY and created_at > NOON"),
        text: "4 rows at the source, 7 in the archive: rows were deleted at the source\\. If they are to go from the archive too: ",
        mend: " FORCE=1 ALLOW_SHRINK=1",
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
      const intact = await verify(shop, dayOf(0), end);
      assert.equal(intact.code, 0, intact.stderr);
      for (const [index, { damage }] of cases.entries()) await damage(dayOf(index));
      for (const day of [purged, lost]) await source("delete from public.events where DAY")(day);
      whole = await read(shop, await partKey(lost));
      await removeObjects(shop.bucket, [await partKey(lost)]);
      found = await verify(shop, dayOf(0), end);
    });
    after(() => shop?.[Symbol.asyncDispose]());

    test("the days that differ are counted, and the exit code is 1", () => {
      assert.equal(found.code, 1);
      const differ = cases.length + 1;
      assert.match(found.stderr, new RegExp(`step=days days=${cases.length + 2} rows=\\d+ bytes=\\d+ failed=${differ} `));
      assert.match(found.stderr, new RegExp(`^error: ${differ} of ${cases.length + 2} days failed:$`, "m"));
    });

    for (const [index, { when, text, mend }] of cases.entries()) {
      const day = dayOf(index);
      test(`${when} is named, with the command`, () => {
        const lines = found.stderr.split("\n").filter((line) => line.startsWith(`  ${day}: `));
        assert.equal(lines.length, 1, found.stderr);
        const values: Record<string, string> = {
          PART: `s3://archive/${folder(shop, day)}part-0002-\\w+\\.ndjson\\.gz`,
          MANIFEST: `s3://archive/${manifestKey(day)}`.replaceAll(".", "\\."),
          LEAST: String(1 + 7 * index),
          MOST: String(7 + 7 * index),
        };
        const expected = text.replaceAll(/PART|MANIFEST|LEAST|MOST/g, (name) => values[name] as string);
        assert.match(lines[0] ?? "", new RegExp(`^  ${day}: ${expected}make backfill-events FROM=${day} TO=${addDays(day)}${mend}$`));
      });
    }

    test("the command that is named mends it, each of these", async () => {
      for (const [mend, days] of Map.groupBy(cases.keys(), (index) => cases[index]?.mend ?? "")) {
        const options = Object.fromEntries(
          mend
            .split(" ")
            .slice(1)
            .map((pair) => pair.split("=")),
        );
        await backfill(shop, dayOf(days[0] ?? 0), addDays(dayOf(days.at(-1) ?? 0)), options);
      }
    });

    test("a day all of whose rows are gone from the source is a note", () => {
      assert.match(
        found.stderr,
        new RegExp(`step=note day=${purged} note="the source has none of its 7 rows any more: the archive is the copy"`),
      );
      assert.doesNotMatch(found.stderr, new RegExp(`^  ${purged}`, "m"));
    });

    test("a damaged day whose rows are gone from the source: restore the object", async () => {
      const key = await partKey(lost);
      const remedy = `The source has only 0 of its 7 rows: restore the object from the bucket's versions or a copy, then: make verify-events FROM=${lost} TO=${addDays(lost)}`;
      assert.match(found.stderr, new RegExp(`^  ${lost}: s3://archive/${key}: it does not exist\\. ${remedy}$`, "m"));
      await put(shop, key, whole);
    });

    test("after all of these, verify passes", async () => {
      const { code, stderr } = await verify(shop, dayOf(0), end);
      assert.equal(code, 0, stderr);
      assert.equal(stderr.match(/step=note /g)?.length, 2);
    });

    test("a manifest that is no manifest is named, and does not keep the other days from being verified", async () => {
      const text = await read(shop, manifestKey(dayOf(0)));
      await put(shop, manifestKey(dayOf(0)), text.subarray(0, 100));
      const { code, stderr } = await verify(shop, dayOf(0), dayOf(2));
      const forced = await shop.run(archiver, { FROM: dayOf(0), TO: dayOf(1), FORCE: "1" });
      await put(shop, manifestKey(dayOf(0)), text);
      assert.equal(code, 1);
      assert.match(stderr, new RegExp(`^  ${dayOf(0)}: .*${manifestKey(dayOf(0))}`, "m"));
      assert.match(stderr, / days=2 rows=\d+ bytes=\d+ failed=1 /);
      assert.match(`${forced.code} ${forced.stderr}`, new RegExp(`^0 |${manifestKey(dayOf(0))}`));
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
            new RegExp(`^  ${FROM}: s3://\\S+${manifestKey(FROM)} is not the manifest of ${FROM} .*versions or a copy`, "m"),
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

    test("a day that is archived again while it is restored: the new one is read", async () => {
      const held = hold();
      const [FROM, TO] = [dayOf(0), dayOf(1)];
      await using run = await startHeld(shop, restorer, { FROM, TO }, s3Steps.getPart, held);
      await backfill(shop, FROM, TO, { FORCE: "1", CHUNK_ROWS: "2" });
      held.release();
      const { code, stderr } = await ending(run);
      assert.equal(code, 0, stderr);
      assert.match(stderr, /step=done days=1 rows=7 bytes=\d+ failed=0 /);
      assert.equal(run.proxy.requests.filter((line) => s3Steps.getManifest.test(line)).length, 2);
      const [same] =
        await shop.admin`select count(*)::int as rows from etl.events_restored r join public.events e using (id) where r::text = e::text`;
      assert.equal(same?.rows, 7);
    });
  });
});
