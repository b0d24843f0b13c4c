// The upsert: one row per key, in the newer of two versions, whatever of it changed. Needs the local stack (make up).
import assert from "node:assert/strict";
import { test } from "node:test";
import { createShop, ofSteps } from "../lib/shop.ts";

for (const pipeline of ofSteps) {
  await using shop = await createShop({ pipeline });
  const { admin, table, text, script } = shop;
  await shop.insertRows(1, 8);
  await shop.succeed(script);

  await test(`${pipeline}: a row whose created_at changes, to another month and another year too, stays one row`, async () => {
    assert.deepEqual(await shop.destinationRows(), await shop.sourceRows());
    // orders is partitioned by its month.
    const times = ["2017-02-01", "2018-01-01 00:01", "2015-12-31 23:59:59.999999", "2017-01-01 00:00"];
    for (const [at, time] of times.entries())
      await admin`update ${admin(table)} set created_at = ${time}::text::timestamptz where id = ${at + 1}`;
    await shop.succeed(script);
    const rows = await shop.destinationRows();
    assert.equal(rows.length, 8);
    assert.deepEqual(rows, await shop.sourceRows());
  });

  await test(`${pipeline}: an older version never replaces a newer one, and of two of the same time the source's is right`, async () => {
    // The destination gets other values: in a version that is newer than the source's, in an older one, in one of its time.
    for (const [id, change] of Object.entries({ 5: 1, 6: -1, 7: 0 }))
      await shop.query(
        `UPDATE \`${pipeline}\` SET \`${text}\` = 'other', created_at = TIMESTAMP '2016-06-01',
           updated_at = TIMESTAMP_ADD(updated_at, INTERVAL ${change} MICROSECOND) WHERE id = ${id}`,
      );
    const newer = (await shop.destinationRows()).find(({ id }) => id === "5");
    assert.equal(newer?.[text], "other");
    await shop.query(`DELETE FROM \`${pipeline}\` WHERE id = 8`);
    await shop.succeed(script, { FROM: "2000-01-01", TO: "2100-01-01" });
    const expected = (await shop.sourceRows()).map((row) => (row.id === "5" ? newer : row));
    assert.deepEqual(await shop.destinationRows(), expected);
  });
}
