import assert from "node:assert/strict";
import { test } from "node:test";
import { createShop } from "./lib/shop.ts";

const [small, large] = process.env.SOAK ? [1_000_000, 5_000_000] : [200_000, 1_000_000];

test("peak memory of a first load grows by at most 10 MB per further million rows, and stays under 250 MB", async () => {
  await using shop = await createShop();
  const peak = async (rows: number): Promise<number> => {
    await shop.admin`truncate orders`;
    await shop.admin`delete from etl.watermarks`;
    await shop.insertRows(1, rows);
    const { stderr } = await shop.succeed("scripts/orders.ts");
    const done = /step=done rows=(\d+) .* peak_rss_mb=(\d+) /.exec(stderr);
    assert.equal(Number(done?.[1]), rows);
    return Number(done?.[2]);
  };
  const before = await peak(small);
  const after = await peak(large);
  console.log(`# peak RSS: ${before} MB at ${small} rows, ${after} MB at ${large} rows`);
  assert.ok(after - before <= 10 * Math.ceil((large - small) / 1_000_000), `${before} MB, then ${after} MB`);
  assert.ok(after < 250, `${after} MB`);
});
