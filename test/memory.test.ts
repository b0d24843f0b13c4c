import assert from "node:assert/strict";
import { test } from "node:test";

import { createShop, eachPipeline } from "./lib/shop.ts";

/** Rows of the two loads; fewer of users, for time. */
const [soak, sizes] = [[1_000_000, 5_000_000], { orders: [200_000, 1_000_000], users: [50_000, 300_000] }] as const;

eachPipeline((pipeline) => {
  test("peak memory of a first load grows by at most 10 MB per further million rows, and stays under 250 MB", async () => {
    await using shop = await createShop({ pipeline });
    const [small, large] = process.env.SOAK ? soak : sizes[pipeline];
    let rows = 0;
    const peak = async (all: number): Promise<number> => {
      await shop.insertRows(rows + 1, all);
      rows = all;
      await shop.admin`delete from etl.watermarks`; // so that every row is read
      const { stderr } = await shop.succeed(shop.script);
      const done = /step=done rows=(\d+) .* peak_rss_mb=(\d+) /.exec(stderr);
      assert.equal(Number(done?.[1]), rows);
      return Number(done?.[2]);
    };
    const before = await peak(small);
    const after = await peak(large);
    console.log(`# ${pipeline}: peak RSS ${before} MB at ${small} rows, ${after} MB at ${large} rows`);
    assert.ok(after - before <= 10 * Math.ceil((large - small) / 1_000_000), `${before} MB, then ${after} MB`);
    assert.ok(after < 250, `${after} MB`);
  });
});
