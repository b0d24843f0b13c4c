import assert from "node:assert/strict";
import { test } from "node:test";
import {
  assertEqualRows,
  assertExpiring,
  assertHeals,
  assertNoSessions,
  copyBlocked,
  createProxy,
  ending,
  type Gate,
  type HttpProxy,
  hold,
  insertWideRows,
  pause,
  reach,
  readyShop,
  sessions,
  steps,
  withhold,
} from "./lib/faults.ts";
import { type Process, type Shop, until } from "./lib/shop.ts";

const orders = "scripts/orders.ts";

/** A shop that was synced, and in which 100 rows have changed since: 50 updated, 50 inserted; or more, wide ones. */
async function changedShop(options: { pushgateway?: boolean } = {}, wide = 0): Promise<Shop> {
  return await readyShop(async (shop) => {
    await shop.insertRows(1, 200);
    await shop.succeed(orders);
    await shop.admin`update orders set status = 'shipped' where id <= 50`;
    await shop.insertRows(201, 250);
    if (wide > 0) await insertWideRows(shop, 251, 250 + wide);
  }, options);
}

/** Starts a run by way of the proxy and waits until it stands at the gate. */
async function startHeld(shop: Shop, proxy: HttpProxy, step: RegExp, gate: Gate): Promise<Process> {
  proxy.fault(step, gate, 1);
  const run = shop.start(orders, { BIGQUERY_ENDPOINT: proxy.url });
  await reach(run, gate.reached);
  return run;
}

async function kill(shop: Shop, run: Process): Promise<void> {
  run.child.kill("SIGKILL");
  assert.equal((await ending(run)).signal, "SIGKILL");
  await assertNoSessions(shop);
}

const shipped = async (shop: Shop): Promise<number> =>
  Number((await shop.query("SELECT count(*) AS n FROM orders WHERE status = 'shipped'"))[0]?.n);

const killed = "a run killed";

for (const { when, step, gate, wide = 0, ready } of [
  {
    when: "while it extracts, with rows in flight",
    step: steps.upload,
    gate: pause(1000),
    wide: 5000,
    ready: copyBlocked,
  },
  { when: "while it uploads", step: steps.upload, gate: hold() },
  { when: "after the load and before it knows of it", step: steps.upload, gate: withhold() },
  { when: "after the load and before the MERGE", step: steps.merge, gate: hold() },
]) {
  test(`${killed} ${when} has merged nothing and moved nothing, leaves no session and no lock, and the next run heals it`, async () => {
    await using shop = await changedShop({}, wide);
    await using proxy = await createProxy(shop.env.BIGQUERY_ENDPOINT);
    const [before, rows] = [await shop.watermark(), await shop.destinationRows()];
    const run = await startHeld(shop, proxy, step, gate);
    await ready?.(shop);
    await kill(shop, run);
    assert.equal(await shop.watermark(), before);
    assert.deepEqual(await shop.destinationRows(), rows);
    await assertExpiring(shop, 1);
    await assertHeals(shop, 100 + wide);
  });
}

test(`${killed} after the MERGE and before the watermark moved is healed by a run that upserts the same rows again`, async () => {
  await using shop = await changedShop();
  await using proxy = await createProxy(shop.env.BIGQUERY_ENDPOINT);
  const before = await shop.watermark();
  const run = await startHeld(shop, proxy, steps.mergeState, withhold());
  await kill(shop, run);
  await assertEqualRows(shop);
  assert.equal(await shop.watermark(), before);
  const { stderr } = await assertHeals(shop, 100);
  assert.match(stderr, /inserted=0 updated=100 /);
});

test(`${killed} after the watermark moved and before it was recorded leaves nothing to do to the next run`, async () => {
  await using shop = await changedShop();
  await using proxy = await createProxy(shop.env.BIGQUERY_ENDPOINT);
  const before = await shop.watermark();
  const gate = withhold();
  const run = await startHeld(shop, proxy, steps.mergeState, gate);
  const [{ run_id } = { run_id: "" }] = await shop.admin<
    { run_id: string }[]
  >`select run_id from etl.runs where state = 'running'`;
  await shop.connect("locker").begin(async (locker) => {
    await locker`lock table etl.runs in share mode`;
    gate.release();
    await until("the watermark moved", async () => (await shop.watermark()) !== before);
    await until("the record waits", async () => (await sessions(shop)).some(({ wait }) => wait === "relation"));
    run.child.kill("SIGKILL");
    await ending(run);
  });
  await assertNoSessions(shop);
  await assertHeals(shop, 0);
  const states = await shop.admin`select run_id = ${run_id} as killed, state from etl.runs order by started_at`;
  assert.deepEqual(
    states.map(({ killed, state }) => `${killed ? "killed " : ""}${state}`),
    ["succeeded", "killed running", "succeeded"],
  );
});

