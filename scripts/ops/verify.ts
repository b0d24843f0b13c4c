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
 *   schedule         nightly, cron
 *   safe to re-run   yes, also after a kill in mid-repair
 *   exit code        1 where anything differs: prints keys and columns (LIMIT of them), and the command that repairs it. No values:
 *                    they may be personal
 *
 * Touches: reads both sides; writes two tables beside the target, which it drops; with REPAIR=1 the target, and a row of etl.runs. Pushes
 * etl_verify_differences, and where there are none etl_verify_last_success_timestamp_seconds.
 */
import { readContract } from "../../shared/bigquery/contract.ts";
import { flag, oneOf, optional, readEnv, UsageError } from "../../shared/env.ts";
import { thousands } from "../../shared/log.ts";
import { main } from "../../shared/main.ts";
import { pipelines } from "../../shared/pipelines.ts";
import { type Run, runPipeline, takeLock } from "../../shared/run.ts";
import { kafkaVariables } from "../../shared/sensors/broker.ts";
import { clickhouseVariables } from "../../shared/sensors/clickhouse.ts";
import { correction } from "../../shared/source.ts";
import { table } from "../../shared/table.ts";
import { recordVerified } from "./lib/verified.ts";
import { beside, type Comparison, distrusted, eachPipeline, kinds, total, type VerifyEnv, verifyVariables } from "./lib/verify.ts";
import { compareReadings } from "./lib/verify-sensors.ts";

type Verified = Comparison & { repaired?: number };
const verified = [...pipelines(), "sensors"];

await main(import.meta, async () => {
  const PIPELINE = optional(oneOf(verified, " (of events: make verify-events FROM=… TO=…)"));
  const env = readEnv({ ...verifyVariables, PIPELINE, REPAIR: optional(flag, false) });
  const { PIPELINE: only, REPAIR: repairs } = env;
  if (repairs && only === "sensors")
    throw new UsageError(
      "REPAIR=1 is not available for sensors: a change still in Kafka could overwrite the repair. Next: make resnapshot",
    );
  const sensors = (only ?? "sensors") === "sensors" && readEnv({ ...clickhouseVariables, ...kafkaVariables });
  const results: Record<string, string>[] = [];
  const verifying = eachPipeline("verify", only ? [only] : verified, async (pipeline) => {
    let wrong: string | undefined;
    // By hand: it says nothing of the pipeline's schedule, and waits for its lock.
    const comparing = runPipeline(pipeline, { ...env, DRY_RUN: true }, async (run) => {
      run.next = `the same command begins again. Next: make verify PIPELINE=${pipeline}`;
      const ofSensors = sensors && pipeline === "sensors" && compareReadings(run, { ...env, ...sensors });
      const found: Verified = await (ofSensors || verifyTable(run, env));
      const { rows, counts } = found;
      const differences = total(found);
      if (differences) wrong = describe(pipeline, found, env.LIMIT);
      results.push({ pipeline, ...columnsOf(found), seconds: run.seconds().toFixed(1) });
      run.log("compared", { rows, differences });
      const differing = kinds.filter((kind) => counts[kind]).map((kind) => `${counts[kind]} ${kind}`);
      await recordVerified(run, env.PUSHGATEWAY_URL, rows, differences, differing.join(", ") || null);
    });
    await comparing.catch((error: Error) => {
      if (!wrong) throw error;
      wrong = `${pipeline}: ${error.message}\n${wrong}`; // stopped after it was compared
    });
    return wrong;
  });
  await verifying.finally(() => results.length && process.stdout.write(`${table(results)}\n`));
});

async function verifyTable(run: Run, env: VerifyEnv & { REPAIR: boolean }): Promise<Verified> {
  // 1. With REPAIR=1 the lock: no run writes meanwhile.
  if (env.REPAIR) await takeLock(run);

  // 2. Is it still the source that was synced?
  const reason = await distrusted(run);
  if (reason && env.REPAIR) throw new UsageError(`nothing was repaired: ${reason}`);
  if (reason) run.log("warning", { warning: reason });

  // 3. Compare; with REPAIR=1 repair, and compare again.
  const found = await beside(run, env, "all", async ({ compare, repair }): Promise<Verified> => {
    const first = await compare();
    if (!env.REPAIR) return first;
    const repaired = total(first) ? await repair() : 0;
    run.totals.rows += repaired;
    return { ...(repaired ? await compare() : first), repaired };
  });
  if (env.REPAIR || !found.counts.missing) return found;
  run.log("again", { because: "rows are missing, which a sweep or a repair beside this may have removed" });
  return await beside(run, env, "all", (both) => both.compare());
}

/** What the printed table says of it. */
function columnsOf(found: Verified): Record<string, string> {
  return {
    rows: thousands(found.rows),
    new: thousands(found.fresh),
    ...Object.fromEntries(kinds.map((kind) => [kind, thousands(found.counts[kind])])),
    repaired: found.repaired === undefined ? "-" : thousands(found.repaired),
  };
}

/** What differs, and what to do. */
function describe(pipeline: string, found: Comparison, limit: number): string {
  const { counts } = found;
  const all = total(found);
  const lines = found.shown.slice(0, limit).map(({ kind, name, columns, newer }) => {
    const what = kind === "different" ? `: ${columns.join(", ")}` : "";
    return `  ${kind.padEnd(11)}  ${name}${what}${newer ? "  (newer at the destination)" : ""}`;
  });
  if (all > lines.length) lines.push(`  … and ${thousands(all - lines.length)} more (LIMIT=)`);
  if (found.shown.some(({ newer }) => newer))
    lines.push(
      "Newer than anything at the source: was it restored from an older backup? " +
        'ops/runbook.md, "After a restore, a failover or a clock set back"',
    );
  if (counts.unreachable)
    lines.push(
      `${thousands(counts.unreachable)} have a time in the future, and no run reads them. At the source ` +
        `run: ${correction(readContract(pipeline).source)} > now(); then make ${pipeline}`,
    );
  let next = `make verify PIPELINE=${pipeline}${all > counts.unreachable ? " REPAIR=1" : ""}`;
  if (all === counts.extra) next += `, or, for rows deleted at the source: make sweep PIPELINE=${pipeline}`;
  if (pipeline === "sensors") next = "make dead-letters (changes that were dead-lettered are missing), else make resnapshot";
  return `${pipeline}: ${thousands(all)} rows differ:\n${lines.join("\n")}\nNext: ${next}`;
}
