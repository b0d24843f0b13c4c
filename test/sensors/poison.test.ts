// Messages that are no valid change: each is dead-lettered with what it was and why, and nothing stops for it; a mass of them does.
import assert from "node:assert/strict";
import { createHash } from "node:crypto";
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { suite, test } from "node:test";
import fc from "fast-check";
import type { Message } from "kafkajs";
import { statementsOf } from "../../scripts/ops/lib/migrations.ts";
import { insertRows, landingRows } from "../../shared/sensors/clickhouse.ts";
import { createProxy, stop } from "../lib/faults.ts";
import { type Consumer, createSensors, endsWith, type Sensors } from "../lib/sensors.ts";
import { until } from "../lib/shop.ts";
import { root } from "../stack/env.ts";

const soak = process.env.SOAK === "1";
const deadLettersScript = "scripts/ops/dead-letters.ts";
const replayScript = "scripts/ops/replay-dead-letters.ts";

// biome-ignore lint/suspicious/noExplicitAny: any JSON
type Json = any;
const row = (id: number, value: Json = 1.5): Json => {
  return { id, sensor_id: `S${id % 3}`, metric: "temp", value, recorded_at: "2024-01-01T00:00:00.000001Z" };
};
const envelope = (op: string, before: Json, after: Json): Json => ({ before, after, source: { ts_ms: Date.now() }, op });
const keyOf = (id: number): string => JSON.stringify({ id });
const message = (id: number, op: string, before: Json, after: Json): Message => {
  return { key: keyOf(id), value: JSON.stringify(envelope(op, before, after)) };
};
const created = (id: number, value?: Json): Message => message(id, "c", null, row(id, value));

const bytes = (of: Message["value"] | Message["key"]): Buffer => (Buffer.isBuffer(of) ? of : Buffer.from(of ?? ""));
const digest = (of: Message["value"]): string => createHash("sha256").update(bytes(of)).digest("hex").toUpperCase();

type DeadLetter = { partition: number; offset: string; reason: string; key: string | null; length: string; digest: string };

/** Dead letters with their values' digests: bytes that are no text would not come through JSON. */
const readDeadLetters = ({ shop }: Sensors): Promise<DeadLetter[]> =>
  shop.select(`SELECT partition, toString(offset) AS offset, reason, key, toString(length(value)) AS length, hex(SHA256(value)) AS digest
      FROM sensor_dead_letters FINAL ORDER BY epoch, partition, sensor_dead_letters.offset`);

const caughtUp = async (consumer: Consumer): Promise<boolean> => (await consumer.lag()) === 0;

const after = (change: Json): string => JSON.stringify(envelope("c", null, { ...row(1), ...change }));
const without = (column: string): string => {
  const { [column]: _, ...rest } = row(1);
  return JSON.stringify(envelope("c", null, rest));
};
const noChange = "no change: op is none of c, r, u, d";
const onlyKey = "before has only its key: is REPLICA IDENTITY FULL on the source table and each of its partitions?";
const text = (length: number): string => "x".repeat(length);

const noInteger = "after.id is no 64-bit integer";
const noTime = "after.recorded_at is no time that DateTime64 holds";
const otherKey = "the key is not the row's id";
const truncated = "TRUNCATE: the table has to be rebuilt from a fresh snapshot (make resnapshot)";
const json = JSON.stringify;