test(`${killed} after the watermark moved and before it was reported is reported by the next run, which moves 0 rows`, async () => {
  await using shop = await changedShop({ pushgateway: true });
  await using gateway = await createProxy(shop.env.PUSHGATEWAY_URL);
  const push = hold();
  gateway.fault(steps.push, push);
  const before = [await shop.watermark(), await shop.metrics()] as const;
  const run = shop.start(orders, { PUSHGATEWAY_URL: gateway.url });
  await reach(run, push.reached);
  await kill(shop, run);
  await assertEqualRows(shop);
  assert.ok(((await shop.watermark()) ?? "") > (before[0] ?? ""));
  assert.deepEqual(await shop.metrics(), before[1]);
  await assertHeals(shop, 0);
  const metrics = await shop.metrics();
  for (const name of ["etl_last_success_timestamp_seconds", "etl_watermark_timestamp_seconds"])
    assert.ok((metrics[name] ?? 0) > (before[1][name] ?? 0), name);
});

test("the MERGE of a killed run that reaches BigQuery late, after newer runs, puts no old version back", async () => {
  await using shop = await changedShop();
  await using proxy = await createProxy(shop.env.BIGQUERY_ENDPOINT);
  const merge = hold();
  const run = await startHeld(shop, proxy, steps.merge, merge);
  await kill(shop, run);
  await shop.admin`update orders set status = 'returned' where id <= 40`;
  await assertHeals(shop, 100);
  // The ten rows that were not changed again are equal in both; seen to be written, they say that the MERGE has run.
  await shop.query("DELETE FROM orders WHERE id BETWEEN 41 AND 50");
  merge.release();
  await until("the late MERGE has run", async () => (await shipped(shop)) === 10);
  await assertEqualRows(shop);
});

test("a run killed in its third chunk is resumed there: what the first two moved stays moved", async () => {
  await using shop = await changedShop();
  await using proxy = await createProxy(shop.env.BIGQUERY_ENDPOINT);
  proxy.fault(steps.merge, async ({ send, reply }) => reply(await send()), 2);
  const third = hold();
  proxy.fault(steps.merge, third);
  const run = shop.start(orders, { BIGQUERY_ENDPOINT: proxy.url, CHUNK_ROWS: "30" });
  await reach(run, third.reached);
  await kill(shop, run);
  await assertHeals(shop, 40);
});

test("a second run at the same time names the holder and since when, exits 0, pushes nothing and records nothing", async () => {
  await using shop = await changedShop();
  await using proxy = await createProxy(shop.env.BIGQUERY_ENDPOINT);
  await using gateway = await createProxy(shop.env.PUSHGATEWAY_URL);
  const merge = hold();
  const first = await startHeld(shop, proxy, steps.merge, merge);
  const recorded = await shop.admin`select * from etl.runs order by started_at`;
  const second = await shop.succeed(orders, { PUSHGATEWAY_URL: gateway.url });
  assert.match(
    second.stderr,
    new RegExp(
      `^\\S+ pipeline=orders run=\\w+ step=skipped because="another run holds the lock" holder=${recorded.at(-1)?.run_id} host=\\S+ pid=${first.child.pid} postgres_pid=\\d+ since=\\d{4}-\\S+$`,
    ),
  );
  assert.deepEqual(gateway.requests, []);
  assert.deepEqual(await shop.admin`select * from etl.runs order by started_at`, recorded);
  merge.release();
  const { code, stderr } = await ending(first);
  assert.equal(code, 0);
  assert.match(stderr, /step=done rows=100 /);
  await assertEqualRows(shop);
});

for (const { when, prepare } of [
  { when: "", prepare: () => changedShop() },
  {
    when: " at the first load, when there is no watermark yet",
    prepare: () => readyShop((shop) => shop.insertRows(1, 100)),
  },
]) {
  test(`two runs at once with the lock lost${when} end equal: the loser's compare-and-set fails, exit 1`, async () => {
    await using shop = await prepare();
    await using proxy = await createProxy(shop.env.BIGQUERY_ENDPOINT);
    const merge = hold();
    const loser = await startHeld(shop, proxy, steps.merge, merge);
    const ended = await shop.admin`
      select pg_terminate_backend(pid, 5000) from pg_locks
      where locktype = 'advisory' and granted and database = (select oid from pg_database where datname = current_database())`;
    assert.equal(ended.length, 1);
    const winner = await shop.succeed(orders);
    assert.match(winner.stderr, /step=done rows=100 /);
    const watermark = await shop.watermark();
    merge.release();
    const { code, stderr } = await ending(loser);
    assert.equal(code, 1);
    assert.match(
      stderr,
      /error: another run advanced the watermark of orders \(expected \S+, found \S+\): nothing is lost, the rows of this run are upserted\. Next: make status/,
    );
    assert.equal(await shop.watermark(), watermark);
    await assertEqualRows(shop);
    await assertHeals(shop, 0);
  });
}

test("a run twice: the second moves 0 rows", async () => {
  await using shop = await changedShop();
  await assertHeals(shop, 100);
  await assertHeals(shop, 0);
});

