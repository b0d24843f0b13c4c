/**
 * Faults between a run and S3: createProxy of faults.ts for requests that are signed.
 *
 *   archiveSuite("killed", {}, (test) => test("before its manifest is put", async ({ startHeld }) => {
 *     const run = await startHeld(s3Steps.putManifest, hold());
 */
import assert from "node:assert/strict";
import { createHash } from "node:crypto";
import { once } from "node:events";
import { buffer } from "node:stream/consumers";
import { after, before, suite, test } from "node:test";
import { setTimeout } from "node:timers/promises";
import { gunzipSync } from "node:zlib";
import { addDays, type Manifest, readManifest } from "../../shared/events/archive.ts";
import { type Bucket, get, listObjects } from "../../shared/events/s3.ts";
import type { Env } from "../stack/env.ts";
import { assertNoSessions, createProxy, ending, type Fault, type Gate, type HttpProxy, lastRun, reach } from "./faults.ts";
import { createShop, type Process, type Result, type Shop, type ShopOptions } from "./shop.ts";

/** The requests of a run, as `METHOD path?query`, decoded. A part is one putPart. */
export const s3Steps = {
  list: /^GET .+[?&]list-type=2/,
  getManifest: /^GET .+\/manifest\.json\?/,
  putManifest: /^PUT .+\/manifest\.json\?/,
  getPart: /^GET .+\.ndjson\.gz\?/,
  putPart: /^PUT .+\.ndjson\.gz\?x-id=PutObject/,
  deleteObjects: /^DELETE .+\?x-id=DeleteObject/,
  anything: /./,
};

/** A step, of one day (YYYY-MM-DD) only. Not for list, whose path has no day. */
export const ofDay = (day: string, step: RegExp = s3Steps.anything): RegExp =>
  new RegExp(`^(?=.*/dt=${day}/)${step.source.replace(/^\^/, "")}`);

/** S3 refuses, in its form of an error, for example 403 AccessDenied or 503 SlowDown; nothing reaches the server. */
export function refuse(status: number, code: string): Fault {
  return async ({ request, response }) => {
    await buffer(request);
    const xml = `<?xml version="1.0"?><Error><Code>${code}</Code><Message>answered ${status} by the test</Message></Error>`;
    response.writeHead(status, { "content-type": "application/xml" }).end(xml);
  };
}

/** The answer's body ends after some bytes: the connection is reset, or stays open and silent. */
export function breakBody(how: "reset" | "stall"): Fault {
  return async ({ response, send }) => {
    const answer = await send();
    const body = await buffer(answer);
    response.writeHead(answer.statusCode ?? 0, answer.headers).write(body.subarray(0, body.length / 2));
    await (how === "reset" ? setTimeout(100) : once(response, "close"));
    response.socket?.resetAndDestroy();
  };
}

/** An HTTP server in front of the S3 server at `target` that passes everything on until told otherwise. */
export const createS3Proxy = (target?: string): Promise<HttpProxy> => createProxy(target, { signed: true });

/** An object's bytes. */
export async function readObject(bucket: Bucket, key: string): Promise<Buffer> {
  return (await get(bucket, key))?.body ?? assert.fail(`no object ${key}`);
}

export interface ArchivedDay {
  manifest: Manifest;
  etag: string;
  /** The rows of its parts, in their order; ids as text, since they may be beyond 2^53. */
  rows: { id: string; created_at: string }[];
}

/**
 * A day as a reader gets it, who goes by the manifest, which may be replaced meanwhile, and its parts deleted then: reads the
 * new one. Checks rows, bytes and hashes. Undefined where there is no manifest.
 */
