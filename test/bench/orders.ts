/**
 * make bench: what orders costs, each job beside the least that could do it (its floor), and with PEERS=1 beside dlt, Sling and
 * ingestr. ROWS= (default 500,000) orders, CHANGED= (default 50,000) of them in an incremental run, RUNS= (default 3) runs of each,
 * interleaved; medians are quoted. Absolute times are this machine's, and noisy.
 *
 * The peers write to the source's Postgres rather than to the local BigQuery; so each is measured against a floor that
 * writes to the same place. Their extraction is one to JSON lines in a local file.
 */
import { spawnSync } from "node:child_process";
import { join } from "node:path";
import { Writable } from "node:stream";
import { pipeline } from "node:stream/promises";
import { bigqueryVariables } from "../../shared/bigquery/client.ts";
import { checkSource, readContract } from "../../shared/bigquery/contract.ts";
import { mergeStatement } from "../../shared/bigquery/load.ts";
import { jsonLines } from "../../shared/bigquery/types.ts";
import { readEnv } from "../../shared/env.ts";
import { thousands } from "../../shared/log.ts";
import { pipelineVariables, runPipeline } from "../../shared/run.ts";
import { createShop } from "../lib/shop.ts";
import { say } from "../stack/stack.ts";
import { type Contender, compare, measure, scratchFolder, script } from "./measure.ts";
import { dltSync, ingestrSync, openPeers, type Sync, slingSync } from "./peers.ts";

const rows = Number(process.env.ROWS ?? 500_000);
const changed = Math.min(rows, Number(process.env.CHANGED ?? 50_000));

if (spawnSync("psql", ["--version"]).error) throw new Error("psql: not found on PATH. Install it (Debian: postgresql-client)");
await using shop = await createShop();
say(`bench: ${thousands(rows)} orders`);
await shop.insertRows(1, rows);
await shop.admin`vacuum analyze orders`;

Object.assign(process.env, shop.env, { RUN_TIMEOUT_SECONDS: "3600", HEARTBEAT_URL: "" });
const env = { ...readEnv({ ...pipelineVariables, ...bigqueryVariables }), FROM: "-infinity" }; // by hand: no watermark, no metrics
const target = shop.env.STACK_ADMIN_DATABASE_URL ?? "";
const contract = readContract("orders");
const scratch = scratchFolder();

/** The SELECT that the rows are read by, as JSON lines. */
let select = "";
const bash = (script: string, variables: NodeJS.Dict<string> = {}) =>
  measure({
    command: "bash",
    args: ["-c", `set -euo pipefail; ${script}`],
    env: {
      SOURCE: env.SOURCE_DATABASE_URL,
      COPY: `copy (${select.replaceAll(/--.*$/gm, "")}) to stdout (format csv, quote E'\\x01', delimiter E'\\x02')`,
      PGOPTIONS: "-c etl.from=-infinity -c etl.to=infinity",
      BIGQUERY: `${env.BIGQUERY_ENDPOINT}/bigquery/v2/projects/${env.BIGQUERY_PROJECT}`,
      UPLOAD: `${env.BIGQUERY_ENDPOINT}/upload/bigquery/v2/projects/${env.BIGQUERY_PROJECT}/jobs?uploadType=resumable`,
      ...variables,
    },
  });
const ours = (name: string, variables = {}) => measure(script(name, { ...shop.env, ...variables }));

// 1. Extraction

const peers = process.env.PEERS ? await openPeers(scratch) : undefined;

/** The peers', to a file of JSON lines, or a folder of them. */
function extractions(): Contender[] {
  if (!peers) return [];
  const file = `file://${join(scratch, "orders.jsonl")}`;
  const dlt = () => ({
    ...{ TABLE: "orders", TARGET: `file://${scratch}/dlt`, DATASET: "extraction", BACKEND: "connectorx" },
    ...{ HOME: peers.newHome(), NORMALIZE__DATA_WRITER__DISABLE_COMPRESSION: "true" },
  });
  const options = { "src-stream": "public.orders", "tgt-object": file, "tgt-options": '{"format":"jsonlines"}' };
  return [
    { by: "dlt", run: () => measure(peers.dlt(env.SOURCE_DATABASE_URL, dlt())) },
    { by: "Sling", run: () => measure(peers.sling(env.SOURCE_DATABASE_URL, "", options)) },
  ];
}