/** What comes: why it is dead-lettered, its value, and its key, if that is not id 1's. */
const poison: Record<string, [reason: string, value: string | Buffer, key?: string | null]> = {
  "an empty value": ["not JSON", ""],
  "an envelope and a half": ["not JSON", after({}) + after({}).slice(0, 9)],
  "a null byte": ["not JSON", after({ metric: "a b" }).replace("a b", "a\0b")],
  "a null byte after the envelope": ["not JSON", `${after({})}\0`],
  "bytes that are no UTF-8": ["not JSON", Buffer.from(after({ metric: "\u{fffd}" }).replace("\u{fffd}", "\xff\xfe"), "latin1")],
  "100,000 brackets": ["not JSON", "[".repeat(100_000) + "]".repeat(100_000)],
  "5 MB of no JSON": ["not JSON", text(5_000_000)],
  "5 MB of JSON": [noChange, json({ text: text(5_000_000) })],
  "JSON null": [noChange, "null"],
  "a row without an envelope": [noChange, json(row(1))],
  "an op that is no text": [noChange, after({}).replace('"op":"c"', '"op":{"c":1}')],
  "an op that nobody knows": [noChange, json(envelope("m", null, row(1)))],
  "an insert without a row": ["after is no object", json(envelope("c", row(1), null))],
  "a row that is an array": ["after is no object", json(envelope("c", null, [row(1)]))],
  "a delete without the old row": ["before is no object", json(envelope("d", null, null))],
  "an update without the old row": ["before is no object", json(envelope("u", null, row(1)))],
  "a delete whose old row is only a key": [
    onlyKey,
    json(envelope("d", { ...row(1), sensor_id: null, metric: null, value: null, note: null }, null)),
  ],
  "a change of the sorting key whose old row is only a key": [
    onlyKey,
    json(envelope("u", { ...row(900), sensor_id: null, metric: null, value: null }, row(900))),
    keyOf(900),
  ],
  "an id that is text": [noInteger, after({ id: "1" })],
  "an id that is a fraction": [noInteger, after({ id: 1.5 })],
  "an id beyond 64 bits": [noInteger, after({}).replace('"id":1', '"id":9223372036854775808')],
  "no id": [noInteger, without("id")],
  "a sensor_id that is a number": ["after.sensor_id is neither text nor null", after({ sensor_id: 5 })],
  "no metric": ["after.metric is neither text nor null", without("metric")],
  "a value that is text": ["after.value is neither a number nor null", after({ value: "12" })],
  "a time that is a word": [noTime, after({ recorded_at: "now" })],
  "30 February": [noTime, after({ recorded_at: "2024-02-30T00:00:00Z" })],
  "a time that is a number": ["after.recorded_at is no text", after({ recorded_at: 10 })],
  "a large value that Debezium does not know": [
    "after lacks a large value: the source table needs REPLICA IDENTITY FULL",
    after({ sensor_id: "__debezium_unavailable_value" }),
  ],
  "no key": ["no key", after({}), null],
  "an empty key": [otherKey, after({}), ""],
  "another row's key": [otherKey, after({}), keyOf(2)],
  "a key of 1 MB": [otherKey, after({}), text(1_000_000)],
  "an update that changes the id": ["an update that changes the id", json(envelope("u", row(2), row(1)))],
  "a TRUNCATE": [truncated, json(envelope("t", null, null)), null],
};

