/**
 * Faults between a run and its servers: the one HTTP proxy, which refuses, cuts, holds or shortens single requests (link.ts is for what
 * is no HTTP). Behind it is the real server; what passes is its own answer.
 *
 *   await using proxy = await createProxy(shop.env.BIGQUERY_ENDPOINT);
 *   const merge = hold();
 *   proxy.fault(steps.merge, merge);
 *   const run = shop.start(shop.script, { BIGQUERY_ENDPOINT: proxy.url });
 *   await merge.reached;
 */
import assert from "node:assert/strict";
import { once } from "node:events";
import { Agent, createServer, type IncomingMessage, request as open, type ServerResponse } from "node:http";
import type { AddressInfo } from "node:net";
import { buffer } from "node:stream/consumers";
import { pipeline } from "node:stream/promises";
import { after, test } from "node:test";
import type { Env } from "../stack/env.ts";
import { createShop, type Process, type Result, type Shop, type ShopOptions, until } from "./shop.ts";

/** The requests of a run in their order, as `METHOD path` without the query string. Its one query job is the MERGE. */
export const steps = {
  tableGet: /^GET .+\/tables\/[^/]+$/,
  createStaging: /^POST .+\/tables$/,
  upload: /^POST \/upload\//,
  loadState: /^GET .+\/jobs\/\w+_load$/,
  merge: /^POST \/bigquery\/.+\/jobs$/,
  mergeState: /^GET .+\/jobs\/\w+_merge$/,
  cancel: /^POST .+\/cancel$/,
  dropStaging: /^DELETE .+\/tables\//,
  push: /^POST \/metrics\//,
  anything: /./,
};

interface Exchange {
  request: IncomingMessage;
  response: ServerResponse;
  /** Forwards the request, as it comes or with another body, and returns the server's answer. */
  send(body?: Buffer): Promise<IncomingMessage>;
  /** Gives the client an answer of the server. */
  reply(answer: IncomingMessage): Promise<void>;
}

/** What happens to a request. */
export type Fault = (exchange: Exchange) => Promise<void>;

/** A fault that waits. */
export interface Gate extends Fault {
  /** Resolves when the first request has come as far as the gate. */
  reached: Promise<void>;
  /** Lets pass what waits, and what is still to come. */
  release(): void;
}

/** Lets a request pass: for the first ones of a step, before the fault of a later one. */
export const pass: Fault = async ({ send, reply }) => reply(await send());

/** The server refuses, in BigQuery's form. `early`: while rows are on their way, of which the rest is not read. */
export function answer(status: number, { early = false, reason = "backendError" } = {}): Fault {
  return async ({ request, response }) => {
    await (early ? readAtLeast(request, 200_000) : buffer(request));
    const message = `answered ${status} by the test`;
    const error = { code: status, message, errors: [{ reason, message }] };
    response.writeHead(status, { "content-type": "application/json" }).end(JSON.stringify({ error }));
  };
}

/** The connection is reset after so many bytes of the body; nothing reaches the server. */
export function reset(bytes = 0): Fault {
  return async ({ request }) => {
    await readAtLeast(request, bytes);
    request.socket.resetAndDestroy();
  };
}

/** The server does it, and the connection is reset instead of its answer. */
export const loseAnswer: Fault = async ({ request, send }) => {
  await buffer(await send());
  request.socket.resetAndDestroy();
};

/** The answer comes at a byte every half second and never ends: no pause is long enough for an idle socket's time limit. */
export const trickle: Fault = async ({ request, response }) => {
  await buffer(request);
  response.writeHead(200);
  const drip = setInterval(() => response.write("."), 500);
  await once(response, "close");
  clearInterval(drip);
};

/** The upload loses its last `lines` at a line's end: a load of fewer rows, which succeeds. */
export function dropLines(lines: number): Fault {
  return async ({ request, send, reply }) => {
    const parts = (await buffer(request)).toString().split("\r\n"); // a multipart body ends: lines, boundary, ""
    const rows = parts.findLastIndex((part) => part.startsWith('{"id"'));
    parts[rows] = `${parts[rows]?.trimEnd().split("\n").slice(0, -lines).join("\n")}\n`;
    await reply(await send(Buffer.from(parts.join("\r\n"))));
  };
}