test("a run by hand waits for the lock, upserts its window, and leaves the watermark and the metrics alone", async () => {
  await using shop = await changedShop();
  await using proxy = await createProxy(shop.env.BIGQUERY_ENDPOINT);
  await using gateway = await createProxy(shop.env.PUSHGATEWAY_URL);
  const merge = hold();
  const first = await startHeld(shop, proxy, steps.merge, merge);
  const byHand = shop.start(orders, { FROM: "2017-01-01", TO: "2999-01-01", PUSHGATEWAY_URL: gateway.url });
  await byHand.line(
    /step=waiting because="another run holds the lock" holder=\w+ host=\S+ pid=\d+ postgres_pid=\d+ since=/,
  );
  const early = await shop.run(orders, { FROM: "2017-01-01", TO: "2999-01-01", RUN_TIMEOUT_SECONDS: "2" });
  assert.equal(early.code, 1);
  assert.match(early.stderr, /error: the run's deadline of 2 s \(RUN_TIMEOUT_SECONDS\) has passed/);
  await shop.query("DELETE FROM orders WHERE id BETWEEN 100 AND 120"); // what a person re-runs a window for
  merge.release();
  assert.equal((await ending(first)).code, 0);
  const watermark = await shop.watermark();
  const { code, stderr } = await ending(byHand);
  assert.equal(code, 0, stderr);
  assert.match(stderr, /inserted=21 updated=229 /);
  assert.match(stderr, /step=done rows=250 .*(?<!watermark=\S*)$/);
  await assertEqualRows(shop);
  assert.equal(await shop.watermark(), watermark);
  assert.deepEqual(gateway.requests, []);
});

for (const signal of ["SIGTERM", "SIGINT"] as const) {
  test(`${signal} in mid-run ends it with exit 1, a text, its job cancelled and its state recorded; the next run heals it`, async () => {
    await using shop = await changedShop();
    await using proxy = await createProxy(shop.env.BIGQUERY_ENDPOINT);
    const run = await startHeld(shop, proxy, steps.merge, hold());
    run.child.kill(signal);
    const { code, stderr } = await ending(run);
    assert.equal(code, 1);
    const text = `stopped by ${signal}: nothing is half done, the next run goes on from the watermark. Next: make status`;
    assert.ok(stderr.endsWith(`error: ${text}`), stderr);
    assert.equal(proxy.requests.filter((line) => steps.cancel.test(line)).length, 1);
    const [last] = await shop.admin`select state, error, finished_at from etl.runs order by started_at desc limit 1`;
    assert.deepEqual([last?.state, last?.error], ["failed", text]);
    await assertNoSessions(shop);
    await assertHeals(shop, 100);
  });
}

test("a second Ctrl-C does not wait for anything", async () => {
  await using shop = await changedShop();
  await using proxy = await createProxy(shop.env.BIGQUERY_ENDPOINT);
  const [gate, cancel] = [hold(), hold()];
  proxy.fault(steps.cancel, cancel);
  const run = await startHeld(shop, proxy, steps.merge, gate);
  run.child.kill("SIGINT");
  await reach(run, cancel.reached);
  const started = performance.now();
  run.child.kill("SIGINT");
  assert.equal((await ending(run)).code, 1);
  assert.ok(performance.now() - started < 2000);
  await assertNoSessions(shop);
  await assertHeals(shop, 100);
});

test("make rewind during a run is refused and names the run; the run is not disturbed", async () => {
  await using shop = await changedShop();
  await using proxy = await createProxy(shop.env.BIGQUERY_ENDPOINT);
  const merge = hold();
  const run = await startHeld(shop, proxy, steps.merge, merge);
  const rewind = await shop.run("scripts/ops/rewind.ts", { PIPELINE: "orders", TO: "2017-06-01" });
  assert.equal(rewind.code, 1);
  const [{ run_id } = { run_id: "" }] = await shop.admin<
    { run_id: string }[]
  >`select run_id from etl.runs where state = 'running'`;
  assert.match(
    rewind.stderr,
    new RegExp(
      `error: a run of orders is going \\(${run_id}, [^)]+\\): wait for its end, then: make rewind PIPELINE=orders TO=2017-06-01`,
    ),
  );
  merge.release();
  assert.equal((await ending(run)).code, 0);
  await assertEqualRows(shop);
});

test("a watermark set back by SQL during a run stays set back: the run loses its compare-and-set, and the next reads all again", async () => {
  await using shop = await changedShop();
  await using proxy = await createProxy(shop.env.BIGQUERY_ENDPOINT);
  const merge = hold();
  const run = await startHeld(shop, proxy, steps.merge, merge);
  await shop.admin`update etl.watermarks set watermark = '2017-06-01'`;
  merge.release();
  const { code, stderr } = await ending(run);
  assert.equal(code, 1);
  assert.match(
    stderr,
    /error: another run advanced the watermark of orders \(expected \S+, found 2017-06-01T00:00:00\+00\)/,
  );
  await assertHeals(shop, 250);
});
