/**
 * make bench-page: runs the benches at a tenth of their size and at their size, and writes their results as one table into
 * README.md, between <!-- bench --> and <!-- /bench -->. Takes about a quarter of an hour; leave the machine alone meanwhile.
 * SCALE= (default 1) of the sizes, RUNS= (default 3), PEER_RUNS= (default 1); BENCHES=orders,archive,views,sensors does some of it,
 * and README= names another file, for a trial.
 */
import { spawn } from "node:child_process";
import { once } from "node:events";
import { mkdtempSync, readFileSync, rmSync } from "node:fs";
import { availableParallelism, tmpdir, totalmem } from "node:os";
import { join } from "node:path";
import { thousands } from "../../shared/log.ts";
import { root } from "../stack/env.ts";
import { say } from "../stack/stack.ts";
import { type Measured, median, type Row, spread } from "./measure.ts";
import { markdown, writeSection } from "./section.ts";

const scale = Number(process.env.SCALE ?? 1);
const runs = process.env.RUNS ?? "3";
const peerRuns = process.env.PEER_RUNS ?? "1";
const only = process.env.BENCHES?.split(",");
const changed = 50_000 * scale;

/** The variables of each bench, of which those in `sizes` are divided by ten for the small one. */
const benches = [
  { name: "orders", sizes: { ROWS: 500_000 }, PARTS: "extraction,load,incremental,idle,verify" },
  { name: "archive", sizes: { ROWS: 1_471_409 }, PARTS: "backfill,day" },
  { name: "views", sizes: { ROWS: 155_848 } },
  { name: "sensors", sizes: { MESSAGES: 1_000_000 }, PARTS: "throughput,latency", RUNS: "2", SECONDS: "20" },
];

/** What the page shows of each job, and what its floor does. */
const jobs = {
  extraction: ["extraction of orders as JSON lines", "psql, the same COPY, to /dev/null"],
  "first load": ["first load of orders", "psql and curl into one load job"],
  "incremental run": [`incremental run, ${thousands(changed)} changed`, "psql and curl into one load job, one MERGE"],
  "run with nothing new": ["run with nothing new", "psql asks for a newer row"],
  archive: ["archive of one day", "psql, gzip -6, curl"],
  backfill: ["backfill, a day at a time (365 days)", "psql, gzip -6, curl for each day"],
  sensors: ["sensors, Kafka to ClickHouse", "kcat, split, curl, one pipe for each partition"],
  views: ["views, 12 models", "the twelve statements by curl: no copy, check or publishing"],
  verify: ["verify of orders", "a sum of hashes in Postgres and one in BigQuery, at once"],
};

const scratch = mkdtempSync(join(tmpdir(), "etl-page-"));
process.on("exit", () => rmSync(scratch, { recursive: true, force: true }));
const started = performance.now();
const results: { small: Row[]; large: Row[] } = { small: [], large: [] };
for (const { name, sizes, ...variables } of benches.filter((bench) => !only || only.includes(bench.name))) {
  for (const size of ["small", "large"] as const) {
    const file = join(scratch, `${name}.${size}`);
    const share = size === "small" ? scale / 10 : scale;
    const env: NodeJS.Dict<string> = {
      ...{ ...process.env, RUNS: runs, PEER_RUNS: peerRuns, CHANGED: String(changed), BENCH_ROWS: file },
      ...variables,
      ...Object.fromEntries(Object.entries(sizes).map(([key, value]) => [key, `${Math.ceil(value * share)}`])),
    };
    if (size === "large") env.PEERS = "1";
    else if (name === "sensors") env.PARTS = "throughput";
    say(`page: ${name}, ${size}, after ${Math.round((performance.now() - started) / 1000)} s`);
    const args = [join(root, `test/bench/${name}.ts`)];
    const child = spawn(process.execPath, args, { env, stdio: "inherit" });
    const [code] = await once(child, "close");
    if (code !== 0) throw new Error(`test/bench/${name}.ts exited with ${code}: the page was not written`);
    for (const line of readFileSync(file, "utf8").trim().split("\n")) results[size].push(JSON.parse(line));
  }
}

