#!/usr/bin/env -S npx tsx
/**
 * views: BigQuery → BigQuery, the models of views/.
 *
 *   source         orders, users in BIGQUERY_DATASET, as they are when the run begins
 *   target         a table in BIGQUERY_VIEWS_DATASET for each views/NAME.sql
 *   key            each model's own: its checks in views/checks/ say that it is unique
 *   watermark      none: each run rebuilds every table
 *   schedule       weekly, cron
 *   safe to re-run yes, at any time, any number of times: a table is made and checked in a dataset of the run, and only then
 *                  published, by one atomic job; one that fails leaves its published table, and those of the models that read it,
 *                  as they were
 *
 *   make views                          all of them
 *   make views ONLY=weekly_revenue      this one and what it reads
 *     ALLOW_STALE=1                     although orders or users are older than two of their intervals
 *     ALLOW_SHRINK=1                    although a model has no rows, or fewer than half of the published ones
 *
 * Touches: reads the raw tables; writes the targets, a build dataset BIGQUERY_VIEWS_DATASET_build_RUN that expires, schema etl,
 * and the Pushgateway.
 */
import { withRetry } from "../shared/bigquery/client.ts";
import { readEnv } from "../shared/env.ts";
import { main } from "../shared/main.ts";
import { pipelines } from "../shared/pipelines.ts";
import { runPipeline, takeLock } from "../shared/run.ts";
import * as views from "../shared/views/build.ts";
import { readModels } from "../shared/views/models.ts";

await main(import.meta, async () => {
  const env = readEnv(views.viewsVariables);
  await runPipeline("views", env, async (run) => {
    run.next = "each published table is whole, the old one or the new one. Next: make views";

    // 1. Lock: one run at a time.
    if (!(await takeLock(run))) return;

    // 2. Read the models, and find their order from the SQL itself.
    const models = readModels(pipelines(), env.ONLY);
    const statements = models.flatMap((model) => [model, ...model.checks]);
    const raw = pipelines().filter((name) => statements.some(({ reads }) => reads.includes(name)));

    // 3. Freshness: a model of old rows would look like a new answer.
    await views.checkFresh(run, raw, env.ALLOW_STALE);

    // 4. The build dataset, with a copy of the raw tables: all models see the same rows, whatever is synced meanwhile.
    const build = await views.createBuild(run, env, raw);

    // 5. For each model, after those that it needs: build, check, publish.
    const outcomes = await views.eachModel(build, models, async (model) => {
      return await withRetry(run, async (attempt) => {
        await views.buildModel(build, model, attempt);
        await views.runChecks(build, model, attempt);
        return await views.publishModel(build, model, attempt);
      });
    });

    // 6. Report: the table, and the metrics of each model; runPipeline pushes the run's.
    await views.reportModels(build, outcomes);
  });
});
