import assert from "node:assert/strict";
import { answer, assertEqualRows, assertHeals, changed, createProxy, ending, lastRun, sharedShop, steps, trickle } from "../lib/faults.ts";
import { freePort, type Shop, stepsOfPipeline, until } from "../lib/shop.ts";

const always = ["etl_future_rows", "etl_last_run_timestamp_seconds", "etl_unknown_source_columns", "etl_watermark_hold_seconds"];
const ofSuccess = [
  "etl_bytes",
  "etl_bytes_billed",
  "etl_duration_seconds",
  "etl_last_success_timestamp_seconds",
  "etl_rows",
  "etl_watermark_timestamp_seconds",
];

/** The pipeline's metrics, without those that the Pushgateway itself adds to a group. */
async function pushed(shop: Shop): Promise<Record<string, number>> {
  return Object.fromEntries(Object.entries(await shop.metrics()).filter(([name]) => name.startsWith("etl_")));
}

const warning = (error: string, what = "the metrics were not pushed"): RegExp =>
  new RegExp(`step=warning warning="${what}; the run itself is not affected" error=.*${error}`);

/** Deletes the pipeline's group, as if it had never been pushed. */
async function forget(shop: Shop): Promise<void> {
  const url = `${shop.env.PUSHGATEWAY_URL}/metrics/job/etl/pipeline/${shop.pipeline}`;
  assert.ok((await fetch(url, { method: "DELETE" })).ok);
  await until("the group is gone", async () => Object.keys(await shop.metrics()).length === 0);
}

/** The run succeeded, with a warning; its rows, its record and its watermark are those of any other. */
async function assertUnaffected(shop: Shop, variables: Record<string, string>, ...warnings: RegExp[]): Promise<void> {
  const before = await shop.watermark();
  const { code, stderr } = await ending(shop.start(shop.script, variables));
  assert.equal(code, 0, stderr);
  for (const expected of warnings) assert.match(stderr, expected);
  assert.match(stderr, new RegExp(`step=done rows=${changed} `));
  await assertEqualRows(shop);
  const { state, rows } = await lastRun(shop);
  assert.deepEqual([state, rows], ["succeeded", changed]);
  assert.ok(((await shop.watermark()) ?? "") > (before ?? ""));
}

/** A run that fails because its source has lost a column; the column is there again afterwards. */
async function failRun(shop: Shop, variables: Record<string, string> = {}): Promise<string> {
  const [table, column] = [shop.admin(shop.table), shop.admin(shop.text)];
  await shop.admin`alter table ${table} rename ${column} to other`;
  const { code, stderr } = await shop.run(shop.script, variables);
  await shop.admin`alter table ${table} rename other to ${column}`;
  assert.equal(code, 2, stderr);
  return stderr;
}

