/**
 * verify: proves that source and destination hold the same rows. Counts and checksums by ranges of the primary key, computed inside
 * each engine; then, only in the ranges that differ, row by row.
 *
 *   orders, users    Postgres and BigQuery. Keys that changed at the source since the watermark are left out on both sides; begins again
 *                    where the watermark moved meanwhile
 *   sensors          Postgres and ClickHouse: readings that were recorded more than ten minutes ago; where some differ, once more when
 *                    all messages are inserted
 *   events           make verify-events
 *
 *   make verify                            all of them
 *   make verify PIPELINE=orders            one
 *   make verify PIPELINE=orders REPAIR=1   mends what differs, by primary key, under the pipeline's lock: reads those rows again, writes
 *                                          them over whatever is there, deletes what the source has not
 *
 *   schedule         weekly, cron
 *   safe to re-run   yes, also after a kill in mid-repair
 *   exit code        1 where anything differs: prints keys and columns (LIMIT of them), and the command that mends it. No values:
 *                    they may be personal
 *
 * Touches: reads both sides; with REPAIR=1 writes the target and a staging table beside it, and a row of etl.runs. Pushes
 * etl_verify_differences, and where there are none etl_verify_last_success_timestamp_seconds.
 */

import { clickhouse, kafka, readEnv, redact, UsageError } from "../../shared/env.ts";
import { log, table, thousands } from "../../shared/log.ts";
import { main, onSignal } from "../../shared/main.ts";
import { pushMetrics } from "../../shared/metrics.ts";
import { pipelines } from "../../shared/pipelines.ts";
import { type Run, runPipeline, takeLock } from "../../shared/run.ts";
import { type Comparison, compareTable, openTable, repair, sourceWentBack, verifyVariables } from "./lib/verify.ts";
import { compareReadings } from "./lib/verify-sensors.ts";

type Verified = Comparison & { mended?: number };
const verified = [...pipelines(), "sensors"];

