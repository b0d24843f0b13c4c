#!/usr/bin/env -S npx tsx
/**
 * report: one page for the half hour a week: what needs a person, the state and the last 60 runs of each pipeline, the archive as a
 * calendar, the models, the proofs of make verify, and bytes billed by week. The file holds all it needs and asks nothing of any server.
 *
 *   make report OUT=/srv/www/etl.html     without OUT, report.html
 *
 *   schedule         weekly, cron
 *   safe to re-run   yes: it only reads, and replaces the page by a rename
 */
import { spawnSync } from "node:child_process";
import { readFileSync, renameSync, writeFileSync } from "node:fs";
import { join, resolve } from "node:path";
import { readThreshold } from "../../shared/alerts.ts";
import { optional, postgresUrl, readEnv, required, root, text } from "../../shared/env.ts";
import { log } from "../../shared/log.ts";
import { main } from "../../shared/main.ts";
import { checkSession, openSession, queryFile } from "../../shared/session.ts";

type Row = (string | number | null)[];
/** A run, a day or a label: told apart by shape. */
type Cell = { column: number; row: number; kind: "done" | "failed" | "gone" | "label"; share: number; title: string };

/** What sql/report.sql returns; it says what each is. */
type Block = { kind: string; text: string; look?: string; names?: string[]; rows?: Row[] | null; cells?: Cell[] | null };

await main(import.meta, async () => {
  const env = readEnv({ ETL_DATABASE_URL: required(postgresUrl), OUT: optional(text, "report.html") });
  // 1. The present, as make status says it; it exits with 1 where a pipeline is red.
  const status = spawnSync(process.execPath, [join(root, "scripts/ops/status.ts")], { env: { ...process.env, JSON: "1" } });
  if (!status.stdout.length) throw new Error(`make status failed: ${status.stderr}`);

  // 2. The past, of schema etl.
  const settings = { "etl.status": String(status.stdout), "etl.long_hold": String(readThreshold("etl_watermark_hold_seconds")) };
  await using etl = openSession(env.ETL_DATABASE_URL, { application: "etl:report", timeoutSeconds: 60, settings });
  await checkSession("ETL_DATABASE_URL", etl);
  const [row] = (await queryFile(etl, "report", {})) as [{ report: string }];
  const blocks: (Block | null)[] = JSON.parse(row.report, asText).flat(3);

  // 3. The page.
  const page = `<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>ETL report</title><style>${readFileSync(join(root, "ops/report.css"), "utf8")}</style></head>
<body><h1>ETL report</h1>${blocks.map((block) => (block ? render(block) : "")).join("\n")}</body></html>
`;
  const file = resolve(env.OUT);
  writeFileSync(`${file}.tmp`, page);
  renameSync(`${file}.tmp`, file);
  log({ step: "done", file, bytes: page.length });
});

/** Of the values of the JSON: what an error says, for example, is text, and cannot turn the direction of what follows. */
function asText(_: string, value: unknown): unknown {
  if (typeof value !== "string") return value;
  const seen = value.replaceAll(/[^\P{Cc}\n]|[\u202a-\u202e\u2066-\u2069]/gu, "?");
  return seen.replaceAll(/[&<>"'`]/g, (sign) => `&#${sign.charCodeAt(0)};`);
}

/** A block, whose texts are escaped. */
function render({ kind, text, look = "", names = [], rows, cells }: Block): string {
  if (rows === null || cells === null) return ""; // nothing ran yet
  if (rows) {
    const cell = (value: string | number | null): string =>
      typeof value === "number" ? `<td class="number">${value.toLocaleString("en-US")}</td>` : `<td>${value ?? ""}</td>`;
    const lines = [names.map((name) => `<th>${name}</th>`), ...rows.map((row) => row.map(cell))];
    const table = `<div class="scroll"><table>${lines.map((line) => `<tr>${line.join("")}</tr>`).join("")}</table></div>`;
    return text ? `<details><summary>${text}</summary>${table}</details>` : table;
  }
  if (cells) {
    // Bars, whose heights are their shares; or a calendar of squares, whose shades are.
    const drawn = cells.map(({ column, row, kind, share, title }) => {
      const place = `grid-area: ${row} / ${column}; --share: ${share}`;
      return kind === "label" ? `<b style="${place}">${title}</b>` : `<i class="${kind}" style="${place}" title="${title}"></i>`;
    });
    return `<figure class="scroll"><div class="${kind}" role="img" aria-label="${text}">${drawn.join("")}</div>
<figcaption>${text}</figcaption></figure>`;
  }
  return `<${kind} class="${look}">${text}</${kind}>`;
}
