#!/usr/bin/env -S npx tsx
/**
 * sweep: removes from the destination the rows that were deleted at the source, which no cursor sees: those whose key no row of the source
 * has, and whose updated_at is before the watermark. One that is inserted again is past the watermark, which is read before the keys.
 *
 *   schedule         weekly, cron
 *   safe to re-run   yes, at any time, also after a kill. A row whose deletion has not been committed at the source stays
 *
 *   make sweep                                every pipeline to BigQuery, one after the other, past one that fails
 *   make sweep PIPELINE=orders DRY_RUN=1      says what it would delete
 *   make sweep PIPELINE=orders CONFIRM=1      however many
 *
 * Touches: reads the source; deletes from the target; writes a staging table beside it, and a row of etl.runs.
 */
import { flag, number, oneOf, optional, readEnv, UsageError } from "../../shared/env.ts";
import { thousands } from "../../shared/log.ts";
import { main } from "../../shared/main.ts";
import { pipelines } from "../../shared/pipelines.ts";
import { takeLock } from "../../shared/run.ts";
import { beside, eachPipeline, verifyVariables } from "./lib/verify.ts";

const options = { DRY_RUN: optional(flag, false), CONFIRM: optional(flag, false), SWEEP_MAX_SHARE: optional(number(0, 1, false), 0.05) };

await main(import.meta, async () => {
  const env = readEnv({ ...verifyVariables, PIPELINE: optional(oneOf(pipelines())), ...options });
  const { SWEEP_MAX_SHARE: most } = env;
  await eachPipeline("sweep", env, pipelines(), async (run) => {
    const { pipeline } = run;
    // 1. Lock: no run writes meanwhile.
    if (!env.DRY_RUN) await takeLock(run);

    await beside(run, env, "sweep", async (both) => {
      // 2. Find: the key of every row of the source is loaded into a staging table.
      const { rows, counts, shown } = await both.compare();
      const [gone, compared] = [counts.extra, rows + counts.extra];
      const keys = shown.filter(({ kind }) => kind === "extra").map(({ name }) => name);
      run.log(env.DRY_RUN ? "would-delete" : "found", { compared, gone, keys: keys.join() || undefined });

      // 3. Refuse: a source that lost its rows, or another database.
      const share = `${thousands(gone)} of ${thousands(compared)} rows of ${pipeline} are not at the source`;
      const next = `Is SOURCE_DATABASE_URL the right database, and whole? If they are to go: make sweep PIPELINE=${pipeline} CONFIRM=1`;
      if (gone > most * compared && !env.CONFIRM)
        throw new UsageError(`nothing was deleted: ${share}, more than SWEEP_MAX_SHARE=${most} of them. ${next}`);

      // 4. Delete.
      if (env.DRY_RUN) return;
      run.totals.rows = await both.write();
      run.log("swept", { deleted: run.totals.rows, kept: gone - run.totals.rows });
    });
  });
});
