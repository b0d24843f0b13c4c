/** The page of make report, from what sql/report.sql and make status say. Times are in UTC. */
import { thousands } from "../../../shared/log.ts";
import { duration } from "../../../shared/table.ts";
import { bars, type Cell, calendar, html, htmlTable, Markup, sparkline } from "./html.ts";
import type { Status } from "./status.ts";

interface PastRun {
  pipeline: string;
  run: string;
  /** Also abandoned: it says running, and nobody holds its lock. */
  state: string;
  by_hand: boolean;
  rows: number;
  bytes_billed: number;
  hold_seconds: number;
  error: string | null;
  /** Of the last seven days. */
  recent: boolean;
  at: string;
  seconds: number | null;
}

/** The document of sql/report.sql. */
export interface Past {
  at: string;
  runs: PastRun[];
  days: { day: string; next: string; rows: number; state: string; error: string | null }[];
  models: {
    model: string;
    rows: number;
    checks: number;
    error: string | null;
    published: string | null;
    history: number[] | null;
  }[];
  verified: { pipeline: string; rows: number; differences: number; found: string | null; at: string; age: number }[];
  billed: { week: string; bytes: number }[];
}

const megabytes = (bytes: number): string => `${thousands(bytes / 1e6)} MB`;
const firstLine = (text: string | null): string => text?.split("\n")[0] ?? "";
const kinds: Record<string, Cell["kind"]> = { failed: "failed", abandoned: "gone", running: "gone", missing: "gone" };

/** @param longHold from how many seconds on a held watermark is an alert. */
export function renderReport(past: Past, now: Status[], css: string, longHold: number): string {
  const holders = now.map(({ lock }) => lock);
  for (const run of past.runs) if (run.state === "running" && !holders.includes(run.run)) run.state = "abandoned";
  const runsOf = (status: Status): PastRun[] => past.runs.filter(({ pipeline }) => pipeline === status.pipeline);
  return html`<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>ETL report, ${past.at}</title><style>${new Markup(css)}</style></head>
<body><h1>ETL report</h1><p class="soft">${past.at} UTC, by make report. All times are UTC.</p>
<h2>Needs a person</h2>${attention(past, now, longHold)}
<h2>Pipelines</h2>${now.map((status) => pipelineOf(status, runsOf(status)))}
${archive(past.days)}
<h2>Models</h2>${models(past.models)}
<h2>Proof that source and destination agree</h2>${proofs(past.verified)}
<h2>Bytes billed by BigQuery</h2>${costs(past.billed)}
</body></html>
`.text;
}

/** What is wrong now, and what went wrong in the last seven days. */
function attention({ runs, days, models, verified }: Past, now: Status[], longHold: number): Markup {
  const current: string[][] = now
    .filter(({ state }) => state !== "ok")
    .flatMap(({ pipeline, reasons }) => reasons.map((reason) => [pipeline, reason]));
  for (const { model, error } of models)
    if (error) current.push([`model ${model}`, `was not published: ${firstLine(error)}`]);
  for (const { day, next, error } of days.filter(({ state }) => state === "failed"))
    current.push([`archive of ${day}`, `${firstLine(error)}. Next: make backfill-events FROM=${day} TO=${next}`]);
  for (const { pipeline, differences, found, age } of verified) {
    const again = pipeline === "events" ? "make verify-events" : `make verify PIPELINE=${pipeline}`;
    if (differences) current.push([pipeline, `differs from its source: ${found}. Next: ${again}`]);
    if (age > 604_800) current.push([pipeline, `was last verified ${duration(age)} ago. Next: ${again}`]);
  }
  const week: string[][] = [];
  const happened = (what: string, has: (run: PastRun) => boolean, detail: (run: PastRun) => string): void => {
    for (const { pipeline } of now) {
      const recent = runs.filter((run) => run.pipeline === pipeline && run.recent);
      const last = recent.findLast(has);
      const count = `${recent.filter(has).length} of ${recent.length} runs`;
      if (last) week.push([pipeline, `${count} ${what}, last at ${last.at}: ${detail(last)}`]);
    }
  };
  happened(
    "failed",
    ({ state }) => state === "failed",
    ({ error }) => firstLine(error),
  );
  happened(
    "were killed",
    ({ state }) => state === "abandoned",
    ({ run }) => `${run} never recorded its end`,
  );
  const isLong = ({ hold_seconds }: PastRun): boolean => hold_seconds > longHold;
  happened(
    "found the watermark held",
    isLong,
    ({ hold_seconds }) => `an open transaction of ${duration(hold_seconds)}`,
  );
  const list = (rows: string[][]): Markup =>
    rows.length
      ? html`<ul>${rows.map(([of, what]) => html`<li><strong>${of}</strong>: ${what}</li>`)}</ul>`
      : html`<p>Nothing.</p>`;
  return html`<h3>Now</h3>${list(current)}<h3>In the last seven days</h3>${list(week)}`;
}

