import assert from "node:assert/strict";
import { test } from "node:test";

import { createShop, lowestPeaks, stepsOfPipeline } from "../lib/shop.ts";

/** Rows of the two loads. */
const sizes = process.env.SOAK ? ([1_000_000, 5_000_000] as const) : ([20_000, 250_000] as const);

stepsOfPipeline((pipeline) => {
  test("peak memory of a first load of many rows is at most 50 MB above that of few, and under 250 MB", async () => {
    await using shop = await createShop({ pipeline });
    let rows = 0;
    const [before = 0, after = 0] = await lowestPeaks(2, async (index) => {
      const all = sizes[index] ?? 0;
      // Below what there is already, the source has to shrink again.
      if (all < rows) await shop.admin`delete from ${shop.admin(pipeline)} where id > ${all}`;
      else await shop.insertRows(rows + 1, all);
      rows = all;
      await shop.admin`delete from etl.watermarks`; // so that every row is read
      const { stderr } = await shop.succeed(shop.script);
      const done = /step=done rows=(\d+) .* peak_rss_mb=(\d+) /.exec(stderr);
      assert.equal(Number(done?.[1]), rows);
      console.log(`# ${pipeline}: peak RSS ${done?.[2]} MB at ${rows} rows`);
      return Number(done?.[2]);
    });
    assert.ok(after - before <= 50, `${before} MB, then ${after} MB`);
    assert.ok(after < 250, `${after} MB`);
  });
});