export async function readArchived({ bucket }: Shop, day: string): Promise<ArchivedDay | undefined> {
  for (let seen = ""; ; ) {
    const found = await readManifest(bucket, day);
    if (!found) return undefined;
    const { manifest, etag } = found;
    try {
      const rows: ArchivedDay["rows"] = [];
      for (const part of manifest.parts) {
        const packed = await readObject(bucket, part.key);
        const raw = gunzipSync(packed);
        const lines = raw.toString().split("\n").slice(0, -1);
        const [sha256, sha256_raw] = [packed, raw].map((bytes) => createHash("sha256").update(bytes).digest("hex"));
        assert.deepEqual({ key: part.key, rows: lines.length, bytes: packed.length, sha256, sha256_raw }, part);
        rows.push(...lines.map((line) => JSON.parse(line.replace(/^\{"id":(-?\d+)/, '{"id":"$1"'))));
      }
      return { manifest, etag, rows };
    } catch (error) {
      assert.match((error as Error).message, /^no object /, `${day}: ${(error as Error).stack}`);
      assert.notEqual(etag, seen, `${day}: a part that its manifest names is not there: ${(error as Error).message}`);
      seen = etag;
    }
  }
}

/** The rows of [from, to) at the source, in the form and the order of the archive. */
export async function sourceEvents({ admin }: Shop, from: string, to: string): Promise<ArchivedDay["rows"]> {
  return await admin.begin(async (sql) => {
    await sql`set local timezone = 'UTC'`;
    const rows = await sql<{ row: ArchivedDay["rows"][0] }[]>`
      select jsonb_strip_nulls(to_jsonb(e)) || jsonb_build_object('id', id::text) as row from public.events e
      where created_at >= ${`${from}Z`}::text::timestamptz and created_at < ${`${to}Z`}::text::timestamptz order by created_at, id`;
    return rows.map(({ row }) => row);
  });
}

/** The day has a manifest, whose parts hold the source's rows, each once. */
export async function assertArchived(shop: Shop, day: string): Promise<ArchivedDay> {
  const there = await readArchived(shop, day);
  assert.ok(there, `${day} has no manifest`);
  const { manifest, rows } = there;
  assert.deepEqual(rows, await sourceEvents(shop, day, addDays(day)), `${day}: its rows`);
  const ids = rows.map(({ id }) => BigInt(id)).sort((a, b) => (a < b ? -1 : 1));
  assert.deepEqual(
    [manifest.day, manifest.rows, manifest.min_id, manifest.max_id],
    [day, rows.length, ids.at(0)?.toString() ?? null, ids.at(-1)?.toString() ?? null],
  );
  return there;
}

/** The keys below events/, of one day or of all, without the shop's prefix. */
export async function objectKeys({ bucket }: Pick<Shop, "bucket">, day?: string): Promise<string[]> {
  const objects = await Array.fromAsync(listObjects(bucket, `${bucket.prefix}events/${day ? `dt=${day}/` : ""}`));
  return objects.map(({ key }) => key.slice(bucket.prefix.length));
}

/** The keys that no manifest names, of one day or of all, without the shop's prefix. */
export async function strays(shop: Shop, day?: string): Promise<string[]> {
  const { bucket } = shop;
  const keys = await objectKeys(shop, day);
  const days = [...new Set(keys.map((key) => key.split("/")[1]?.slice(3) ?? ""))];
  const manifests = await Promise.all(days.map((each) => readManifest(bucket, each)));
  const named = manifests.flatMap((found) => found?.manifest.parts.map(({ key }) => key.slice(bucket.prefix.length)) ?? []);
  return keys.filter((key) => !key.endsWith("/manifest.json") && !named.includes(key));
}

/** The day is archived, and there is nothing else of it in the bucket. */
export async function assertArchivedClean(shop: Shop, day: string): Promise<ArchivedDay> {
  const there = await assertArchived(shop, day);
  assert.deepEqual(await strays(shop, day), []);
  return there;
}

export type EventRow = Record<"id" | "user_id" | "type" | "payload" | "created_at", string | null>;

/** Inserts events from text. */
export async function insertRows({ admin }: Shop, rows: Partial<EventRow>[]): Promise<void> {
  await admin`
    insert into public.events (id, user_id, type, payload, created_at) overriding system value
    select id::bigint, user_id::bigint, type, payload::jsonb, created_at::timestamptz
    from jsonb_to_recordset(${JSON.stringify(rows)}::text::jsonb) r (id text, user_id text, type text, payload text, created_at text)`;
}

/** Adds rows to a day: so many of 100 KB. They have one random text, which is longer than what gzip looks back. */
export async function insertWide({ admin }: Shop, day: string, count: number): Promise<void> {
  await admin`
    insert into public.events (type, payload, created_at)
    select 'wide', jsonb_build_object('text', (
        select encode(string_agg(uuid_send(gen_random_uuid()), ''), 'base64') from generate_series(1, 4700))),
      ${`${day} 12:00Z`}::text::timestamptz from generate_series(1, ${count}::int)`;
}

/** What a test of a suite begins with. */
export interface Case {
  shop: Shop;
  /** In front of the shop's S3. */
  proxy: HttpProxy;
  /** Of seven rows: in parts of three, three parts. The nine days after it have none yet. */
  day: string;
  /** Starts a backfill of so many days from `day` on, by way of the proxy. */
  start(variables?: Env, days?: number): Process;
  /** The same with a fault that waits, once: returns when the run is there. */
  startHeld(step: RegExp, gate: Gate, variables?: Env, days?: number): Promise<Process & { id: string }>;
  /** The same to its end. */
  run(variables?: Env, days?: number): Promise<Result>;
  /** Archives them with nothing in the way; what each of these days then has is what the source has, and nothing lies beside it. */
  heal(variables?: Env, days?: number): Promise<Result>;
}

export const backfill = "scripts/ops/backfill-events.ts";

/** Tests that share a shop, one after the other. */
export function archiveSuite(
  name: string,
  options: ShopOptions,
  tests: (test: (name: string, body: (one: Case) => Promise<void>) => void) => void,
): void {
  suite(name, { concurrency: 1 }, () => {
    let shop: Shop;
    let day = "2016-12-22";
    before(async () => {
      shop = await createShop({ bigquery: false, ...options });
    });
    after(() => shop?.[Symbol.asyncDispose]());
    const body = async (of: (one: Case) => Promise<void>): Promise<void> => {
      day = addDays(day, 10);
      await shop.insertEvents(day, 7);
      await using proxy = await createS3Proxy(shop.env.S3_ENDPOINT);
      const window = (days: number): Env => ({ FROM: day, TO: addDays(day, days), CHUNK_ROWS: "3" });
      const start: Case["start"] = (variables = {}, days = 1) =>
        shop.start(backfill, { ...window(days), S3_ENDPOINT: proxy.url, ...variables });
      const startHeld: Case["startHeld"] = async (step, gate, variables, days) => {
        proxy.fault(step, gate, 1);
        const run = start(variables, days);
        await reach(run, gate.reached);
        return { ...run, id: (await lastRun(shop)).run_id };
      };
      const heal: Case["heal"] = async (variables = {}, days = 1) => {
        const result = await shop.succeed(backfill, { ...window(days), ...variables });
        for (let index = 0; index < days; index++) await assertArchivedClean(shop, addDays(day, index));
        return result;
      };
      await of({ shop, proxy, day, start, startHeld, run: (...given) => ending(start(...given)), heal });
      await assertNoSessions(shop);
    };
    tests((title, of) => test(title, () => body(of)));
  });
}
