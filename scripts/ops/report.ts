#!/usr/bin/env -S npx tsx
/**
 * report: one page for the half hour a week: what needs a person, the state and the last 60 runs of each pipeline, the archive as a
 * calendar, the models, the proofs of make verify, and bytes billed by week. The file holds all it needs and asks nothing of any server.
 *
 *   make report                    writes report.html
 *   make report OUT=/srv/www/etl.html
 *
 *   schedule         weekly, cron
 *   safe to re-run   yes: the page is replaced at once, by a rename
 *
 * Touches: reads what make status reads, and schema etl (sql/report.sql); writes OUT.
 */
import { spawnSync } from "node:child_process";
import { readFileSync, renameSync, writeFileSync } from "node:fs";
import { join, resolve } from "node:path";
import { readThreshold } from "../../shared/alerts.ts";
import { optional, postgresUrl, readEnv, required, root, text } from "../../shared/env.ts";
import { log } from "../../shared/log.ts";
import { main } from "../../shared/main.ts";
import { checkSession, connect } from "../../shared/session.ts";
import { type Past, renderReport } from "./lib/report.ts";
import type { Status } from "./lib/status.ts";

await main(import.meta, async () => {
  const env = readEnv({ ETL_DATABASE_URL: required(postgresUrl), OUT: optional(text, "report.html") });
  // 1. The past, of schema etl.
  await using etl = connect(env.ETL_DATABASE_URL, { application: "etl:report", timeoutSeconds: 60 });
  await checkSession("ETL_DATABASE_URL", etl);
  const [row] = await etl.unsafe<{ report: Past }[]>(readFileSync(join(root, "sql/report.sql"), "utf8"));

  // 2. The present, as make status says it; it exits with 1 where a pipeline is red.
  const status = spawnSync(process.execPath, [join(root, "scripts/ops/status.ts")], {
    env: { ...process.env, JSON: "1" },
  });
  if (!status.stdout.length) throw new Error(`make status failed: ${status.stderr}`);
  const now: Status[] = JSON.parse(String(status.stdout));

  // 3. The page.
  const [css, file] = [readFileSync(join(root, "ops/report.css"), "utf8"), resolve(env.OUT)];
  const page = renderReport(row?.report as Past, now, css, readThreshold("etl_watermark_hold_seconds"));
  writeFileSync(`${file}.tmp`, page);
  renameSync(`${file}.tmp`, file);
  log({ step: "done", file, bytes: page.length });
});