/** The whole request has come and is not forwarded: never released, a server that hangs. */
export function hold(): Gate {
  return gate(async ({ request, send, reply }, wait) => {
    const body = await buffer(request);
    await wait();
    await reply(await send(body));
  });
}

/** The upload stops after so many bytes, and continues when released: the rows before it wait in flight. */
export function pause(bytes: number): Gate {
  return gate(async ({ request, send, reply }, wait) => {
    const head = await readAtLeast(request, bytes);
    await wait();
    await reply(await send(Buffer.concat([head, await buffer(request)])));
  });
}

/** The server has done it, and the client does not hear of it. */
export function withhold(): Gate {
  return gate(async ({ send, reply }, wait) => {
    const done = await send();
    await wait();
    await reply(done);
  });
}

function gate(fault: (exchange: Exchange, wait: () => Promise<void>) => Promise<void>): Gate {
  const reached = Promise.withResolvers<void>();
  const released = Promise.withResolvers<void>();
  const wait = (): Promise<void> => {
    reached.resolve();
    return released.promise;
  };
  const start: Fault = (exchange) => fault(exchange, wait);
  return Object.assign(start, { reached: reached.promise, release: released.resolve });
}

async function readAtLeast(request: IncomingMessage, bytes: number): Promise<Buffer> {
  const pieces: Buffer[] = [];
  let size = 0;
  while (size < bytes) {
    const piece = request.read() as Buffer | null;
    if (piece) {
      pieces.push(piece);
      size += piece.length;
    } else await Promise.race([once(request, "readable"), once(request, "end").then(() => (size = bytes))]);
  }
  return Buffer.concat(pieces);
}

export interface HttpProxy extends AsyncDisposable {
  url: string;
  /** Each request that came, as `METHOD path`, in order. */
  requests: string[];
  /** Applies a fault to the requests that match, `times` of them; the others pass. The fault named first wins. */
  fault(step: RegExp, fault: Fault, times?: number): void;
}

/**
 * An HTTP server in front of `target` that passes everything on until told otherwise.
 * @param signed S3's: the Host header, which the signature covers, is passed on as it came, and the patterns see the query string, decoded,
 *   which there says what a request does.
 */
export async function createProxy(target = "", { signed = false } = {}): Promise<HttpProxy> {
  const rules: { step: RegExp; fault: Fault; left: number }[] = [];
  const requests: string[] = [];
  const agent = new Agent();
  let closed = false;
  const server = createServer(async (request, response) => {
    const path = signed ? decodeURIComponent(request.url ?? "") : request.url?.split("?")[0];
    const line = `${request.method} ${path}`;
    requests.push(line);
    const rule = rules.find(({ step, left }) => left > 0 && step.test(line));
    if (rule) rule.left -= 1;
    const send = async (body?: Buffer): Promise<IncomingMessage> => {
      if (closed) throw new Error("the proxy is closed"); // for a gate that is released too late
      const { "transfer-encoding": _, "content-length": length, expect: __, ...headers } = request.headers;
      if (!signed) headers.host = new URL(target).host;
      const size = body?.length ?? length;
      const onward = open(new URL(request.url ?? "", target), {
        agent,
        method: request.method,
        headers: { ...headers, ...(size !== undefined && { "content-length": size }) },
      });
      onward.on("error", () => {}); // also after its answer began; who waits for it is told by what follows
      const sent = body ? onward.end(body) : pipeline(request, onward);
      const [[answered]] = await Promise.all([once(onward, "response") as Promise<[IncomingMessage]>, sent]);
      return answered;
    };
    const reply = async (answer: IncomingMessage): Promise<void> => {
      response.writeHead(answer.statusCode ?? 502, answer.headers);
      await pipeline(answer, response);
    };
    // Where the client or the server goes away in mid-request, the other side's connection goes too.
    // A client that has left has no socket any more.
    await (rule?.fault ?? pass)({ request, response, send, reply }).catch(() => request.socket?.destroy());
  });
  server.listen(0, "127.0.0.1");
  await once(server, "listening");
  return {
    url: `http://127.0.0.1:${(server.address() as AddressInfo).port}`,
    requests,
    fault: (step, fault, times = Number.POSITIVE_INFINITY) => rules.push({ step, fault, left: times }),
    [Symbol.asyncDispose]: async () => {
      closed = true;
      server.closeAllConnections();
      agent.destroy();
      server.close();
      await once(server, "close");
    },
  };
}