type Size = keyof typeof results;
const of = (size: Size, job: string, by = "ours"): Row[] =>
  results[size].filter((row) => row.job === job && row.by === by);
const values = (rows: Row[], name: keyof Measured): number[] => rows.flatMap((row) => row[name] ?? []);
/** The median of a figure, with as many digits as say something. */
const middle = (rows: Row[], name: keyof Measured): string => {
  const found = values(rows, name);
  if (!found.length) return "";
  const value = median(found);
  return value < 10 ? value.toFixed(2) : value < 100 ? value.toFixed(1) : thousands(value);
};

function line(job: string, [what = "", floor = ""]: string[]): string[] {
  const large = of("large", job);
  if (!large.length) return [];
  const both = (one: (size: Size) => string): string => `${one("small")} → ${one("large")}`;
  // Of some, how large the table is says more than how many rows moved.
  const sized = /incremental|nothing/.test(job) ? "first load" : job;
  return [
    what,
    both((size) => thousands(of(size, sized)[0]?.rows ?? 0)),
    both((size) => middle(of(size, job), "seconds")),
    both((size) => middle(of(size, job), "times")),
    spread(values(large, "times")).replace(/^.*\(|\)$/g, ""),
    ...["dlt", "Sling", "ingestr"].map((by) => middle(of("large", job, by), "times")),
    both((size) => middle(of(size, job), "megabytes")),
    job === "sensors" ? "" : both((size) => middle(of(size, job), "sourceCpu")),
    middle(of("large", job, "floor"), "sourceCpu"),
    floor,
  ];
}

const head = [
  ...["", "rows", "seconds", "times its floor", "from, to", "dlt 1.31.0", "Sling 1.4.11", "ingestr 1.1.22"],
  ...["peak RSS, MB", "CPU of the source, s", "the floor's", "its floor"],
];
const lines = Object.entries(jobs)
  .map(([job, words]) => line(job, words))
  .filter((cells) => cells.length);
const [half, most, all] = ["0.5", "0.95", "1"].map((share) => of("large", "latency", share));
const rate = (rows: Row[]): string => thousands((rows[0]?.rows ?? 0) / median(values(rows, "seconds")));
const sensors = half?.length
  ? `Sensors: ${rate(of("large", "sensors"))} rows/s. From commit at the source to the queryable row, at 139 rows/s: median ${middle(half, "seconds")} s, 95 % within ${middle(most ?? [], "seconds")} s, at most ${middle(all ?? [], "seconds")} s; CPU of the source, its writer's included, ${middle(half, "sourceCpu")} s a minute.`
  : "";
const gigabytes = Math.round(totalmem() / 2 ** 30);
const text = `
\`make bench-page\`, ${new Date().toISOString().slice(0, 10)}, ${availableParallelism()} cores and ${gigabytes} GB for all of it: tool, Postgres, BigQuery's, S3's, Kafka's and ClickHouse's local servers.
Each job at a tenth of its rows → at its rows; medians of ${runs} runs (sensors 2, the peers ${peerRuns}), each beside its floor in turn. Seconds are that machine's, from start to exit (extraction: of a process that runs).

${markdown([head, ...lines])}

The columns of dlt, Sling and ingestr are times the floor too, at the full number of rows, each in its fastest documented way (dlt with connectorx and, into Postgres, CSV). First load, incremental run and a run with nothing new: they
write to a Postgres rather than to the local BigQuery, and their floor is psql into psql with the same upsert. Extraction: theirs is to a local file of JSON lines, their start included. ingestr's archive is Parquet.
${sensors}
`;
writeSection("bench", text);
say(`page: README.md is written, after ${Math.round((performance.now() - started) / 60_000)} minutes`);