suite("poison", { concurrency: true }, () => {
  test("each kind of poison is dead-lettered with its reason, place, key and bytes; what is around it arrives", async () => {
    await using sensors = await createSensors({ bigquery: false, connector: false });
    const consumer = await sensors.consumer();
    const kinds = Object.values(poison);
    // Fewer than the hundred messages of which a share may be too much.
    assert.ok(kinds.length * 2 < 100);
    const sent = kinds.map(([reason, value, key = keyOf(1)], index) => {
      const [partition, offset] = [index % 3, String(Math.floor(index / 3) * 2)];
      return { partition, offset, reason, key, length: String(bytes(value).length), digest: digest(value) };
    });
    for (const [index, [, value, key = keyOf(1)]] of kinds.entries())
      await sensors.produce([
        { key, value, partition: index % 3 },
        { ...created(1000 + index), partition: index % 3 },
      ]);
    await until("all are there", () => caughtUp(consumer));
    assert.deepEqual(
      await readDeadLetters(sensors),
      sent.toSorted((a, b) => a.partition - b.partition || Number(a.offset) - Number(b.offset)),
    );
    const ids = (await sensors.readings()).map(({ id }) => Number(id));
    assert.deepEqual(ids, [900, ...kinds.map((_, index) => 1000 + index)]); // of 900 the old row alone is unknown
    const metrics = await consumer.metrics();
    assert.equal(metrics.etl_sensors_dead_letters_total, kinds.length);
    assert.equal(metrics.etl_sensors_rows_total, kinds.length);
    await stop(consumer);
  });

  test("a mass of poison ends the consumer, without a commit: the share of the last 1,000 messages that is allowed is not exceeded", async () => {
    await using sensors = await createSensors({ bigquery: false, connector: false, partitions: 1 });
    const { shop } = sensors;
    const bad = (count: number): Message[] => Array.from({ length: count }, (_, index) => ({ key: keyOf(index), value: `bad ${index}` }));
    const good = (first: number, count: number): Message[] => Array.from({ length: count }, (_, index) => created(first + index));
    const consumer = await sensors.consumer();
    // A tenth of them, which is what SENSORS_POISON_SHARE allows unless told otherwise.
    await sensors.produce([...good(1, 900), ...bad(100)]);
    await until("they are committed", async () => (await sensors.committed()) === 1000);
    await sensors.produce([...good(1001, 880), ...bad(120)]);
    const says =
      /error: 120 of the last 1,000 messages are not valid changes \(limit: SENSORS_POISON_SHARE=0\.1\)\. The last batch was not committed; the next start reads it again\. Next: make dead-letters \(says why\)$/m;
    await endsWith(consumer, 1, [says]);
    assert.equal(await sensors.committed(), 1000);
    const letters = await sensors.deadLetters();
    assert.equal(letters.length, 220);

    // Nothing has changed, so it stops again; each dead letter is there once.
    const again = shop.start("scripts/sensors.ts", { UNTIL: "caught-up" });
    await endsWith(again, 1, [/error: 120 of the last 1,000 messages are not valid changes/]);
    assert.equal(await sensors.committed(), 1000);
    assert.equal((await sensors.deadLetters()).length, 220);

    // Told to, it does.
    await sensors.catchUp({ SENSORS_POISON_SHARE: "0.12" });
    assert.equal(await sensors.committed(), 2000);
    assert.deepEqual(await sensors.deadLetters(), letters);
    assert.equal((await sensors.readings()).length, 1780);
  });

  test("bad messages of a quiet hour do not end the consumer, though they are all that came", async () => {
    await using sensors = await createSensors({ bigquery: false, connector: false });
    const consumer = await sensors.consumer();
    const bad = (id: number): Message => ({ key: keyOf(id), value: "bad", partition: id % 3 });
    await sensors.produce([bad(1)]);
    await until("it is committed", async () => (await sensors.committed()) === 1);
    await sensors.produce(Array.from({ length: 98 }, (_, index) => bad(index)));
    await until("all are there", () => caughtUp(consumer));
    assert.equal((await consumer.metrics()).etl_sensors_dead_letters_total, 99);
    assert.equal((await fetch(`${await consumer.url}/healthz`)).status, 200);
    // The hundredth.
    await sensors.produce([bad(3)]);
    await endsWith(consumer, 1, [/error: 100 of the last 100 messages are not valid changes/]);
  });

  test("dead letters are listed with where, when, why and how they begin; those of an older epoch are not replayed", async () => {
    await using sensors = await createSensors({ bigquery: false, connector: false, partitions: 1 });
    const { shop, topic } = sensors;
    const none = await shop.succeed(deadLettersScript);
    assert.equal(none.stdout, `no dead letters of ${topic}\n`);
    await sensors.produce([
      created(1),
      { key: keyOf(2), value: `tab\there\n${text(100)}` },
      { key: null, value: after({}) },
      { key: keyOf(4), value: Buffer.from([0, 0xff, 0xfe, 0x41]) },
      { key: keyOf(5), value: "not JSON" },
    ]);
    await sensors.catchUp();
    const { stdout } = await shop.succeed(deadLettersScript);
    const at = String.raw`\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3}`;
    for (const line of [
      /^EPOCH +PARTITION +OFFSET +PARKED_AT +REASON +KEY +BYTES +BEGINS$/m,
      new RegExp(String.raw`^1 +0 +1 +${at} +not JSON +\{"id":2\} +109 +tab\?here\?x{51}$`, "m"),
      new RegExp(String.raw`^1 +0 +2 +${at} +no key +NULL +${after({}).length} +\{"before":null,"after":\{"id":1,.*$`, "m"),
      new RegExp(String.raw`^1 +0 +3 +${at} +not JSON +\{"id":4\} +4 +\?�+A$`, "m"),
      new RegExp(`^not JSON +1 +3 +${at} +${at}$`, "m"),
      new RegExp(`^no key +1 +1 +${at} +${at}$`, "m"),
      /^Next: fix the source, or the views by a new file in schemas\/clickhouse \(make migrate\), then: make replay-dead-letters$/m,
    ])
      assert.match(stdout, line);
    const two = JSON.parse((await shop.succeed(deadLettersScript, { JSON: "1", LIMIT: "1" })).stdout);
    const [{ parked_at: _, ...letter }, ...more] = two.letters;
    const place = { epoch: 1, partition: 0, offset: 1 };
    assert.deepEqual(letter, { ...place, reason: "not JSON", key: keyOf(2), bytes: 109, begins: `tab?here?${text(51)}` });
    assert.deepEqual(more, []);
    const counted = two.reasons.map(({ reason, messages }: Record<string, unknown>) => `${messages} ${reason}`);
    assert.deepEqual(counted, ["3 not JSON", "1 no key"]);

    // One of an older epoch is listed, and not replayed: the view now takes both for changes.
    await shop.admin`update etl.topics set epoch = 2 where topic = ${topic}`;
    await sensors.produce([{ key: keyOf(6), value: "new" }]);
    await sensors.catchUp();
    await replaceReason(sensors, "value IN ('not JSON', 'new'), '',");
    const { stderr } = await shop.succeed(replayScript);
    assert.match(stderr, /step=replayed epoch=2 dead_letters=1 left=0$/m);
    const left = await shop.succeed(deadLettersScript);
    assert.match(left.stdout, /^1 +0 +4 .* not JSON$/m);
    assert.doesNotMatch(left.stdout, / new$/m);
  });

  test("a replay re-ingests what is a change by now, none of which wins over newer data, and reports the rest; one that comes meanwhile stays", async () => {
    await using sensors = await createSensors({ bigquery: false, connector: false, partitions: 1 });
    const { shop } = sensors;
    const consumer = await sensors.consumer();
    await refuseThirteen(sensors);
    await sensors.produce([
      created(1, 13),
      created(2, 13),
      created(3, 13),
      created(4, 13),
      message(4, "u", row(4, 13), { ...row(4, 13), sensor_id: "moved" }),
      { key: keyOf(9), value: "not JSON" },
      // Newer than those above.
      message(2, "u", row(2, 12), row(2, 14)),
      message(3, "d", row(3, 14), null),
    ]);
    await until("all are there", () => caughtUp(consumer));
    const letters = async (): Promise<string[]> => (await sensors.deadLetters()).map(({ offset, reason }) => `${offset} ${reason}`);
    assert.deepEqual(await letters(), [...[0, 1, 2, 3, 4].map((offset) => `${offset} no 13 here`), "5 not JSON"]);
    const values = async (): Promise<Json> => (await sensors.readings()).map(({ id, sensor_id, value }) => `${id} ${sensor_id} ${value}`);
    assert.deepEqual(await values(), ["2 S2 14"]);

    // As long as they are no changes, all of them stay, with their reasons.
    const early = await shop.succeed(replayScript);
    assert.match(early.stderr, /step=replayed epoch=1 dead_letters=6 left=6 next="make dead-letters"$/m);
    assert.equal((await sensors.deadLetters()).length, 6);

    // The views as schemas/clickhouse has them: without the record every file is applied again, and loses nothing.
    await shop.clickhouse.command({ query: "DROP TABLE etl_migrations SYNC" });
    const { stderr } = await shop.succeed("scripts/ops/migrate.ts");
    assert.match(stderr, /step=apply what=schemas\/clickhouse\/005_sensor_changes_view\.sql$/m);
    assert.equal((await sensors.deadLetters()).length, 6);
    // The consumer writes another one just before the replay deletes those that are changes now.
    await using proxy = await createProxy(shop.env.CLICKHOUSE_URL);
    proxy.fault(/./, async ({ request, send, reply }) => {
      const body = await Array.fromAsync(request).then((parts) => Buffer.concat(parts));
      if (/^\s*DELETE/.test(body.toString())) {
        await sensors.produce([{ key: keyOf(10), value: "not JSON, and new" }]);
        await until("it is a dead letter", () => caughtUp(consumer));
      }
      await reply(await send(body));
    });
    const replay = await shop.succeed(replayScript, { CLICKHOUSE_URL: proxy.url });
    assert.match(replay.stderr, /step=replayed epoch=1 dead_letters=6 left=2 next="make dead-letters"$/m);
    assert.deepEqual(await letters(), ["5 not JSON", "8 not JSON"]);
    // 2 is not set back, 3 not brought back, 4 not there under both of its keys.
    assert.deepEqual(await values(), ["1 S1 13", "2 S2 14", "4 moved 13"]);

    await stop(consumer);
  });

  test("fuzzed envelopes never make an insert fail: each becomes its row or a dead letter", async () => {
    await using sensors = await createSensors({ bigquery: false, connector: false, partitions: 1 });
    const { clickhouse } = sensors.shop;
    let next = 1;
    await fc.assert(
      fc.asyncProperty(fc.array(mutation, { minLength: 1, maxLength: 300 }), async (mutations) => {
        const first = next;
        next += mutations.length;
        const sent = mutations.map((one, index) => render(one, first + index));
        const rows = landingRows({ topic: sensors.topic, epoch: 1, partition: 0 }, sent);
        if (rows.length) await insertRows(clickhouse, "sensor_landing FORMAT RowBinary", [rows]);
        await assertAccounted(sensors, sent);
      }),
      { numRuns: soak ? 500 : 15 },
    );
  });
});

