import assert from "node:assert/strict";
import { assertEqualRows, sharedShop } from "../lib/faults.ts";
import { random, seed } from "../lib/random.ts";
import { stepsOfPipeline } from "../lib/shop.ts";

const [wantedRuns, wantedCommits] = process.env.SOAK ? [60, 600] : [6, 60];

stepsOfPipeline((pipeline) => {
  const test = sharedShop({ pipeline });

  test("with many writers that hold, commit and roll back at random, source and destination end equal", async (change) => {
    const { shop, last } = change;
    const [table, column] = [shop.admin(shop.table), shop.admin(shop.text)];
    await shop.insertRows(last + 1, last + 300);
    let next = last + 300;
    let writing = true;
    let commits = 0;
    const writer = async (number: number): Promise<void> => {
      const below = random(seed + number);
      const dice = (): number => below(1_000_000) / 1_000_000;
      const sql = shop.connect(`writer ${number}`);
      const hold = (): Promise<void> => new Promise((resolve) => setTimeout(resolve, dice() ** 2 * 2000));
      while (writing) {
        await sql
          .begin(async (transaction) => {
            if (dice() < 0.5) await hold(); // opened, and not written yet
            // Mostly new rows: a version that was lost must not be healed by the row's next update.
            const id = dice() < 0.7 ? ++next : 1 + Math.floor(dice() * next);
            await transaction`
              insert into ${table} (id, ${column}, created_at) values (${id}, ${dice().toFixed(9)}, now())
              on conflict (id) do update set ${column} = excluded.${column}`;
            await hold();
            if (dice() < 0.2) throw new Error("roll back");
            commits += 1;
          })
          .catch((error: Error) => {
            if (error.message !== "roll back") throw error;
          });
      }
    };
    const writers = Array.from({ length: 16 }, (_, number) => writer(number));
    let [runs, synced] = [0, 0];
    try {
      for (; runs < wantedRuns || commits <= wantedCommits; runs++) {
        // Not fewer, nor more writers: on a busy machine each run would find more rows than the one before.
        const { stderr } = await shop.succeed(shop.script, { CHUNK_ROWS: String(100 + (runs % 3) * 100) });
        synced += Number(/step=done rows=(\d+)/.exec(stderr)?.[1]);
      }
    } finally {
      writing = false;
      await Promise.all(writers);
    }
    await shop.succeed(shop.script);
    console.log(`# ${pipeline}: ${commits} commits, ${runs} runs in between, ${synced} rows synced meanwhile`);
    assert.ok(commits > wantedCommits && synced > 300, "the test must have had something to lose");
    await assertEqualRows(shop);
  });
});