await runPipeline("orders", env, async (run) => {
  select = jsonLines(contract.fields, contract.source.select, await checkSource(run, contract));
  const window = { "etl.from": "-infinity", "etl.to": "infinity" };
  const extract = async () => {
    const started = performance.now();
    await using stream = run.copy(select, window);
    await pipeline(stream.lines, new Writable({ write: (_piece, _encoding, done) => done() }));
    if (stream.sent.rows !== rows) throw new Error(`${stream.sent.rows} rows came`);
    const megabytes = process.resourceUsage().maxRSS / 1024; // this process does nothing else before
    return { seconds: (performance.now() - started) / 1000, megabytes };
  };
  await compare("extraction", rows, [
    { by: "psql COPY, the same JSON, to /dev/null", run: () => bash(`exec psql -qX "$SOURCE" -c "$COPY" >/dev/null`) },
    { by: "ours", run: extract },
    ...extractions(),
  ]);
});

// 2. Runs, from start to exit

/** Streams what psql reads into one load job, which replaces a table; waits for it. */
const load = `
location=$(curl -sSf -D- -o "$OUT" -X POST "$UPLOAD" -H 'content-type: application/json' -d "$LOAD" | tr -d '\\r' | sed -n 's/^[Ll]ocation: //p')
psql -qX "$SOURCE" -c "$COPY" | curl -sSf -T - -o "$OUT" "$location"
until curl -sSf "$BIGQUERY/jobs/$JOB" | grep -q '"state": *"DONE"'; do sleep 0.05; done
`;
const query = `curl -sSf -o "$OUT" "$BIGQUERY/queries" -H 'content-type: application/json' -d "$QUERY"`;
const place = (tableId: string): object => ({ projectId: env.BIGQUERY_PROJECT, datasetId: shop.dataset, tableId });
let jobs = 0;
const loadInto = (tableId: string): NodeJS.Dict<string> => {
  const JOB = `${shop.dataset}_floor_${jobs++}`;
  const into = { destinationTable: place(tableId), schema: { fields: contract.fields }, writeDisposition: "WRITE_TRUNCATE" };
  const configuration = { load: { sourceFormat: "NEWLINE_DELIMITED_JSON", ...into } };
  const LOAD = JSON.stringify({ jobReference: { projectId: env.BIGQUERY_PROJECT, jobId: JOB }, configuration });
  return { JOB, LOAD, OUT: join(scratch, "answer") };
};
const statement = (text: string): string =>
  JSON.stringify({ query: text, useLegacySql: false, timeoutMs: 600_000, defaultDataset: place("") });

let from = "-infinity";

const columns = contract.fields.map(({ name }) => name);
/** The peers' floor: the same rows from Postgres to Postgres. */
const pipe = (SQL: string) => () =>
  bash(`psql -qX "$SOURCE" -c "$COPY" | psql -qX "$TARGET" -v ON_ERROR_STOP=1 -c "$SQL"`, {
    SQL,
    COPY: `copy (${contract.source.select.replaceAll(/--.*$/gm, "").replace(/;\s*$/, "")}) to stdout`,
    TARGET: target,
    PGOPTIONS: `-c etl.from=${from} -c etl.to=infinity`,
  });

let syncs: Sync[] = [];
let round = 0;
/** Each peer forgets, and has a schema that is not there yet. */
async function forget(): Promise<void> {
  if (!peers) return;
  round += 1;
  syncs = [
    dltSync(peers, env.SOURCE_DATABASE_URL, target, `dlt_${round}`, { BACKEND: "connectorx", LOADER: "csv" }),
    slingSync(peers, env.SOURCE_DATABASE_URL, target, `sling_${round}`),
    ingestrSync(peers, env.SOURCE_DATABASE_URL, target, `ingestr_${round}`, "interval"),
  ];
  const tables = "create table floor (like orders including indexes); create table staging (like orders)";
  await shop.admin.unsafe(`drop table if exists floor, staging; ${tables}`);
}
/** The peers, and the floor of what they do. */
const synced = (floor: string, run: Contender["run"]): Contender[] => {
  if (!peers) return [];
  const runs = syncs.map(({ by }, index) => ({ by: by.replace(/ .*/, ""), run: () => measure((syncs[index] as Sync).command()) }));
  return [{ by: floor, floor: true, run }, ...runs];
};
await forget();

