import assert from "node:assert/strict";
import {
  assertEqualRows,
  assertExpiring,
  assertHeals,
  assertNoSessions,
  changed,
  copyBlocked,
  createProxy,
  ending,
  hold,
  kill,
  lastRun,
  loseLock,
  narrow,
  pass,
  pause,
  reach,
  sharedShop,
  steps,
  widen,
  withhold,
} from "../lib/faults.ts";
import { stepsOfPipeline, until } from "../lib/shop.ts";

const killed = "a run killed";

stepsOfPipeline((pipeline) => {
  const test = sharedShop({ pipeline, pushgateway: true });

  for (const { when, step, gate, inFlight = false } of [
    { when: "while it extracts, with rows in flight", step: steps.upload, gate: pause(1000), inFlight: true },
    { when: "after the load and before the MERGE", step: steps.merge, gate: hold() },
  ]) {
    test(`${killed} ${when} has moved nothing, leaves no session and no lock, and the next run heals it`, async (change) => {
      const { shop } = change;
      if (inFlight) await widen(change);
      const watermark = await shop.watermark();
      const run = await change.startHeld(step, gate);
      if (inFlight) await copyBlocked(shop);
      await kill(run);
      await assertNoSessions(shop);
      assert.equal(await shop.watermark(), watermark);
      assert.deepEqual(await shop.destinationRows(), change.before);
      await assertExpiring(shop, 1);
      if (inFlight) await narrow(change);
      await assertHeals(shop, changed);
    });
  }

  test(`${killed} after the MERGE and before the watermark moved is healed by a run that upserts the same rows again`, async (change) => {
    const { shop, startHeld } = change;
    const before = await shop.watermark();
    await kill(await startHeld(steps.mergeState, withhold()));
    await assertEqualRows(shop);
    assert.equal(await shop.watermark(), before);
    const { stderr } = await assertHeals(shop, changed);
    assert.match(stderr, new RegExp(`inserted=0 updated=${changed} `));
  });

  test(`${killed} after the watermark moved and before it was reported is reported by the next run, which moves 0 rows`, async (change) => {
    const { shop, start } = change;
    await using gateway = await createProxy(shop.env.PUSHGATEWAY_URL);
    const push = hold();
    gateway.fault(steps.push, push);
    const before = [await shop.watermark(), await shop.metrics()] as const;
    const run = start({ PUSHGATEWAY_URL: gateway.url });
    await reach(run, push.reached);
    await kill(run);
    await assertEqualRows(shop);
    assert.ok(((await shop.watermark()) ?? "") > (before[0] ?? ""));
    assert.deepEqual(await shop.metrics(), before[1]);
    await assertHeals(shop, 0);
    const metrics = await shop.metrics();
    for (const name of ["etl_last_success_timestamp_seconds", "etl_watermark_timestamp_seconds"])
      assert.ok((metrics[name] ?? 0) > (before[1][name] ?? 0), name);
  });

  test("the MERGE of a killed run that reaches BigQuery late, after newer runs, puts no old version back", async (change) => {
    const { shop, first, startHeld } = change;
    const merge = hold();
    await kill(await startHeld(steps.merge, merge));
    await shop.updateRows(first, first + 39, "newer");
    await assertHeals(shop, changed);
    // The ten updated rows that were not changed again are equal in both; seen to be written, they say that the MERGE has run.
    const ten = `id BETWEEN ${first + 40} AND ${first + 49}`;
    await shop.query(`DELETE FROM ${pipeline} WHERE ${ten}`);
    merge.release();
    await until("the late MERGE has run", async () => {
      const [row] = await shop.query(`SELECT count(*) AS n FROM ${pipeline} WHERE ${ten}`);
      return row?.n === "10";
    });
    await assertEqualRows(shop);
  });

  test("a run killed in its third chunk is resumed there: what the first two moved stays moved", async ({ shop, proxy, startHeld }) => {
    proxy.fault(steps.merge, pass, 2);
    await kill(await startHeld(steps.merge, hold(), { CHUNK_ROWS: "30" }));
    await assertHeals(shop, changed - 60);
  });

  test("a second run at the same time names the holder and since when, exits 0, pushes and records nothing", async (change) => {
    const { shop, startHeld } = change;
    await using gateway = await createProxy(shop.env.PUSHGATEWAY_URL);
    const merge = hold();
    const first = await startHeld(steps.merge, merge);
    const recorded = await shop.admin`select * from etl.runs order by started_at`;
    const second = await shop.succeed(shop.script, { PUSHGATEWAY_URL: gateway.url });
    const holder = `holder=${recorded.at(-1)?.run_id} host=\\S+ pid=${first.child.pid} postgres_pid=\\d+ since=\\d{4}-\\S+`;
    assert.match(
      second.stderr,
      new RegExp(`^\\S+ pipeline=${pipeline} run=\\w+ step=skipped because="another run holds the lock" ${holder}$`),
    );
    assert.deepEqual(gateway.requests, []);
    assert.deepEqual(await shop.admin`select * from etl.runs order by started_at`, recorded);
    merge.release();
    const { code, stderr } = await ending(first);
    assert.equal(code, 0);
    assert.match(stderr, new RegExp(`step=done rows=${changed} `));
    await assertEqualRows(shop);
  });

  test("two runs at once with the lock lost, at a first load, end equal: the loser's compare-and-set fails, exit 1", async (change) => {
    const { shop, last, startHeld } = change;
    await shop.admin`delete from etl.watermarks`;
    await shop.query(`DELETE FROM ${pipeline} WHERE true`);
    const merge = hold();
    const loser = await startHeld(steps.merge, merge);
    await loseLock(shop);
    assert.match((await shop.succeed(shop.script)).stderr, new RegExp(`step=done rows=${last} `));
    const watermark = await shop.watermark();
    merge.release();
    const { code, stderr } = await ending(loser);
    assert.equal(code, 1);
    const lost = `another run moved the watermark of ${pipeline} \\(expected -infinity, found \\S+\\): nothing is lost, `;
    assert.match(stderr, new RegExp(`error: ${lost}.* Next: make status`));
    assert.equal(await shop.watermark(), watermark);
    await assertEqualRows(shop);
    await assertHeals(shop, 0);
  });

  test("a run by hand waits for the lock, upserts its window, and leaves the watermark and the metrics alone", async (change) => {
    const { shop, last, startHeld } = change;
    await using gateway = await createProxy(shop.env.PUSHGATEWAY_URL);
    const merge = hold();
    const first = await startHeld(steps.merge, merge);
    const window = { FROM: "2017-01-01", TO: "2999-01-01" };
    const byHand = shop.start(shop.script, { ...window, PUSHGATEWAY_URL: gateway.url });
    await byHand.line(/step=waiting because="another run holds the lock" holder=\w+ host=\S+ pid=\d+ postgres_pid=\d+ since=/);
    const early = await shop.run(shop.script, { ...window, RUN_TIMEOUT_SECONDS: "2" });
    assert.equal(early.code, 1);
    assert.match(early.stderr, /error: the run's deadline of 2 s \(RUN_TIMEOUT_SECONDS\) has passed/);
    await shop.query(`DELETE FROM ${pipeline} WHERE id BETWEEN 10 AND 30`); // what a person re-runs a window for
    merge.release();
    assert.equal((await ending(first)).code, 0);
    const watermark = await shop.watermark();
    const { code, stderr } = await ending(byHand);
    assert.equal(code, 0, stderr);
    assert.match(stderr, new RegExp(`inserted=21 updated=${last - 21} `));
    assert.match(stderr, new RegExp(`step=done rows=${last} .*(?<!watermark=\\S*)$`));
    await assertEqualRows(shop);
    assert.equal(await shop.watermark(), watermark);
    assert.deepEqual(gateway.requests, []);
  });

  test("SIGTERM and SIGINT at once, as timeout and make send them, end a run, cancel its job and record its state", async (change) => {
    const { shop, proxy, startHeld } = change;
    const run = await startHeld(steps.merge, hold());
    for (const signal of ["SIGTERM", "SIGINT"] as const) run.child.kill(signal); // two of one kind might arrive as one
    const { code, stderr } = await ending(run);
    assert.equal(code, 1);
    const [, text] =
      /error: (stopped by SIG(?:TERM|INT)\. No chunk is half applied; the next run resumes .*Next: make status)$/.exec(stderr) ?? [];
    assert.ok(text, stderr);
    assert.equal(proxy.requests.filter((line) => steps.cancel.test(line)).length, 1);
    const { state, error } = await lastRun(shop);
    assert.deepEqual([state, error], ["failed", text]);
    await assertNoSessions(shop);
    await assertHeals(shop, changed);
  });

  test("a watermark set back by SQL during a run stays set back, and the next run reads all again", async (change) => {
    const { shop, last, startHeld } = change;
    const merge = hold();
    const run = await startHeld(steps.merge, merge);
    await shop.admin`update etl.watermarks set watermark = '2017-06-01'`;
    merge.release();
    const { code, stderr } = await ending(run);
    assert.equal(code, 1);
    assert.match(stderr, /error: another run moved the watermark of \w+ \(expected \S+, found 2017-06-01T00:00:00\.000000\+00\)/);
    await assertHeals(shop, last);
  });
});