/** Puts another first case into the view that decides what is no valid change. */
async function replaceReason({ shop }: Sensors, first: string): Promise<void> {
  const file = readFileSync(join(root, "schemas/clickhouse/005_sensor_changes_view.sql"), "utf8");
  const view = statementsOf(file).at(-1) ?? "";
  const query = view.replace("NOT isValidJSON(value), 'not JSON',", first);
  assert.notEqual(query, view);
  await shop.clickhouse.command({ query });
}

/** What a stricter view would be: one for which a row whose value is 13 is no valid change. */
const refuseThirteen = (sensors: Sensors): Promise<void> =>
  replaceReason(sensors, "NOT isValidJSON(value), 'not JSON', JSONExtractInt(value, 'after', 'value') = 13, 'no 13 here',");

const anything = fc.oneof(
  fc.constant(undefined), // which JSON leaves out
  fc.jsonValue({ maxDepth: 3 }),
  fc.constantFrom(null, 0, -0, 1, -1, 1.5, 1e308, 2 ** 63, 2 ** 64, "", "c", "null", "NaN", "Infinity", "-Infinity", "1e5"),
  fc.constantFrom("2024-02-29T23:59:59.999999Z", "2023-02-29T00:00:00Z", "0001-01-01T00:00:00Z", "2024-01-01", "infinity"),
  fc.constantFrom("\u0000", "a\u0000b", "\ud800", "é😀", "'", "\\", "\\u0000", "__debezium_unavailable_value", {}, [], [[]]),
  fc.string({ unit: "binary" }),
  fc.double(),
  fc.bigInt({ min: -(2n ** 65n), max: 2n ** 65n }).map(Number),
);
/** Mostly what is valid there. */
const some = (valid: fc.Arbitrary<Json>): fc.Arbitrary<Json> => fc.oneof({ arbitrary: valid, weight: 15 }, anything);
const own = "its own id"; // of the message
const aRow = fc.record({
  id: some(fc.constant(own)),
  sensor_id: some(fc.constantFrom("S", "moved")),
  metric: some(fc.constant("temp")),
  value: some(fc.constantFrom(1, 2)),
  recorded_at: some(fc.constant("2024-01-01T00:00:00.000001Z")),
});
const someRow = some(
  fc.tuple(aRow, fc.dictionary(fc.string(), anything, { maxKeys: 1 })).map(([known, other]) => ({ ...known, ...other })),
);
const nothing = some(fc.constant(null));
const anEnvelope = fc.constantFrom("c", "r", "u", "d").chain((op) => {
  const [before, after] = ["ud".includes(op) ? someRow : nothing, op === "d" ? nothing : someRow];
  return fc.record({ before, after, source: some(fc.constant({ ts_ms: 1 })), op: some(fc.constant(op)) });
});
/** A message; perhaps a tombstone, or its text is cut somewhere, or has another byte there. */
const mutation = fc.record({
  value: anEnvelope,
  key: some(fc.constant({ id: own })),
  tombstone: fc.nat(20).map((n) => n === 0),
  cut: fc.oneof(
    { arbitrary: fc.constant(undefined), weight: 6 },
    fc.record({ at: fc.double({ min: 0, max: 1, noNaN: true }), byte: fc.nat(511) }), // one over 255: it ends there
  ),
});
type Mutation = typeof mutation extends fc.Arbitrary<infer M> ? M : never;
type Sent = { offset: string; key: Buffer | null; value: Buffer | null };

