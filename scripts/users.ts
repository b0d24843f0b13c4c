#!/usr/bin/env -S npx tsx
/**
 * users: Postgres → BigQuery.
 *
 *   source         public.users, as sql/users.sql reads it
 *   target         users in BIGQUERY_DATASET, as schemas/bigquery/users.json describes it
 *   key            id
 *   watermark      updated_at, set by the database
 *   schedule       daily, cron
 *   safe to re-run yes, at any time, any number of times, twice at once: rows are upserted by key and never replaced by
 *                  an older version, and the watermark moves only after the upsert, by compare-and-set
 *
 *   make users                                   everything that changed since the watermark
 *   make users FROM=2017-01-01 TO=2017-02-01     read [FROM, TO) again; the watermark stays where it is
 *
 * Touches: reads the source as a read-only role; writes the target, a staging table beside it, schema etl, and the Pushgateway.
 */
import { bigqueryVariables, withRetry } from "../shared/bigquery/client.ts";
import { checkSource, readContract } from "../shared/bigquery/contract.ts";
import { createStaging, loadChunk, mergeStaging, openDestination } from "../shared/bigquery/load.ts";
import { readEnv } from "../shared/env.ts";
import { main } from "../shared/main.ts";
import { pipelineVariables, reportChunk, runPipeline, takeLock } from "../shared/run.ts";
import { advance, cutChunks, takeWindow } from "../shared/watermark.ts";

const pipeline = "users";

await main(import.meta, async () => {
  const env = readEnv({ ...pipelineVariables, ...bigqueryVariables });
  const contract = readContract(pipeline);
  await runPipeline(pipeline, env, async (run) => {
    // 1. Lock: one run at a time.
    if (!(await takeLock(run))) return;

    // 2. Check the schema: source and destination against schemas/bigquery/users.json, before a row moves.
    const [columns, destination] = await Promise.all([checkSource(run, contract), openDestination(env, contract)]);

    // 3. Take the window: [watermark, safe upper bound), or [FROM, TO) of a re-run by hand.
    const window = await takeWindow(run, env, destination);

    // 4. For each chunk: extract, load, count, upsert, advance.
    for await (const chunk of cutChunks(run, contract.source, window, env.CHUNK_ROWS)) {
      const done = await withRetry(run, async (attempt) => {
        if (chunk.rows === 0) return { rows: 0, bytes: 0, inserted: 0, updated: 0 };
        await using staging = await createStaging(run, destination, attempt);
        const loaded = await loadChunk(run, columns, staging, chunk); // extract, load, count
        const { inserted, updated } = await mergeStaging(run, staging); // upsert
        return { ...loaded, inserted, updated };
      });
      await advance(run, chunk, window.origin);
      reportChunk(run, chunk, done);
    }
    // 5. Report: etl.runs, the metrics and the last line are written by runPipeline, whether this succeeded or failed.
  });
});
