#!/usr/bin/env -S npx tsx
/**
 * verify: proves that source and destination hold the same rows. Every row of the source is loaded beside the table, as a run would load
 * it, and the destination's engine compares the two, column by column.
 *
 *   orders, users    Postgres and BigQuery. Rows at or past the watermark are the next run's; one whose updated_at lies in the future, so
 *                    that no run reads it, is a difference
 *   sensors          Postgres and ClickHouse: what differs is compared again once all messages are inserted, and is a difference if no
 *                    message has changed it meanwhile
 *   events           make verify-events
 *
 *   make verify                            all of them
 *   make verify PIPELINE=orders            one
 *   make verify PIPELINE=orders REPAIR=1   repairs what differs, by primary key, under the pipeline's lock: writes the source's rows over
 *                                          whatever the table has, deletes what the source has not, and compares again
 *
 *   schedule         weekly, cron
 *   safe to re-run   yes, also after a kill in mid-repair
 *   exit code        1 where anything differs: prints keys and columns (LIMIT of them), and the command that repairs it. No values:
 *                    they may be personal
 *
 * Touches: reads both sides; writes two tables beside the target, which it drops; with REPAIR=1 the target, and a row of etl.runs. Pushes
 * etl_verify_differences, and where there are none etl_verify_last_success_timestamp_seconds.
 */

import { flag, name, optional, readEnv, redact, UsageError } from "../../shared/env.ts";
import { log, thousands } from "../../shared/log.ts";
import { main, onSignal } from "../../shared/main.ts";
import { type Metrics, pushMetrics } from "../../shared/metrics.ts";
import { pipelines } from "../../shared/pipelines.ts";
import { type Run, runPipeline, takeLock } from "../../shared/run.ts";
import { kafkaVariables } from "../../shared/sensors/broker.ts";
import { clickhouseVariables } from "../../shared/sensors/clickhouse.ts";
import { table } from "../../shared/table.ts";
import { type Comparison, compareTable, distrusted, kinds, openTable, total, verifyVariables } from "./lib/verify.ts";
import { compareReadings } from "./lib/verify-sensors.ts";

type Verified = Comparison & { repaired?: number };
const verified = [...pipelines(), "sensors"];

await main(import.meta, async () => {
  // Without PIPELINE: all of them.
  const { PIPELINE: only } = readEnv({ PIPELINE: optional(name) });
  if (only === "events")
    throw new UsageError("PIPELINE=events: the archive has a command of its own: make verify-events FROM=… TO=…");
  if (only && !verified.includes(only))
    throw new UsageError(
      `PIPELINE=${only}: there is no such pipeline to verify; there are: ${verified.join(", ")}, and make verify-events`,
    );
  const env = readEnv({ ...verifyVariables, REPAIR: optional(flag, false) });
  if (env.REPAIR && only === "sensors")
    throw new UsageError(
      "REPAIR=1 is not available for sensors: a change still in Kafka could overwrite the repair. Next: make resnapshot",
    );
  const wanted = only ? [only] : verified;
  const sensors = wanted.includes("sensors") ? readEnv({ ...clickhouseVariables, ...kafkaVariables }) : undefined;

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
        run.next = `the same command begins again. Next: make verify PIPELINE=${pipeline}`;
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
    const differences = total(found);
    results.push({
      pipeline,
      rows: thousands(found.rows),
      new: thousands(found.fresh),
      ...Object.fromEntries(kinds.map((kind) => [kind, thousands(found?.counts[kind] ?? 0)])),
      repaired: found.repaired === undefined ? "-" : thousands(found.repaired),
      seconds: ((performance.now() - started) / 1000).toFixed(1),
    });
    ended?.log("compared", { rows: found.rows, differences });
    await push(pipeline, differences);
    if (differences) failures.push(describe(pipeline, found));
  }
  if (results.length) process.stdout.write(`${table(results)}\n`);
  if (failures.length) throw new Error(failures.join("\n"));

  async function verifyTable(run: Run): Promise<Verified> {
    // 1. With REPAIR=1 the lock: no run writes meanwhile.
    if (env.REPAIR) await takeLock(run);

    // 2. Is it still the source that was synced?
    const back = await distrusted(run);
    if (back && env.REPAIR) throw new UsageError(`nothing was repaired: ${back}`);
    if (back) run.log("warning", { warning: back });

    // 3. Compare; with REPAIR=1 repair, and compare again.
    const both = await openTable(run, env);
    const { repaired, ...found } = await compareTable(run, env, both, env.REPAIR);
    if (!env.REPAIR) return found;
    return repaired ? { ...(await compareTable(run, env, both)), repaired } : { ...found, repaired };
  }

  async function push(pipeline: string, differences: number): Promise<void> {
    const now = Date.now() / 1000;
    const values: Metrics = { etl_verify_differences: differences };
    if (!differences) values.etl_verify_last_success_timestamp_seconds = now;
    await pushMetrics(env.PUSHGATEWAY_URL, pipeline, values, { command: "verify" }).catch((error: Error) =>
      log({ pipeline, step: "warning", warning: "the metrics were not pushed", error: redact(error.message) }),
    );
  }

  /** What differs, and what to do. */
  function describe(pipeline: string, found: Comparison): string {
    const { counts, shown, newer } = found;
    const lines = shown.map(({ kind, name, columns, newer }) => {
      const what = kind === "different" ? `: ${columns.join(", ")}` : "";
      return `  ${kind.padEnd(11)}  ${name}${what}${newer ? "  (newer at the destination)" : ""}`;
    });
    const all = total(found);
    if (all > shown.length) lines.push(`  … and ${thousands(all - shown.length)} more (LIMIT=)`);
    if (newer)
      lines.push(
        `${thousands(newer)} are newer at the destination than anything of theirs at the source: was it restored ` +
          `from an older backup? ops/runbook.md, "After a restore, a failover or a clock set back"`,
      );
    if (counts.unreachable)
      lines.push(
        `${thousands(counts.unreachable)} have an updated_at in the future, and no run reads them. At the source ` +
          `run: update public.${pipeline} set updated_at = now() where updated_at > now(); then make ${pipeline}`,
      );
    const extra = all === counts.extra ? `, or, for rows deleted at the source: make sweep PIPELINE=${pipeline}` : "";
    const next = [
      all > counts.unreachable
        ? `make verify PIPELINE=${pipeline} REPAIR=1${extra}`
        : `make verify PIPELINE=${pipeline}`,
      "make dead-letters (changes that were parked are missing), else make resnapshot",
    ][pipeline === "sensors" ? 1 : 0];
    return `${pipeline}: ${thousands(all)} rows differ:\n${lines.join("\n")}\nNext: ${next}`;
  }
});