type Rows = Record<string, string | null>[];

/** What a test of a shared shop begins with: nothing runs, and source and destination differ by the changed rows. */
export interface Change {
  shop: Shop;
  /** In front of the shop's BigQuery. */
  proxy: HttpProxy;
  /** The changed rows' ids: of these hundred, the first half was updated, the other inserted. The table's are 1..last. */
  first: number;
  last: number;
  /** The rows of the destination: those of the source before the change. */
  before: Rows;
  /** Starts a run by way of the proxy. */
  start(variables?: Env): Process;
  /** Starts one with a fault that waits, and returns when the run is there. */
  startHeld(step: RegExp, gate: Gate, variables?: Env): Promise<Process>;
}

/** Rows of a change. */
export const changed = 100;

/**
 * Returns a `test` for tests that share a shop, one after the other; each has to leave source and destination equal. A
 * test that fails takes the shop with it, and the next gets a new one: a failure is its own test's only.
 */
export function sharedShop(options: ShopOptions): (name: string, body: (change: Change) => Promise<void>) => void {
  let shop: Shop | undefined;
  let last = 0;
  const dispose = async (): Promise<void> => {
    await shop?.[Symbol.asyncDispose]();
    shop = undefined;
  };
  const change = async (): Promise<Change> => {
    const half = changed / 2;
    if (!shop) {
      shop = await createShop(options);
      last = half;
      await shop.insertRows(1, last);
      await shop.succeed(shop.script);
    }
    last += half;
    const before = await shop.sourceRows();
    await shop.updateRows(last - changed + 1, last - half, `changed ${last}`);
    await shop.insertRows(last - half + 1, last);
    const { start: startScript, script, env } = shop;
    const proxy = await createProxy(env.BIGQUERY_ENDPOINT);
    const start = (variables: Env = {}): Process => startScript(script, { BIGQUERY_ENDPOINT: proxy.url, ...variables });
    const startHeld: Change["startHeld"] = async (step, gate, variables) => {
      proxy.fault(step, gate, 1);
      const run = start(variables);
      await reach(run, gate.reached);
      return run;
    };
    return { shop, proxy, first: last - changed + 1, last, before, start, startHeld };
  };
  after(dispose);
  return (name, body) =>
    test(name, async () => {
      try {
        const ready = await change();
        await using _proxy = ready.proxy;
        await body(ready);
        await assertNoSessions(ready.shop);
      } catch (error) {
        await dispose();
        throw error;
      }
    });
}

/**
 * Makes the changed rows 20 MB: more than all the buffers between Postgres and BigQuery hold (9 to 11 MB, measured), so
 * that a stream of them is in flight until its reader has taken the last.
 */
export const widen = ({ shop, first, last }: Change): Promise<void> => shop.updateRows(first, last, "wide".repeat(50_000));

/** Makes them narrow again, so that what follows costs little. */
export const narrow = ({ shop, first, last }: Change): Promise<void> => shop.updateRows(first, last, "narrow");

/** The end of a run that must not hang: fails after `seconds`, and the shop then kills it. */
export async function ending(run: Process, seconds = 90): Promise<Result> {
  let result: Result | undefined;
  run.ended.then((ended) => {
    result = ended;
  });
  return await until("the run ends", () => result, seconds);
}

/** Kills a run that has not ended by then. */
export async function kill(run: Process): Promise<void> {
  run.child.kill("SIGKILL");
  const { code, signal, stderr } = await ending(run);
  assert.equal(signal, "SIGKILL", `it had ended by itself, exit ${code}:\n${stderr}`);
}