function render({ value, key, tombstone, cut }: Mutation, id: number): Sent {
  const write = (of: Json): Buffer => Buffer.from(JSON.stringify(of).replaceAll(JSON.stringify(own), String(id)));
  let text = write(value);
  if (cut) {
    const at = Math.floor(cut.at * text.length);
    if (cut.byte > 255 || at === text.length) text = text.subarray(0, at);
    else text[at] = cut.byte;
  }
  return { offset: String(id), key: key === undefined ? null : write(key), value: tombstone ? null : text };
}

/** Of messages whose offsets are their own ids: each that is no tombstone is a dead letter or the row that its JSON says, and not both. */
async function assertAccounted({ shop }: Sensors, messages: Sent[]): Promise<void> {
  const between = `BETWEEN ${messages[0]?.offset} AND ${messages.at(-1)?.offset}`;
  const found = await shop.select<{ at: string }>(`SELECT toString(offset) AS at FROM sensor_dead_letters WHERE offset ${between}`);
  const letters = new Set(found.map(({ at }) => at));
  const rows = Map.groupBy(
    await shop.select<Record<"at" | "id" | "sensor_id" | "metric" | "value" | "recorded_at" | "_deleted", Json>>(`
      SELECT toString(bitAnd(_version, 0xffffffffffff)) AS at, toString(id) AS id, sensor_id, metric, toString(value) AS value,
        toString(recorded_at) AS recorded_at, _deleted
      FROM sensor_readings WHERE bitAnd(_version, 0xffffffffffff) ${between}`),
    ({ at }) => at,
  );
  const number = (of: Json): string | null => (of === null ? null : String(Number(String(of).replace(/inf$/, "Infinity"))));
  const time = (_: string, at: string, digits: string): string => `${at.replace("T", " ")}.${digits.padEnd(6, "0")}`;
  for (const { offset, key, value } of messages) {
    const what = `${key} ${value?.toString().slice(0, 500)}`;
    const [letter, own] = [letters.has(offset), rows.get(offset)];
    // A row that moves to a time that cannot be held is dead-lettered, and gone.
    const moved = letter && own && JSON.parse(String(value));
    if (moved) assert.deepEqual([moved.op, typeof moved.after.recorded_at, own.map((row) => row._deleted)], ["u", "string", [1]], what);
    else assert.equal(Number(letter) + Number(own !== undefined), value === null ? 0 : 1, what);
    if (letter || !own) continue;
    const { op, before, after } = JSON.parse(String(value));
    const said = op === "d" ? before : after;
    const is = own.find(({ _deleted }) => _deleted === Number(op === "d"));
    const { sensor_id, metric } = said;
    const recorded_at = said.recorded_at.replace(/^(.{19})\.?(\d*)Z$/, time);
    const expected = { at: offset, id: offset, sensor_id, metric, value: number(said.value), recorded_at, _deleted: Number(op === "d") };
    assert.deepEqual({ ...is, value: number(is?.value) }, expected, what);
  }
}
