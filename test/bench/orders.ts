/**
 * make bench: what orders costs, as ratios measured side by side in one run. ROWS= (default 500,000) rows, RUNS= (default 5) runs
 * of each, interleaved; medians are quoted. Absolute times are this machine's, and noisy.
 */
import { execFile, spawnSync } from "node:child_process";
import { Writable } from "node:stream";
import { pipeline } from "node:stream/promises";
import { promisify } from "node:util";
import {
  checkKeys,
  compareCounts,
  createStaging,
  loadLines,
  mergeStaging,
  openDestination,
} from "../../shared/bigquery.ts";
import { copyJsonLines } from "../../shared/postgres.ts";
import { table, thousands } from "../../shared/progress.ts";
import { runPipeline } from "../../shared/run.ts";
import { checkSource, readContract, readSelect } from "../../shared/schema.ts";
import { createShop } from "../lib/shop.ts";
import { root } from "../stack/env.ts";
import { say } from "../stack/stack.ts";

const rows = Number(process.env.ROWS ?? 500_000);
const runs = Number(process.env.RUNS ?? 5);
const median = (values: number[]): number => [...values].sort((a, b) => a - b)[Math.floor(values.length / 2)] ?? 0;
const spread = (values: number[]): string =>
  `${median(values).toFixed(2)} (${Math.min(...values).toFixed(2)} to ${Math.max(...values).toFixed(2)})`;

async function timed<T>(work: () => Promise<T>): Promise<[number, T]> {
  const started = performance.now();
  const result = await work();
  return [(performance.now() - started) / 1000, result];
}

if (spawnSync("psql", ["--version"]).error)
  throw new Error("psql: not found on PATH. Install it (Debian: postgresql-client)");
await using shop = await createShop();
say(`bench: ${thousands(rows)} orders`);
await shop.insertRows(1, rows);
await shop.admin`vacuum analyze orders`;

const env = {
  SOURCE_DATABASE_URL: shop.env.SOURCE_DATABASE_URL ?? "",
  ETL_DATABASE_URL: shop.env.ETL_DATABASE_URL ?? "",
  PUSHGATEWAY_URL: shop.env.PUSHGATEWAY_URL ?? "",
  BIGQUERY_PROJECT: shop.env.BIGQUERY_PROJECT ?? "",
  BIGQUERY_DATASET: shop.dataset,
  BIGQUERY_LOCATION: "US",
  BIGQUERY_ENDPOINT: shop.env.BIGQUERY_ENDPOINT,
  RUN_TIMEOUT_SECONDS: 3600,
  WATERMARK_LAG_SECONDS: 0,
  FROM: "-infinity", // as a re-run by hand: no watermark, no metrics
};
const source = { table: "public.orders", cursor: "updated_at", select: readSelect("orders") };
const window = { from: "-infinity", to: "infinity" };

await runPipeline("orders", env, async (run) => {
  const contract = readContract("orders");
  const select = await checkSource(run, contract, source);
  const destination = await openDestination(env, contract, source.cursor);
  const copy = (): ReturnType<typeof copyJsonLines> =>
    copyJsonLines(env.SOURCE_DATABASE_URL, select, run.session, window);
  const psql =
    `copy (${select.replaceAll(/--.*$/gm, "")}) to stdout (format csv, quote E'\\x01', delimiter E'\\x02')`.replaceAll(
      "\n",
      " ",
    );

  const ours: number[] = [];
  const floor: number[] = [];
  for (let i = 0; i < runs; i++) {
    const [a] = await timed(async () => {
      await using stream = await copy();
      await pipeline(stream.lines, new Writable({ write: (_piece, _encoding, done) => done() }));
      if (stream.sent.rows !== rows) throw new Error(`${stream.sent.rows} rows came`);
    });
    const [b] = await timed(() =>
      promisify(execFile)("sh", ["-c", 'exec psql -qX "$URL" -c "$COPY" >/dev/null'], {
        env: {
          ...process.env,
          URL: env.SOURCE_DATABASE_URL,
          COPY: psql,
          PGOPTIONS: "-c etl.from=-infinity -c etl.to=infinity",
        },
      }),
    );
    ours.push(a);
    floor.push(b);
    say(`bench: extraction ${i + 1} of ${runs}: ours ${a.toFixed(2)} s, psql ${b.toFixed(2)} s`);
  }
  const ratios = ours.map((value, i) => value / (floor[i] ?? 1));
  process.stdout.write(
    `extraction as JSON lines, ours / psql COPY to /dev/null: ${spread(ratios)}; ${thousands(rows / median(ours))} rows/s\n`,
  );

  const [create, staging] = await timed(() => createStaging(run, destination, 1));
  await using stream = await copy();
  const [load, loaded] = await timed(() => loadLines(run, destination, staging, stream));
  compareCounts(stream.sent.rows, loaded);
  const [keys] = await timed(() => checkKeys(run, destination, staging));
  const [merge] = await timed(() => mergeStaging(run, destination, staging));
  const [drop] = await timed(async () => await staging[Symbol.asyncDispose]());
  const total = create + load + keys + merge + drop;
  const part = (seconds: number): { seconds: string; share: string } => ({
    seconds: seconds.toFixed(2),
    share: `${Math.round((seconds / total) * 100)} %`,
  });
  process.stdout.write(
    `\na first load as one chunk of ${thousands(rows)} rows: ${total.toFixed(1)} s, ${thousands(rows / total)} rows/s\n`,
  );
  process.stdout.write(
    `${table([
      { step: "create staging", ...part(create) },
      { step: "of the load: extraction alone", ...part(median(ours)) },
      { step: "extract and load", ...part(load) },
      { step: "check of the keys", ...part(keys) },
      { step: "MERGE", ...part(merge) },
      { step: "drop staging", ...part(drop) },
    ])}\n`,
  );
});

await shop.succeed("scripts/orders.ts", { CHUNK_ROWS: String(rows + 1) });
const idle: number[] = [];
for (let i = 0; i < runs; i++) {
  const [seconds] = await timed(() =>
    promisify(execFile)("make", ["orders"], { cwd: root, env: shop.env as NodeJS.ProcessEnv }),
  );
  idle.push(seconds);
}
process.stdout.write(`\na run with nothing to do, from make to exit: ${spread(idle)} s\n`);

// What Google's BigQuery counts for the MERGE, by its documented sizes of the types and its rule for DML on partitioned tables
// (cloud.google.com/bigquery/pricing, "Data size calculation"; "DML statements", q' + t'); the local server counts no bytes.
const widths: Record<string, string> = { INTEGER: "8", TIMESTAMP: "8", NUMERIC: "16", STRING: "2 + octet_length($)" };
const contract = readContract("orders");
const size = (names: string[]): string =>
  contract.fields
    .filter(({ name }) => names.includes(name))
    .map(
      ({ name, type }) =>
        `coalesce(sum(case when ${name} is not null then ${widths[type]?.replace("$", name)} end), 0)`,
    )
    .join(" + ");
const every = contract.fields.map(({ name }) => name);
const [counted] = await shop.admin.unsafe(
  `select (${size(["id", "updated_at"])})::float8 / count(*) as key, (${size(every)})::float8 / count(*) as row from orders`,
);
process.stdout.write(
  `\nthe MERGE, in bytes as BigQuery counts them: ${counted?.key} for each order of the table (id and updated_at of every partition), and ${Math.round(counted?.row)} for each order of the months that it updates, and of the staging table\n`,
);
