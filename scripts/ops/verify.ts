#!/usr/bin/env -S npx tsx
/**
 * verify: proves that source and destination hold the same rows. Every row of the source is loaded beside the table, and the destination's
 * engine compares the two. What is the next run's, or on its way, is no difference; a row of the future, which no run reads, is one.
 *
 *   make verify                            orders, users and sensors
 *   make verify PIPELINE=orders REPAIR=1   writes the source's rows over whatever the table has, by primary key and under the pipeline's
 *                                          lock, deletes what the source has not, and compares again
 *
 *   schedule         nightly, cron
 *   safe to re-run   yes, also after a kill in mid-repair
 *   exit code        1 where anything differs: prints keys and columns (LIMIT of each kind, no values), and the command that repairs it
 *
 * Touches: reads both sides; writes tables beside the target, which it drops; with REPAIR=1 the target. Pushes how much differs.
 */
import { flag, isSet, oneOf, optional, readEnv, UsageError } from "../../shared/env.ts";
import { main } from "../../shared/main.ts";
import { pipelines } from "../../shared/pipelines.ts";
import { type Run, takeLock } from "../../shared/run.ts";
import { kafkaVariables } from "../../shared/sensors/broker.ts";
import { clickhouseVariables } from "../../shared/sensors/clickhouse.ts";
import * as verify from "./lib/verify.ts";
import { compareReadings } from "./lib/verify-sensors.ts";

await main(import.meta, async () => {
  const PIPELINE = optional(oneOf([...pipelines(), "sensors"], " (of events: make verify-events FROM=… TO=…)"));
  const env = readEnv({ ...verify.verifyVariables, PIPELINE, REPAIR: optional(flag, false) });
  if (env.REPAIR && env.PIPELINE === "sensors")
    throw new UsageError("REPAIR=1 is not available for sensors: a change in Kafka could overwrite the repair. Next: make resnapshot");
  const captures = isSet("KAFKA_BROKERS") || env.PIPELINE === "sensors"; // a shop may have no sensors
  const sensors = captures && readEnv({ ...clickhouseVariables, ...kafkaVariables });
  const all = [...pipelines(), ...(sensors ? ["sensors"] : [])];
  await verify.eachPipeline("verify", env, all, async (run) => {
    const { pipeline } = run;
    const found = await (sensors && pipeline === "sensors" ? compareReadings(run, { ...env, ...sensors }) : verifyTable(run, env));
    const { rows, counts } = found;
    run.log("compared", { rows, ...counts, repaired: env.REPAIR ? run.totals.rows : undefined, seconds: run.seconds() });
    const differences = verify.total(found);
    const differing = verify.kinds.filter((kind) => kind !== "new" && counts[kind]).map((kind) => `${counts[kind]} ${kind}`);
    await verify.recordVerified(run, env.PUSHGATEWAY_URL, rows, differences, differing.join(", ") || null);
    if (differences) throw new Error(`${verify.describe(pipeline, found)}\nNext: ${nextOf(pipeline, found)}`);
  });
});

async function verifyTable(run: Run, env: verify.VerifyEnv & { REPAIR: boolean }): Promise<verify.Comparison> {
  // 1. With REPAIR=1 the lock: no run writes meanwhile.
  if (env.REPAIR) await takeLock(run);

  // 2. Compare; with REPAIR=1 repair, and compare again. What is twice is missing after the first time.
  const found = await verify.beside(run, env, env.REPAIR ? "repair" : "compare", async ({ compare, write }) => {
    let now = await compare();
    for (let writes = 0; env.REPAIR && writes < 2 && verify.total(now); writes++) {
      run.totals.rows += await write();
      now = await compare();
    }
    return now;
  });
  if (env.REPAIR || !found.counts.missing) return found;
  run.log("again", { because: "rows are missing, which a sweep or a repair beside this may have removed" });
  return await verify.beside(run, env, "compare", (both) => both.compare());
}

/** What to do. */
function nextOf(pipeline: string, found: verify.Comparison): string {
  const { extra, unreachable } = found.counts;
  const all = verify.total(found);
  if (pipeline === "sensors") return "make dead-letters (changes that were dead-lettered are missing), else make resnapshot";
  if (all === unreachable) return `make ${pipeline} (rows of the future are read by no run: the warning above says how to correct them)`;
  const sweep = all === extra ? `, or, for rows deleted at the source: make sweep PIPELINE=${pipeline}` : "";
  return `make verify PIPELINE=${pipeline} REPAIR=1${sweep}`;
}
