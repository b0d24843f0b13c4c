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
import { type Cell, chart, html, Markup, table } from "./lib/html.ts";

type Row = (string | number | null)[];
type Chart = { label: string; cells: Cell[] };
type Pipeline = Partial<Chart> & { name: string; state: string; reasons: string[]; facts: string; runs: Row[] };

/** The document of sql/report.sql; a part that has nothing is null. */
type Report = { at: string; pipelines: Pipeline[]; archive: string | null; years: Chart[] | null } & Tables;
type Tables = Record<"now" | "week" | "models" | "proofs" | "billed", Row[] | null>;

await main(import.meta, async () => {
  const env = readEnv({ ETL_DATABASE_URL: required(postgresUrl), OUT: optional(text, "report.html") });
  // 1. The present, as make status says it; it exits with 1 where a pipeline is red.
  const status = spawnSync(process.execPath, [join(root, "scripts/ops/status.ts")], { env: { ...process.env, JSON: "1" } });
  if (!status.stdout.length) throw new Error(`make status failed: ${status.stderr}`);

  // 2. The past, of schema etl.
  const settings = { "etl.status": String(status.stdout), "etl.long_hold": String(readThreshold("etl_watermark_hold_seconds")) };
  await using etl = openSession(env.ETL_DATABASE_URL, { application: "etl:report", timeoutSeconds: 60, settings });
  await checkSession("ETL_DATABASE_URL", etl);
  const [row] = (await etl.unsafe(readSelect("report"))) as [{ report: Report }];

  // 3. The page.
  const page = String(render(row.report, readFileSync(join(root, "ops/report.css"), "utf8")));
  const file = resolve(env.OUT);
  writeFileSync(`${file}.tmp`, page);
  renameSync(`${file}.tmp`, file);
  log({ step: "done", file, bytes: page.length });
});

function list(rows: Row[] | null): Markup {
  if (!rows) return html`<p>Nothing.</p>`;
  return html`<ul>${rows.map(([of, what]) => html`<li><strong>${of}</strong>: ${what}</li>`)}</ul>`;
}

function render({ at, now, week, pipelines, archive, years, models, proofs, billed }: Report, css: string): Markup {
  const meters = billed?.map(([of, words, share]) => [of, words, html`<meter value="${share}"></meter>`]) ?? [];
  return html`<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>ETL report, ${at}</title><style>${new Markup(css)}</style></head>
<body><h1>ETL report</h1><p class="soft">${at} UTC, by make report. All times are UTC.</p>
<h2>Needs a person</h2><h3>Now</h3>${list(now)}<h3>In the last seven days</h3>${list(week)}
<h2>Pipelines</h2>${pipelines.map(renderPipeline)}
<h2>Archive of events</h2><p>${archive ?? "None yet. Next: make events"}</p>
${years?.map(({ label, cells }) => chart(label, cells, "calendar"))}
<p class="soft">The stronger the colour, the more rows. A cross failed; dashes: missing, or being archived.</p>
<h2>Models</h2>${table(["model", "rows", "checks", "last published", "rows, run by run", "why it was not published"], models, "make views")}
<h2>Proof that source and destination agree</h2>
${table(["pipeline", "verified", "rows compared", "differences", "found"], proofs, "make verify")}
<h2>Bytes billed by BigQuery</h2>${table(["", "billed", ""], meters)}
</body></html>
`;
}

function renderPipeline({ name, state, facts, reasons, label = "", cells, runs }: Pipeline): Markup {
  const words = `${label}. Height: rows, logarithmic. A cross failed; dashes: abandoned (killed), or still running.`;
  const names = ["at", "state", "rows", "took", "billed", "watermark held", "error"];
  const past = html`<details><summary>The runs as text</summary>${table(names, runs)}</details>`;
  return html`<article><h3>${name} <span class="${state}">${state}</span></h3><p>${facts}</p>
    ${reasons.map((reason) => html`<p class="${state}">${reason}</p>`)}${cells && [chart(words, cells, "bars"), past]}</article>`;
}
