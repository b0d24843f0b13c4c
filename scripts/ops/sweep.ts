#!/usr/bin/env -S npx tsx
/**
 * sweep: removes from the destination the rows that were deleted at the source, which no cursor sees.
 *
 *   1. lock          the pipeline's: no run writes meanwhile
 *   2. find          loads the key of every row of the source into a staging table: gone are the rows of the table that are not in it and
 *                    whose updated_at is before the watermark
 *   3. refuse        more than SWEEP_MAX_SHARE of the rows without CONFIRM=1: a source that lost its rows, or another database
 *   4. delete        by the same condition, in one statement. A row that is inserted again has an updated_at at or past the watermark
 *                    (read before the keys): it stays where a run has brought it already, else the next run brings it
 *
 *   safe to re-run   yes, at any time, also after a kill. A row whose deletion has not been committed at the source stays
 *
 *   make sweep PIPELINE=orders
 *   make sweep PIPELINE=orders DRY_RUN=1      says what it would delete
 *   make sweep PIPELINE=orders CONFIRM=1      however many
 *
 * Touches: reads the source; deletes from the target; writes a staging table beside it, and a row of etl.runs.
 */

import { isTransient } from "../../shared/bigquery/client.ts";
import { address, ask, change, createStaging } from "../../shared/bigquery/load.ts";
import { flag, name, number, optional, readEnv, required, UsageError } from "../../shared/env.ts";
import { thousands } from "../../shared/log.ts";
import { main } from "../../shared/main.ts";
import { pipelines } from "../../shared/pipelines.ts";
import { runPipeline, takeLock, withRetry } from "../../shared/run.ts";
import { distrusted, needWatermark, openTable, stageAll, sweepStatements, verifyVariables } from "./lib/verify.ts";

await main(import.meta, async () => {
  const env = readEnv({
    ...verifyVariables,
    PIPELINE: required(name),
    DRY_RUN: optional(flag, false),
    CONFIRM: optional(flag, false),
    SWEEP_MAX_SHARE: optional(number(0, 1, false), 0.05),
  });
  const { PIPELINE: pipeline } = env;
  if (pipeline === "sensors" || pipeline === "events")
    throw new UsageError(
      `PIPELINE=${pipeline}: nothing is to be swept there: ` +
        `${pipeline === "sensors" ? "deletions of readings come by the log" : "events are never deleted at the source, or only once they are archived"}.`,
    );
  if (!pipelines().includes(pipeline))
    throw new UsageError(`PIPELINE=${pipeline}: there is no such pipeline; there are: ${pipelines().join(", ")}`);
  // By hand: it says nothing of the pipeline's schedule, and waits for its lock.
  await runPipeline(pipeline, { ...env, DRY_RUN: true }, async (run) => {
    run.next = `the same command begins again. Next: make sweep PIPELINE=${pipeline}`;
    // 1. Lock.
    if (!env.DRY_RUN) await takeLock(run);
    const back = await distrusted(run);
    if (back) throw new UsageError(`nothing was deleted: ${back}`);

    await withRetry(run, isTransient, async (attempt) => {
      // 2. Find.
      const table = await openTable(run, env);
      const { fields, key } = table.to.contract;
      const contract = { ...table.to.contract, fields: fields.filter(({ name }) => key.includes(name)) };
      const to = { ...table.to, contract };
      const { watermark } = await needWatermark(run);
      await using staging = await createStaging(run, to, attempt);
      await stageAll(run, env, to, table, staging);
      const tables = [to.table, staging.name].map((name) => address(to, name));
      const statements = sweepStatements(table.to.contract, tables, to.version, watermark);
      const [{ rows, gone } = { rows: 0, gone: 0 }] = await ask<{ rows: number; gone: number }>(
        run,
        to,
        statements.count,
      );
      const keys = await ask<{ name: string }>(run, to, `${statements.list} LIMIT ${env.LIMIT}`);
      run.log(env.DRY_RUN ? "would-delete" : "found", {
        rows,
        gone,
        keys: keys.length ? keys.map(({ name }) => name).join() : undefined,
      });

      // 3. Refuse.
      if (gone > env.SWEEP_MAX_SHARE * rows && !env.CONFIRM)
        throw new UsageError(
          `nothing was deleted: ${thousands(gone)} of ${thousands(rows)} rows of ${pipeline} are not at the ` +
            `source, more than SWEEP_MAX_SHARE=${env.SWEEP_MAX_SHARE} of them. Is SOURCE_DATABASE_URL the right ` +
            `database, and whole? If they are to go: make sweep PIPELINE=${pipeline} CONFIRM=1`,
        );

      // 4. Delete.
      if (env.DRY_RUN) return;
      const { deleted } = await change(run, to, `etl_${staging.name}_delete`, statements.delete);
      run.totals.rows = deleted;
      run.log("swept", { deleted, kept: gone - deleted });
    });
  });
});