await main(import.meta, async () => {
  // Without PIPELINE: all of them.
  const { PIPELINE: only } = process.env.PIPELINE ? readEnv("PIPELINE") : {};
  if (only === "events")
    throw new UsageError("PIPELINE=events: the archive has a command of its own: make verify-events FROM=… TO=…");
  if (only && !verified.includes(only))
    throw new UsageError(
      `PIPELINE=${only}: there is no such pipeline to verify; there are: ${verified.join(", ")}, and make verify-events`,
    );
  const env = readEnv(...verifyVariables, "REPAIR");
  if (env.REPAIR && only === "sensors")
    throw new UsageError(
      "REPAIR=1: readings are not mended by key, since a change that is on its way would lose to it, or win. Next: make resnapshot",
    );
  const wanted = only ? [only] : verified;
  const sensors = wanted.includes("sensors") ? readEnv(...clickhouse, ...kafka) : undefined;

  const results: Record<string, string | number>[] = [];
  const failures: string[] = [];
  let stoppedBy: string | undefined; // a run hears of a signal until it has ended; its push comes after
  onSignal((signal) => {
    stoppedBy = signal;
  });
  for (const pipeline of wanted) {
    if (stoppedBy) {
      failures.push(`stopped by ${stoppedBy}: ${pipeline} was not begun. Next: make verify`);
      break;
    }
    const started = performance.now();
    let found: Verified | undefined;
    let ended: Run | undefined;
    try {
      // By hand: it says nothing of the pipeline's schedule, and waits for its lock.
      await runPipeline(pipeline, { ...env, DRY_RUN: true }, async (run) => {
        ended = run;
        run.next = `the same command begins anew. Next: make verify PIPELINE=${pipeline}`;
        found =
          sensors && pipeline === "sensors"
            ? await compareReadings(run, { ...env, ...sensors })
            : await verifyTable(run);
      });
    } catch (error) {
      if (only) throw error;
      failures.push(`${pipeline} was not verified: ${(error as Error).message}`);
      continue;
    }
    if (!found) continue;
    const { rows, ranges, differing, differences, leftOut, mended } = found;
    const count = (kind: string): number => differences.filter((one) => one.kind === kind).length;
    results.push({
      pipeline,
      rows: thousands(rows),
      "left out": thousands(leftOut),
      ranges,
      differing,
      missing: thousands(count("missing")),
      extra: thousands(count("extra")),
      different: thousands(count("different")),
      twice: thousands(new Set(differences.flatMap(({ kind, key }) => (kind === "twice" ? [key] : []))).size),
      mended: env.REPAIR && mended !== undefined ? thousands(mended) : "-",
      seconds: ((performance.now() - started) / 1000).toFixed(1),
    });
    ended?.log("compared", { rows, differences: differences.length });
    await push(pipeline, differences.length);
    if (differences.length) failures.push(describe(pipeline, found));
  }
  if (results.length) process.stdout.write(`${table(results)}\n`);
  if (failures.length) throw new Error(failures.join("\n"));

  async function verifyTable(run: Run): Promise<Verified> {
    // 1. With REPAIR=1 the lock: no run writes meanwhile.
    if (env.REPAIR) await takeLock(run);

    // 2. Is it still the source that was synced?
    const back = await sourceWentBack(run);
    if (back && env.REPAIR) throw new UsageError(`nothing was mended: ${back}`);
    if (back) run.log("warning", { warning: back });

    // 3. Compare.
    const both = await openTable(run, env);
    if (both.layout.unread.length)
      run.log("warning", {
        warning: "of JSON only is compared whether it is NULL",
        columns: both.layout.unread.join(),
      });
    const before = await compareTable(run, both);
    if (!env.REPAIR || !before.differences.length) return before;

    // 4. Mend, and compare again.
    const { written, deleted } = await repair(run, env, both, before.differences);
    return { ...(await compareTable(run, both)), mended: written + deleted };
  }

  async function push(pipeline: string, differences: number): Promise<void> {
    const now = Date.now() / 1000;
    const success = differences ? {} : { etl_verify_last_success_timestamp_seconds: now };
    const values = { etl_verify_differences: differences, ...success };
    await pushMetrics(env.PUSHGATEWAY_URL, pipeline, values, { command: "verify" }).catch((error: Error) =>
      log({ pipeline, step: "warning", warning: "the metrics were not pushed", error: redact(error.message) }),
    );
  }

  /** What differs, and what to do. */
  function describe(pipeline: string, { differences }: Comparison): string {
    const lines = differences.map(({ kind, name, columns, newer }) => {
      const what = kind === "different" ? `: ${columns.join(", ")}` : "";
      return `  ${kind.padEnd(9)}  ${name}${what}${newer ? "  (newer at the destination)" : ""}`;
    });
    const all = [...new Set(lines)];
    const shown = all.slice(0, env.LIMIT);
    if (all.length > env.LIMIT) shown.push(`  … and ${thousands(all.length - env.LIMIT)} more (LIMIT=)`);
    const newer = differences.filter((one) => one.newer).length;
    const restored = newer
      ? `\n${thousands(newer)} are newer at the destination than anything of theirs at the source: was it restored from an older backup? ops/runbook.md, "After a restore, a failover or a clock set back"`
      : "";
    const extra =
      differences.every(({ kind }) => kind === "extra") && pipeline !== "sensors"
        ? `, or, for rows deleted at the source: make sweep PIPELINE=${pipeline}`
        : "";
    const next =
      pipeline === "sensors"
        ? "make dead-letters (changes that were parked are missing), else make resnapshot"
        : `make verify PIPELINE=${pipeline} REPAIR=1${extra}`;
    return `${pipeline}: ${thousands(all.length)} rows differ:\n${shown.join("\n")}${restored}\nNext: ${next}`;
  }
});
