#!/usr/bin/env -S npx tsx
/**
 * report: one page for the half hour a week: what needs a person, the state and the last 60 runs of each pipeline, the archive as a
 * calendar, the models, the proofs of make verify, and bytes billed by week. The file holds all it needs and asks nothing of any server.
 *
 *   make report OUT=/srv/www/etl.html     without OUT, report.html
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
import { checkSession, openSession } from "../../shared/session.ts";
import { readSelect } from "../../shared/source.ts";
import { type Block, html, Markup, render } from "./lib/html.ts";

await main(import.meta, async () => {
  const env = readEnv({ ETL_DATABASE_URL: required(postgresUrl), OUT: optional(text, "report.html") });
  // 1. The present, as make status says it; it exits with 1 where a pipeline is red.
  const status = spawnSync(process.execPath, [join(root, "scripts/ops/status.ts")], { env: { ...process.env, JSON: "1" } });
  if (!status.stdout.length) throw new Error(`make status failed: ${status.stderr}`);

  // 2. The past, of schema etl.
  const settings = { "etl.status": String(status.stdout), "etl.long_hold": String(readThreshold("etl_watermark_hold_seconds")) };
  await using etl = openSession(env.ETL_DATABASE_URL, { application: "etl:report", timeoutSeconds: 60, settings });
  await checkSession("ETL_DATABASE_URL", etl);
  const [row] = (await etl.unsafe(readSelect("report"))) as [{ report: (Block | Block[] | null)[] }];

  // 3. The page.
  const page = String(html`<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>ETL report</title><style>${new Markup(readFileSync(join(root, "ops/report.css"), "utf8"))}</style></head>
<body><h1>ETL report</h1>${(row.report.flat(3) as (Block | null)[]).flatMap((block) => (block ? render(block) : []))}</body></html>
`);
  const file = resolve(env.OUT);
  writeFileSync(`${file}.tmp`, page);
  renameSync(`${file}.tmp`, file);
  log({ step: "done", file, bytes: page.length });
});
