/**
 * Faults between a run and S3: createProxy of faults.ts for requests that are signed.
 *
 *   await using proxy = await createS3Proxy(shop.env.S3_ENDPOINT);
 *   const gate = hold();
 *   proxy.fault(s3Steps.putManifest, gate);
 *   const run = shop.start("scripts/ops/backfill-events.ts", { FROM, TO, S3_ENDPOINT: proxy.url });
 *   await gate.reached;
 */
import assert from "node:assert/strict";
import { createHash } from "node:crypto";
import { once } from "node:events";
import { buffer } from "node:stream/consumers";
import { after, before, suite } from "node:test";
import { setTimeout } from "node:timers/promises";
import { gunzipSync } from "node:zlib";
import { addDays, type Manifest, readManifest } from "../../shared/events/archive.ts";
import { type Bucket, get, listObjects } from "../../shared/events/s3.ts";
import type { Env } from "../stack/env.ts";
import { createProxy, type Fault, type Gate, type HttpProxy, lastRun, reach } from "./faults.ts";
import { createShop, type Process, type Shop } from "./shop.ts";

/** The requests of a run, as `METHOD path?query`, decoded. A part is one putPart. */
export const s3Steps = {
  list: /^GET .+[?&]list-type=2/,
  getManifest: /^GET .+\/manifest\.json\?/,
  putManifest: /^PUT .+\/manifest\.json\?/,
  getPart: /^GET .+\.ndjson\.gz\?/,
  putPart: /^PUT .+\.ndjson\.gz\?x-id=PutObject/,
  deleteObjects: /^POST .+\?delete/,
  anything: /./,
};

/** A step, of one day (YYYY-MM-DD) only. Not for deleteObjects and list, whose path has no day. */
export const ofDay = (day: string, step: RegExp = s3Steps.anything): RegExp =>
  new RegExp(`^(?=.*/dt=${day}/)${step.source.replace(/^\^/, "")}`);

/** S3 refuses, in its form of an error, for example 403 AccessDenied or 503 SlowDown; nothing reaches the server. */
export function refuse(status: number, code: string): Fault {
  return async ({ request, response }) => {
    await buffer(request);
    const xml = `<?xml version="1.0" encoding="UTF-8"?><Error><Code>${code}</Code><Message>answered ${status} by the test</Message></Error>`;
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

export interface HeldRun extends Process, AsyncDisposable {
  proxy: HttpProxy;
  id: string;
}

/** Starts a script with a fault that waits for its first request of a step, and returns when the run is there. */
export async function startHeld(shop: Shop, script: string, variables: Env, step: RegExp, gate: Gate): Promise<HeldRun> {
  const proxy = await createS3Proxy(shop.env.S3_ENDPOINT);
  proxy.fault(step, gate, 1);
  const run = shop.start(script, { ...variables, S3_ENDPOINT: proxy.url });
  await reach(run, gate.reached);
  const { run_id: id } = await lastRun(shop);
  return { ...run, proxy, id, [Symbol.asyncDispose]: proxy[Symbol.asyncDispose] };
}

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

/** A suite with a shop, and a day of its own for each test, of so many rows: 150 are three parts of 60. */
export function suiteOfDays(
  name: string,
  first: string,
  tests: (shop: () => Shop, nextDay: (rows?: number) => Promise<string>) => void,
): void {
  suite(name, { concurrency: 1 }, () => {
    let shop: Shop | undefined;
    let day = first;
    before(async () => {
      shop = await createShop({ bigquery: false });
    });
    after(() => shop?.[Symbol.asyncDispose]());
    const there = (): Shop => shop ?? assert.fail("no shop");
    tests(there, async (rows = 150) => {
      day = addDays(day, 5);
      await there().insertEvents(day, rows);
      return day;
    });
  });
}

/** The day is archived, and there is nothing else of it in the bucket. */
export async function assertArchivedClean(shop: Shop, day: string): Promise<ArchivedDay> {
  const there = await assertArchived(shop, day);
  assert.deepEqual(await strays(shop, day), []);
  return there;
}