stepsOfPipeline((pipeline) => {
  const test = sharedShop({ pipeline, pushgateway: true });

  for (const { how, fault, error } of [
    { how: "are down", error: "ECONNREFUSED" },
    { how: "answer too slowly to end, or hang,", fault: async () => {}, error: "timeout" },
    { how: "answer 503", fault: answer(503), error: "503" },
  ])
    test(`a Pushgateway and a HEARTBEAT_URL that ${how} cost a warning each, never the run`, async ({ shop }) => {
      await using server = await createProxy(shop.env.PUSHGATEWAY_URL);
      if (error === "timeout") server.fault(steps.push, trickle);
      if (fault) server.fault(steps.anything, fault);
      const url = fault ? server.url : `http://127.0.0.1:${await freePort()}`;
      const told = ["start", "success"].map((event) => warning(error, `HEARTBEAT_URL was not told of ${event}`));
      await assertUnaffected(shop, { PUSHGATEWAY_URL: url, HEARTBEAT_URL: url }, warning(error), ...told);
    });

  test("HEARTBEAT_URL is told of start, then success or failure, of this pipeline; of a run by hand nothing", async ({ shop }) => {
    await using service = await createProxy(shop.env.PUSHGATEWAY_URL, { signed: true });
    service.fault(steps.anything, async ({ response }) => void response.end("OK"));
    const variables = { HEARTBEAT_URL: `${service.url}/key/{pipeline}?rid=1` };
    await assertUnaffected(shop, variables);
    // A Pushgateway that is down does not hide why a run failed.
    const stderr = await failRun(shop, { ...variables, PUSHGATEWAY_URL: `http://127.0.0.1:${await freePort()}` });
    assert.match(stderr, warning("ECONNREFUSED"));
    assert.match(stderr, /error: the source differs from the contract, nothing was moved:/);
    await shop.succeed(shop.script, { ...variables, FROM: "2017-01-01", TO: "2017-01-02" });
    const events = ["/start", "", "/start", "/fail"];
    assert.deepEqual(
      service.requests,
      events.map((event) => `GET /key/${pipeline}${event}?rid=1`),
    );
  });

  test("after success the metrics have the run's values; after one that moved nothing, its time and 0 rows", async (change) => {
    const { shop } = change;
    await forget(shop);
    const before = Date.now() / 1000;
    const { stderr } = await assertHeals(shop, changed);
    const metrics = await pushed(shop);
    assert.deepEqual(Object.keys(metrics).sort(), [...ofSuccess, ...always].sort());
    const [, bytes, seconds] = /step=done rows=\d+ bytes=(\d+) chunks=1 bytes_billed=\d+ seconds=(\S+)/.exec(stderr) ?? [];
    assert.equal(metrics.etl_rows, changed);
    assert.equal(metrics.etl_bytes, Number(bytes));
    // The MERGE reads both tables; BigQuery bills at least 10 MiB of each.
    const billed = 2 * 10 * 2 ** 20;
    assert.equal(metrics.etl_bytes_billed, billed);
    assert.match(stderr, new RegExp(`step=done .* bytes_billed=${billed} `));
    const [run] = await shop.admin`select bytes_billed::int from etl.runs order by started_at desc limit 1`;
    assert.equal(run?.bytes_billed, billed);
    assert.ok(Math.abs((metrics.etl_duration_seconds ?? 0) - Number(seconds)) < 1);
    for (const name of ["etl_unknown_source_columns", "etl_watermark_hold_seconds"]) assert.equal(metrics[name], 0, name);
    for (const name of ["etl_last_success_timestamp_seconds", "etl_last_run_timestamp_seconds"])
      assert.ok((metrics[name] ?? 0) >= before && (metrics[name] ?? 0) <= Date.now() / 1000, name);
    const [row] = await shop.admin`select extract(epoch from watermark)::float8 as seconds from etl.watermarks`;
    assert.ok(Math.abs((metrics.etl_watermark_timestamp_seconds ?? 0) - row?.seconds) < 0.001);

    await assertHeals(shop, 0);
    const after = await pushed(shop);
    assert.equal(after.etl_rows, 0);
    for (const name of ["etl_last_success_timestamp_seconds", "etl_watermark_timestamp_seconds"])
      assert.ok((after[name] ?? 0) > (metrics[name] ?? 0), name);
  });

  test("after a failure the last success is as it was, none where there was none; all runs push one group", async (change) => {
    const { shop } = change;
    await forget(shop);
    await failRun(shop);
    const names = Object.keys(await pushed(shop));
    assert.ok(names.includes("etl_last_failure_timestamp_seconds"));
    assert.ok(!names.some((name) => ofSuccess.includes(name)), `${names}`); // no last success at 0
    await assertHeals(shop, changed);
    const before = await pushed(shop);
    await failRun(shop);
    const after = await pushed(shop);
    assert.deepEqual(Object.keys(after).sort(), [...ofSuccess, ...always, "etl_last_failure_timestamp_seconds"].sort());
    for (const name of [...ofSuccess, "etl_watermark_hold_seconds"]) assert.equal(after[name], before[name], name);
    assert.ok((after.etl_last_failure_timestamp_seconds ?? 0) > (before.etl_last_success_timestamp_seconds ?? 0));
    assert.equal(after.etl_last_run_timestamp_seconds, after.etl_last_failure_timestamp_seconds);
    const response = await fetch(`${shop.env.PUSHGATEWAY_URL}/api/v1/metrics`);
    const { data } = (await response.json()) as { data: { labels: Record<string, string> }[] };
    assert.deepEqual(
      data.map(({ labels }) => labels),
      [{ job: "etl", pipeline }],
    );
    const text = await (await fetch(`${shop.env.PUSHGATEWAY_URL}/metrics`)).text();
    const labels = new Set([...text.matchAll(/^etl_\w+\{(.*)\}/gm)].map((match) => match[1]));
    assert.deepEqual([...labels], [`instance="",job="etl",pipeline="${pipeline}"`]);
  });
});