/** Tells a consumer to stop, which it does by itself. @returns what it said. */
export async function stop(run: Process, seconds = 30): Promise<string> {
  run.child.kill("SIGTERM");
  const { code, stderr } = await ending(run, seconds);
  assert.equal(code, 0, stderr);
  return stderr;
}

/** Waits for what a run has to come to; fails with what the run said if it ends before. */
export async function reach<T>(run: Process, there: Promise<T>): Promise<T> {
  const ended = run.ended.then(({ stderr }) => assert.fail(`the run ended before it came there:\n${stderr}`));
  return await Promise.race([there, ended]);
}

/** The sessions that the runs of a shop have open in its database, by name, state and what they wait for. */
export async function sessions(shop: Shop): Promise<{ name: string; pid: number; state: string; wait: string | null }[]> {
  return await shop.admin`
    select application_name as name, pid, state, wait_event as wait from pg_stat_activity
    where datname = current_database() and application_name like 'etl:%'`;
}

/** Ends the session that holds the pipeline's lock, as a failover or a careless administrator would. */
export async function loseLock({ admin }: Shop): Promise<void> {
  const ended = await admin`
    select pg_terminate_backend(pid, 5000) from pg_locks
    where locktype = 'advisory' and granted and database = (select oid from pg_database where datname = current_database())`;
  assert.equal(ended.length, 1);
}

/** Waits until a run's COPY stands still because nobody takes its rows. @returns its backend's pid. */
export async function copyBlocked(shop: Shop): Promise<number> {
  const blocked = async () => (await sessions(shop)).find(({ wait }) => wait === "ClientWrite");
  return (await until("the COPY waits for its reader", blocked)).pid;
}

/** Nothing is left of a run that has ended: no session, so no open transaction and no lock. */
export async function assertNoSessions(shop: Shop): Promise<void> {
  await until("the sessions of the run are gone", async () => (await sessions(shop)).length === 0, 10);
  const locks = await shop.admin`
    select pid from pg_locks join pg_database d on d.oid = database where locktype = 'advisory' and datname = current_database()`;
  assert.equal(locks.length, 0, "advisory locks left");
}

export async function assertEqualRows(shop: Shop): Promise<void> {
  const [source, destination] = await Promise.all([shop.sourceRows(), shop.destinationRows()]);
  assert.deepEqual(destination, source);
}

/** One more normal run moves exactly so many rows, after which both sides are equal and the watermark has advanced. */
export async function assertHeals(shop: Shop, rows: number): Promise<Result> {
  const before = await shop.watermark();
  const result = await ending(shop.start(shop.script));
  assert.equal(result.code, 0, result.stderr);
  assert.match(result.stderr, new RegExp(`step=done rows=${rows} `));
  await assertEqualRows(shop);
  const after = await shop.watermark();
  assert.ok(after && after > (before ?? ""), `watermark: ${before} before, ${after} after`);
  return result;
}

/** The last run's row in etl.runs. */
export async function lastRun(shop: Shop): Promise<{ run_id: string; state: string; rows: number; error: string | null }> {
  const [run] = await shop.admin`select run_id, state, rows::int, error from etl.runs order by started_at desc limit 1`;
  return run as Awaited<ReturnType<typeof lastRun>>;
}

/** So many staging tables were left by the last run, each with an expiry, as BigQuery tells it, of at most a day. */
export async function assertExpiring(shop: Shop, left: number): Promise<void> {
  const { run_id } = await lastRun(shop);
  const tables = (await shop.stagingTables()).filter((table) => table.includes(run_id));
  assert.equal(tables.length, left, `${tables}`);
  for (const table of tables) {
    const { expirationTime, creationTime } = await shop.api(`/datasets/${shop.dataset}/tables/${table}`);
    const hours = (Number(expirationTime) - Number(creationTime)) / 3_600_000;
    assert.ok(hours > 23 && hours <= 24, `${table} expires ${hours} h after it was made`);
  }
}
