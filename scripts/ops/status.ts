#!/usr/bin/env -S npx tsx
/**
 * status: where each pipeline is. Reads schema etl, the source's open transactions, and, where they are configured, Kafka, Kafka
 * Connect, ClickHouse and the source's slot; a part that does not answer within 5 s is shown as such. It changes nothing.
 *
 *   make status          a table, with colours on a terminal (unless NO_COLOR is set)
 *   make status JSON=1   the same for programs, on stdout: one array with an object for each pipeline, each with every key of Status in
 *                        scripts/ops/lib/status.ts: pipeline, state, reasons, watermark, watermark_age_seconds, interval_seconds, last_success,
 *                        last_success_age_seconds, last_run, last_run_age_seconds, last_run_state, last_run_id, last_run_by_hand,
 *                        last_error, rows, lock, lock_since, held_by, hold_seconds, days, sensors; times in UTC, ages in seconds,
 *                        null where a pipeline has no such thing
 *
 *   state      red     stale by the rule of the alerts (two intervals), last run failed or abandoned, the watermark held for longer than
 *                      its alert allows or not to be trusted (the source restored, a clock set back), a part that does not answer,
 *                      sensors' lag or WAL over its alert, no connector, no slot, no consumer while there are messages
 *              warn    a shorter hold, a run by hand that failed or was abandoned, failed days, dead letters, no consumer of a
 *                      topic that is read to its end
 *              new     never ran, or not configured
 *   exit code  1 where a pipeline is red, else 0
 */
import { styleText } from "node:util";
import { flag, optional, readEnv } from "../../shared/env.ts";
import { thousands } from "../../shared/log.ts";
import { main } from "../../shared/main.ts";
import { pipelineVariables } from "../../shared/run.ts";
import { checkSession, connect } from "../../shared/session.ts";
import { duration, table } from "../../shared/table.ts";
import { readStatus, type Status } from "./lib/status.ts";

await main(import.meta, async () => {
  const { SOURCE_DATABASE_URL, ETL_DATABASE_URL, WATERMARK_LAG_SECONDS } = pipelineVariables;
  const env = readEnv({ SOURCE_DATABASE_URL, ETL_DATABASE_URL, WATERMARK_LAG_SECONDS, JSON: optional(flag, false) });
  const session = { application: "etl:status", timeoutSeconds: 4 };
  const quick = { connect_timeout: 4 };
  const etl = connect(env.ETL_DATABASE_URL, session, quick);
  const settings = { "etl.lag_seconds": String(env.WATERMARK_LAG_SECONDS) };
  const source = connect(env.SOURCE_DATABASE_URL, { ...session, settings }, quick);
  await checkSession("ETL_DATABASE_URL", etl);
  const all = await readStatus(etl, source);
  if (env.JSON) process.stdout.write(`${JSON.stringify(all, null, 2)}\n`);
  else print(all);
  process.exit(all.some(({ state }) => state === "red") ? 1 : 0); // a part that has not answered may still be waited for
});

function ago(seconds: number | null): string {
  return seconds === null ? "never" : `${duration(seconds)} ago`;
}

function print(all: Status[]): void {
  const colours = { ok: "green", new: "gray", warn: "yellow", red: "red" } as const;
  const rows = all.map((of) => ({
    pipeline: of.pipeline,
    watermark: of.watermark ?? "none",
    age: of.watermark_age_seconds === null ? "-" : duration(of.watermark_age_seconds),
    "last success": ago(of.last_success_age_seconds),
    every: of.interval_seconds === null ? "-" : duration(of.interval_seconds).replace(/ 0[hms]$/, ""),
    "last run": of.last_run_state ? `${of.last_run_state} ${ago(of.last_run_age_seconds)}` : "never",
    rows: of.rows === null ? "-" : thousands(of.rows),
    "lock held by": of.lock ?? "nobody",
    state: of.state,
  }));
  const [names = "", ...lines] = table(rows).split("\n");
  // styleText: on a terminal only, and not where NO_COLOR is set.
  const shown = lines.map((line, at) => styleText(colours[all[at]?.state ?? "ok"], line, { stream: process.stdout }));
  process.stdout.write(`${[names, ...shown].join("\n")}\n`);
  const below = all.flatMap((of) => details(of).map((line) => `${of.pipeline}: ${line}\n`));
  if (below.length) process.stdout.write(`\n${below.join("")}`);
}

/** Below the table: why a pipeline is not ok, its error, and what has no column. */
function details({ reasons, lock, lock_since, days, sensors }: Status): string[] {
  const lines = [...reasons];
  if (lock) lines.push(`its lock is held by ${lock} since ${lock_since}`);
  if (days)
    lines.push(
      `${thousands(days.archived)} days archived of ${days.first} to ${days.last}, ${days.failed} failed${days.at ? `, at ${days.at}` : ""}`,
    );
  if (sensors?.epoch) {
    const of = (value: number | null): string => (value === null ? "unknown" : thousands(value));
    const bytes = sensors.slot_retained_bytes;
    const wal = bytes === null ? "unknown" : `${thousands(bytes / 1e6)} MB`;
    lines.push(
      `lag ${of(sensors.lag)} · consumers ${of(sensors.consumers)} · dead letters ${of(sensors.dead_letters)} · ` +
        `WAL kept for the slot ${wal}`,
    );
  }
  return lines;
}