/** @throws Error where a destination is not what the source holds. */
async function check(): Promise<void> {
  const inPostgres =
    "select concat_ws(' ', count(*), sum(id), sum((extract(epoch from updated_at) * 1000000)::bigint % 1000003)) as is from";
  const inBigQuery = "select format('%d %d %d', count(*), sum(id), sum(mod(unix_micros(updated_at), 1000003))) as `is` from";
  const [expected] = await shop.admin.unsafe(`${inPostgres} orders`);
  const found = new Map<string, unknown>();
  for (const name of ["floor", "orders"]) found.set(`BigQuery's ${name}`, (await shop.query(`${inBigQuery} ${name}`))[0]?.is);
  for (const name of peers ? ["floor", ...syncs.map(({ schema }) => `${schema}.orders`)] : [])
    found.set(`Postgres's ${name}`, (await shop.admin.unsafe(`${inPostgres} ${name}`))[0]?.is);
  for (const [name, is] of found)
    if (is !== expected?.is) throw new Error(`${name}: rows, sum of id and of updated_at are ${is}, not ${expected?.is}`);
}

const firstLoad = [
  { by: "psql | curl into one load job", run: () => bash(load, loadInto("floor")) },
  { by: "ours", run: () => ours("scripts/orders.ts") },
  ...synced("the peers' floor: psql | psql, one COPY into Postgres", pipe("copy floor from stdin")),
];
await compare("first load", rows, firstLoad, async () => {
  await shop.admin`delete from etl.watermarks`;
  await shop.query("truncate table orders");
  await forget();
});
await check();

const merge = statement(mergeStatement(contract, "floor", "floor_staging"));
const floor = () => bash(load + query, { ...loadInto("floor_staging"), QUERY: merge, PGOPTIONS: `-c etl.from=${from} -c etl.to=infinity` });
const upsert = `insert into floor select * from staging on conflict (id) do update set ${columns.map((column) => `${column} = excluded.${column}`).join()}`;
await compare(
  "incremental run",
  changed,
  [
    { by: "psql | curl into one load job, one MERGE", run: floor },
    { by: "ours", run: () => ours("scripts/orders.ts") },
    ...synced("the peers' floor: psql | psql, INSERT … ON CONFLICT", pipe(`truncate staging; copy staging from stdin; ${upsert}`)),
  ],
  async () => {
    const [now] = await shop.admin`select replace(now()::text, ' ', 'T') as now`;
    from = now?.now;
    await shop.updateRows(1, changed, `round ${from}`);
  },
);
await check();

const ask = () => bash(`psql -qXAt "$SOURCE" -c "select 1 from orders where updated_at > now() limit 1"`);
await compare("run with nothing new", 0, [
  { by: "psql asks for a newer row", run: ask },
  { by: "ours", run: () => ours("scripts/orders.ts") },
  ...synced("the peers' floor: the same", ask),
]);

const SUM = "select count(*), sum(hashtextextended(o::text, 0)::numeric) from orders o";
const row = columns.map((name) => `ifnull(cast(${name} as string), '')`).join(", '|', ");
const QUERY = statement(`select count(*), sum(cast(farm_fingerprint(concat(${row})) as numeric)) from orders`);
const sums = `psql -qXAt "$SOURCE" -c "$SUM" & ${query}; wait $!`;
await compare("verify", rows, [
  { by: "one sum of hashes on either side", run: () => bash(sums, { SUM, QUERY, OUT: join(scratch, "answer") }) },
  { by: "ours", run: () => ours("scripts/ops/verify.ts", { PIPELINE: "orders" }) },
]);