function pipelineOf(status: Status, runs: PastRun[]): Markup {
  const {
    pipeline,
    state,
    reasons,
    watermark,
    last_success,
    last_success_age_seconds: age,
    interval_seconds,
    sensors,
  } = status;
  const facts = [
    age === null ? "never succeeded" : `last success ${last_success}, ${duration(age)} ago`,
    status.rows !== null && `${thousands(status.rows)} rows in it`,
    watermark && `watermark ${watermark}`,
    interval_seconds && `expected every ${duration(interval_seconds)}`,
    sensors && `lag ${sensors.lag ?? "unknown"}, dead letters ${sensors.dead_letters ?? "unknown"}`,
  ].filter(Boolean);
  return html`<article><h3>${pipeline} <span class="${state}">${state}</span></h3><p>${facts.join(" · ")}</p>
    ${reasons.map((reason) => html`<p class="${state}">${reason}</p>`)}${runs.length ? pastRuns(pipeline, runs) : ""}</article>`;
}

/** The runs as bars and as text. The height is logarithmic: the first run must not hide the others. */
function pastRuns(pipeline: string, runs: PastRun[]): Markup {
  const rows = runs.map(({ at, state, by_hand, rows, seconds, bytes_billed, hold_seconds, error }) => [
    at,
    by_hand ? `${state}, by hand` : state,
    rows,
    seconds === null ? "no end" : `${seconds.toFixed(1)} s`,
    bytes_billed ? megabytes(bytes_billed) : "",
    hold_seconds ? duration(hold_seconds) : "",
    error,
  ]);
  const most = Math.max(1, ...runs.map(({ rows }) => rows));
  const cells = runs.map(({ state, rows: count, error }, at): Cell => {
    const title = `${rows[at]?.slice(0, 2).join(" ")}, ${thousands(count)} rows, ${rows[at]?.[3]} ${firstLine(error)}`;
    return { title, kind: kinds[state] ?? "done", share: Math.log1p(count) / Math.log1p(most) };
  });
  const counts = Object.entries(Object.groupBy(runs, ({ state }) => state)).map(
    ([state, some]) => `${some?.length} ${state}`,
  );
  const label = `The last ${runs.length} runs of ${pipeline}: ${counts.join(", ")}`;
  return html`<figure>${bars(cells, label)}<figcaption>${label}. Height: rows, logarithmic. A cross failed; dashes: killed, or still
    running.</figcaption></figure><details><summary>The runs as text</summary>
    ${htmlTable(["at", "state", "rows", "took", "billed", "watermark held", "error"], rows.toReversed())}</details>`;
}

/** A square a day, of each year that has one. A day between the first and the last that nobody archived is missing. */
function archive(days: Past["days"]): Markup | "" {
  const [first, last] = [days[0], days.at(-1)];
  if (!first || !last) return "";
  const known = new Map(days.map((day) => [day.day, day]));
  const most = Math.max(1, ...days.map(({ rows }) => rows));
  const cells: [string, Cell][] = [];
  for (let at = Date.parse(first.day); at <= Date.parse(last.day); at += 86_400_000) {
    const day = new Date(at).toISOString().slice(0, 10);
    const { state = "missing", rows = 0, error = null } = known.get(day) ?? {};
    const title = `${day} ${state}, ${thousands(rows)} rows ${firstLine(error)}`;
    cells.push([day, { title, kind: kinds[state] ?? "done", share: rows / most }]);
  }
  const years = Object.entries(Object.groupBy(cells, ([day]) => day.slice(0, 4)));
  const shown = years.filter(([, some]) => some?.some(([, { kind }]) => kind !== "gone"));
  const list = (kind: Cell["kind"]): string => {
    const some = cells.filter(([, cell]) => cell.kind === kind).map(([day]) => day);
    return some.length > 5 ? `${thousands(some.length)} days, ${some[0]} to ${some.at(-1)}` : some.join(", ") || "none";
  };
  const total = thousands(days.reduce((sum, { rows }) => sum + rows, 0));
  return html`<h2>Archive of events</h2><p>${first.day} to ${last.day}, ${total} rows.
    Failed: ${list("failed")}. Missing: ${list("gone")}.</p>
    ${shown.map(([year, some = []]) => html`<figure class="scroll">${calendar(year, some)}</figure>`)}
    <p class="soft">The stronger the colour, the more rows. A cross failed; dashes: missing, or being archived.</p>`;
}

function models(all: Past["models"]): Markup {
  const rows = all.map(({ model, rows, checks, error, published, history }) => {
    const passed = error ? "failed" : `${checks} passed`;
    return [model, history?.at(-1) ?? rows, passed, published ?? "never", history ? sparkline(history) : "", error];
  });
  const names = ["model", "rows", "checks", "last published", "rows, run by run", "why not"];
  return rows.length ? htmlTable(names, rows) : html`<p>None yet. Next: make views</p>`;
}

function proofs(all: Past["verified"]): Markup {
  const rows = all.map(({ pipeline, at, age, rows, differences, found }) => {
    return [pipeline, `${at}, ${duration(age)} ago`, rows, differences, found];
  });
  const names = ["pipeline", "verified", "rows", "differences", "found"];
  return rows.length ? htmlTable(names, rows) : html`<p>None yet. Next: make verify</p>`;
}

function costs(all: Past["billed"]): Markup {
  const most = Math.max(1, ...all.map(({ bytes }) => bytes));
  const rows = all.toReversed().map(({ week, bytes }) => {
    return [`week of ${week}`, megabytes(bytes), html`<meter max="${most}" value="${bytes}"></meter>`];
  });
  return htmlTable(["", "billed", ""], rows);
}
