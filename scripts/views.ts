#!/usr/bin/env -S npx tsx
/**
 * views: BigQuery → BigQuery, the models of views/.
 *
 *   source         orders, users in BIGQUERY_DATASET, as they are when the run begins
 *   target         a table in BIGQUERY_VIEWS_DATASET for each views/NAME.sql
 *   key            each model's own: its checks in views/checks/ say that it is unique
 *   watermark      none: each run makes every table anew
 *   schedule       weekly, cron
 *   safe to re-run yes, at any time, any number of times: a table is made and checked in a dataset of the run, and only then
 *                  copied over the published one, by one atomic job; one that fails leaves its published table, and those of the
 *                  models that read it, as they were
 *
 *   make views                          all of them
 *   make views ONLY=weekly_revenue      this one and what it reads
 *   make views DRY_RUN=1                what each would read, and what that costs; nothing is built
 *     ALLOW_STALE=1                     although orders or users are older than two of their intervals
 *     ALLOW_SHRINK=1                    although a model has no rows, or fewer than half of the published ones
 *     MAX_PARALLEL=8                    models at a time
 *
 * Touches: reads the raw tables; writes the targets, a build dataset BIGQUERY_VIEWS_DATASET_build_RUN that expires, schema etl,
 * and the Pushgateway.
 */
import { isTransient } from "../shared/bigquery/client.ts";
import { readEnv } from "../shared/env.ts";
import { main } from "../shared/main.ts";
import { runPipeline, takeLock, withRetry } from "../shared/run.ts";
import {
  buildModel,
  checkFresh,
  copyRaw,
  createBuild,
  eachModel,
  estimateModel,
  guardRows,
  publishModel,
  readModels,
  reportEstimates,
  reportModels,
  runChecks,
  viewRaw,
  viewsVariables,
} from "../shared/views/build.ts";

const pipeline = "views";

await main(import.meta, async () => {
  const env = readEnv(viewsVariables);
  await runPipeline(pipeline, env, async (run) => {
    run.next = "each published table is whole, the old one or the new one. To go on: make views";

    // 1. Lock: one run at a time. A dry run needs none.
    if (!env.DRY_RUN && !(await takeLock(run))) return;

    // 2. Read the models, and find their order from the SQL itself.
    const models = readModels(env.ONLY);

    // 3. Freshness: a model of old rows would look like a new answer.
    await checkFresh(run, models, env.ALLOW_STALE || env.DRY_RUN);

    // 4. The build dataset; with DRY_RUN=1 what would be done in it, and no more.
    await using build = await createBuild(run, env);
    if (env.DRY_RUN) {
      await viewRaw(build, models);
      const estimates = await eachModel(run, models, env.MAX_PARALLEL, (model) => estimateModel(build, model));
      return reportEstimates(estimates, env.USD_PER_TIB);
    }

    // 5. Copy the raw tables into it: all models see the same rows, whatever is synced meanwhile.
    await copyRaw(build, models);

    // 6. For each model, after those that it needs: build it (dry run, cost, then the statement), check, guard, publish.
    const outcomes = await eachModel(run, models, env.MAX_PARALLEL, async (model) => {
      return await withRetry(run, isTransient, async (attempt) => {
        const made = await buildModel(build, model, attempt);
        await runChecks(build, model, made, attempt);
        await guardRows(build, model, made);
        await publishModel(build, model, made, attempt);
        return made;
      });
    });

    // 7. Report: the table and a metric for each model; the run's are written by runPipeline, whether this succeeded or failed.
    await reportModels(build, outcomes, env.PUSHGATEWAY_URL);
  });
});
