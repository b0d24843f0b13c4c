/**
 * make report, looked at in a real browser: on a stack with a failed day, a held watermark and a model that was refused. Needs the local
 * stack (make up). SCREENSHOT=file keeps what it saw.
 */
import assert from "node:assert/strict";
import { mkdirSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { test } from "node:test";
import { openPage } from "../lib/browser.ts";
import { scratchCopy } from "../lib/scratch.ts";
import { createShop } from "../lib/shop.ts";
import type { Status } from "../lib/status.ts";

using scratch = scratchCopy();
await using shop = await createShop({ folder: scratch.folder, clickhouse: true });
const file = join(scratch.folder, "report.html");
const hostile = `</title><script>alert(1)</script><img src="http://127.0.0.1:9/x" onerror='alert(2)'> \u202egnp.exe & more`;

/** Two weeks of it, ended by real runs: orders held, a model refused, readers' proofs. */
async function live(): Promise<void> {
  const model = (name: string, sql: string): void =>
    writeFileSync(join(scratch.folder, `views/${name}.sql`), `CREATE OR REPLACE TABLE ${name}\nAS\n${sql};\n`);
  mkdirSync(join(scratch.folder, "views/checks"), { recursive: true });
  model("order_count", "SELECT COUNT(*) AS orders FROM orders");
  model("weekly_baskets", "SELECT id FROM orders");
  await shop.admin`
    insert into etl.runs (run_id, pipeline, state, rows, error, host, pid, started_at, finished_at, bytes_billed, hold_seconds)
    select 'past_' || i, 'orders', case when i in (41, 52) then 'failed' when i = 47 then 'running' else 'succeeded' end, 700 + 9000 * (i % 7),
      case when i in (41, 52) then ${hostile}::text end, 'host', 1, at, case when i <> 47 then at + i * interval '0.1 s' end, 62914560,
      case when i = 55 then 5400 else 0 end
    from generate_series(1, 58) i, lateral (select now() - (60 - i) * interval '1 hour') t (at)`;
  await shop.admin`
    insert into etl.chunks (pipeline, chunk_from, chunk_to, state, rows, error, run_id)
    select 'events', day, day + interval '1 day', case when failed then 'failed' else 'succeeded' end, case when failed then 0 else rows end,
      case when failed then ${`S3 answered 503 ${hostile}`}::text end, 'past'
    from (select day, day = '2017-03-05' as failed, 3000 + 40 * extract(doy from day)::int as rows
      from generate_series(timestamptz '2017-01-01', '2017-12-31', '1 day') day where day <> '2017-06-06') days`;
  await shop.insertRows(1, 1500);
  await shop.insertRows(1, 20, "users");
  await shop.succeed("scripts/orders.ts");
  await shop.succeed("scripts/users.ts");
  await shop.succeed("scripts/views.ts");
  await shop.query("DELETE FROM users WHERE id = 7");
  assert.equal((await shop.run("scripts/ops/verify.ts", { PIPELINE: "users" })).code, 1);
  await shop.succeed("scripts/ops/verify.ts", { PIPELINE: "orders" });
  model("weekly_baskets", "SELECT id FROM orders WHERE id < 100");
  assert.equal((await shop.run("scripts/views.ts")).code, 1);
}

await test("the page says what make status says, and what went wrong; it is text only, asks nothing of anybody, and is readable everywhere", async () => {
  await live();
  await shop.connect("slow writer").begin(async (late) => {
    await late`select now()`;
    const report = await shop.succeed("scripts/ops/report.ts", { OUT: file });
    assert.match(report.stderr, /step=done file=\S+report\.html/);
    const { stdout } = await shop.run("scripts/ops/status.ts", { JSON: "1" });
    await using page = await openPage(`file://${file}`);
    const seen = (await page.evaluate<string>("document.body.innerText")).replaceAll(/\s+/g, " ");
    const says = (text: string): void => assert.ok(seen.includes(text), `${text}\n\nis not in\n\n${seen}`);

    for (const { pipeline, state, reasons, watermark, last_success, rows } of JSON.parse(stdout) as Status[]) {
      says(`${pipeline} ${state}`);
      if (watermark) says(`watermark ${watermark}`);
      if (last_success) says(`last success ${last_success}`);
      if (rows !== null) says(`${rows.toLocaleString("en-US")} rows in it`);
      for (const reason of reasons) says(reason.split("\n")[0]?.replace(/held for .*/, "held for") ?? "");
    }
    for (const text of [
      "orders, users: its watermark is held for",
      "orders: 2 of 59 runs failed, ",
      "orders: 1 of 59 runs were abandoned, ",
      "orders: 1 of 59 runs found the watermark held, ",
      "an open transaction of 1h 30m (it has succeeded since)",
      "archive of 2017-03-05: S3 answered 503",
      "Next: make backfill-events FROM=2017-03-05 TO=2017-03-06",
      "Failed: 2017-03-05. Missing: 2017-06-06.",
      "archive: 1 missing, from 2017-06-06 on. Next: make backfill-events FROM=2017-06-06 TO=2017-06-07",
      "model weekly_baskets: was not published: views/weekly_baskets.sql: it has 99 rows, and the published",
      "users: differs from its source: 1 missing. Next: make verify PIPELINE=users",
      hostile.replace("\u202e", "?"),
    ])
      says(text);

    // What has a shape of its own has its words on hover.
    const titles = (selector: string): Promise<string[]> =>
      page.evaluate(`[...document.querySelectorAll("i${selector}")].map(({ title }) => title)`);
    const [failed, gone, done] = await Promise.all([titles(".failed"), titles(".gone"), titles(".done")]);
    assert.equal(failed.length, 4); // two runs of orders, one of views, one day
    assert.ok(
      failed.some((title) => title.includes("5.2 s </title><script>")),
      failed[0],
    );
    assert.deepEqual([gone.length, gone.some((title) => title.includes("2017-06-06 missing"))], [2, true]);
    assert.ok(done.includes("2017-01-01 succeeded, 3,040 rows "), done[70]);
    assert.equal(await page.evaluate("document.querySelectorAll('details tr').length > 58"), true);

    // Hostile text made no element, no script ran, and nothing was asked for but the file.
    assert.equal(
      await page.evaluate("document.images.length + document.scripts.length + document.querySelectorAll('link, iframe').length"),
      0,
    );
    assert.deepEqual(page.heard, [{ method: "Network.requestWillBeSent", text: `file://${file}` }]);

    const colours = new Set<string>();
    for (const [width, scheme] of [
      [390, "light"],
      [390, "dark"],
      [1000, "light"],
    ] as const) {
      await page.send("Emulation.setDeviceMetricsOverride", {
        width,
        height: 800,
        deviceScaleFactor: 1,
        mobile: width < 500,
      });
      await page.send("Emulation.setEmulatedMedia", { features: [{ name: "prefers-color-scheme", value: scheme }] });
      assert.equal(await page.evaluate(`document.documentElement.scrollWidth > ${width}`), false, `${width} px`);
      colours.add(await page.evaluate("getComputedStyle(document.body).color"));
    }
    assert.equal(colours.size, 2);
    const printed = await page.send("Page.printToPDF");
    assert.ok(Buffer.from(printed.data, "base64").toString("latin1").startsWith("%PDF"));
    if (!process.env.SCREENSHOT) return;
    const clip = { x: 0, y: 0, width: 985, height: 1650, scale: 0.75 };
    const { data } = await page.send("Page.captureScreenshot", { format: "png", captureBeyondViewport: true, clip });
    writeFileSync(process.env.SCREENSHOT, Buffer.from(data, "base64"));
  });
});
