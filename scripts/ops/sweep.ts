/**
 * sweep: removes from the destination the rows that were deleted at the source, which no cursor sees.
 *
 *   1. lock          the pipeline's: no run writes meanwhile
 *   2. find          reads key and updated_at of every row of the destination, and then, in chunks, which of the keys the source has
 *   3. refuse        more than SWEEP_MAX_SHARE of the rows without CONFIRM=1: a source that lost its rows, or another database
 *   4. delete        in chunks: asks the source once more, and deletes the row at the destination only while its updated_at is the one that was
 *                    read. A row that is inserted again comes with a later one
 *
 *   safe to re-run   yes, at any time, also after a kill. A row whose deletion has not been committed at the source stays; one that is
 *                    inserted again, and is not committed yet, is brought by the run after it
 *
 *   make sweep PIPELINE=orders
 *   make sweep PIPELINE=orders DRY_RUN=1      says what it would delete
 *   make sweep PIPELINE=orders CONFIRM=1      however many
 *
 * Touches: reads the source; deletes from the target; writes a row of etl.runs.
 */

import { readKeys } from "../../shared/bigquery/load.ts";
import { readEnv, UsageError } from "../../shared/env.ts";
import { progress, thousands } from "../../shared/log.ts";
import { main } from "../../shared/main.ts";
import { pipelines } from "../../shared/pipelines.ts";
import { runPipeline, takeLock } from "../../shared/run.ts";
import { bigqueryVersions } from "./lib/checksum.ts";
import { deleteGone, openTable, sourceWentBack, type Version, verifyVariables } from "./lib/verify.ts";

const CHUNK_KEYS = 20_000;

await main(import.meta, async () => {
  const env = readEnv("PIPELINE", ...verifyVariables, "DRY_RUN", "CONFIRM", "SWEEP_MAX_SHARE");
  const { PIPELINE: pipeline } = env;
  if (pipeline === "sensors" || pipeline === "events")
    throw new UsageError(
      `PIPELINE=${pipeline}: nothing is to be swept there: ${pipeline === "sensors" ? "deletions of readings come by the log" : "events are never deleted at the source, or only once they are archived"}.`,
    );
  if (!pipelines().includes(pipeline))
    throw new UsageError(`PIPELINE=${pipeline}: there is no such pipeline; there are: ${pipelines().join(", ")}`);
  // By hand: it says nothing of the pipeline's schedule, and waits for its lock.
  await runPipeline(pipeline, { ...env, DRY_RUN: true }, async (run) => {
    run.next = `the same command goes on. Next: make sweep PIPELINE=${pipeline}`;
    // 1. Lock.
    if (!env.DRY_RUN) await takeLock(run);
    const back = await sourceWentBack(run);
    if (back) throw new UsageError(`nothing was deleted: ${back}`);

    // 2. Find. The destination is read before the source: a row that arrives in between is in neither reading, or in the source's.
    const table = await openTable(run, env);
    const gone: Version[] = [];
    let [rows, chunk] = [0, [] as Version[]];
    const look = async (): Promise<void> => {
      const present = await table.source.present(chunk);
      gone.push(...chunk.filter(({ key }) => !present.has(key)));
      rows += chunk.length;
      chunk = [];
      progress(`${pipeline}: ${thousands(rows)} keys compared, ${thousands(gone.length)} are not at the source`);
    };
    for await (const row of readKeys<Version>(run, table.to, bigqueryVersions(table.layout))) {
      chunk.push(row);
      if (chunk.length === CHUNK_KEYS) await look();
    }
    await look();
    progress("");
    const keys = gone.slice(0, env.LIMIT).map(({ range }) => range);
    run.log(env.DRY_RUN ? "would-delete" : "found", {
      rows,
      gone: gone.length,
      keys: keys.length ? keys.join() : undefined,
    });

    // 3. Refuse.
    if (gone.length > env.SWEEP_MAX_SHARE * rows && !env.CONFIRM)
      throw new UsageError(
        `nothing was deleted: ${thousands(gone.length)} of ${thousands(rows)} rows of ${pipeline} are not at the source, more than SWEEP_MAX_SHARE=${env.SWEEP_MAX_SHARE} of them. Is SOURCE_DATABASE_URL the right database, and whole? If they are to go: make sweep PIPELINE=${pipeline} CONFIRM=1`,
      );

    // 4. Delete.
    if (env.DRY_RUN) return;
    const deleted = await deleteGone(run, table, gone);
    run.totals.rows = deleted;
    run.log("swept", { deleted, kept: gone.length - deleted });
  });
});
