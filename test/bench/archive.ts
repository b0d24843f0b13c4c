/**
 * make bench: what archiving events costs, a backfill of their days and one day that has them all, against psql | gzip | curl of
 * the same JSON. With PEERS=1 (make bench-peers) the one day also by dlt, Sling and ingestr, each
 * in a venv of its own, on the same rows to the same server. ROWS= (default all, 1,471,409 of 365 days), RUNS= (default 3) of each,
 * interleaved; medians are quoted. Absolute times are this machine's.
 */
import { execFileSync } from "node:child_process";
import { writeFileSync } from "node:fs";
import { join } from "node:path";
import { gunzipSync } from "node:zlib";
import { addDays } from "../../shared/events/archive.ts";
import { get, listObjects, removeObjects } from "../../shared/events/s3.ts";
import { thousands } from "../../shared/log.ts";
import { loadData } from "../data/load.ts";
import { createShop } from "../lib/shop.ts";
import { python } from "../stack/python.ts";
import { say } from "../stack/stack.ts";
import { type Contender, compare, measure, scratchFolder, script } from "./measure.ts";
import { openPeers, plain } from "./peers.ts";

const rows = Number(process.env.ROWS ?? 1_471_409);
const day = "2017-06-01";

await using shop = await createShop();
say(`bench: ${thousands(rows)} events`);
await loadData(shop.env.STACK_ADMIN_DATABASE_URL ?? "", { only: ["events"], maxRows: rows });
const scratch = scratchFolder();
const { S3_ENDPOINT = "", S3_BUCKET = "", AWS_ACCESS_KEY_ID = "", AWS_SECRET_ACCESS_KEY = "", AWS_REGION = "" } = shop.env;
const source = shop.env.SOURCE_DATABASE_URL ?? "";
const aws = { AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION, AWS_DEFAULT_REGION: AWS_REGION };
/** Where a tool writes, below the shop's prefix. */
const place = (name: string): string => `${shop.bucket.prefix}${name}`;

/** Archives the days of [FROM, TO), each with one psql, one gzip and one curl. */
const floorScript = `set -euo pipefail
for ((day = $(date -ud "$FROM" +%s); day < $(date -ud "$TO" +%s); day += 86400)); do
  from=$(date -ud "@$day" +%F) to=$(date -ud "@$((day + 86400))" +%F)
  where="created_at >= '$from' and created_at < '$to'"
  psql -qX "$SOURCE" -c "copy (\${LINES_OF//DAY/$where}) to stdout (format csv, quote E'\\\\x01', delimiter E'\\\\x02')" | gzip -6 >part.gz
  curl -sSf --aws-sigv4 "aws:amz:$AWS_REGION:s3" --user "$AWS_ACCESS_KEY_ID:$AWS_SECRET_ACCESS_KEY" -H "x-amz-content-sha256: UNSIGNED-PAYLOAD" -T part.gz "$URL/$from.ndjson.gz"
done`;
const lines = `select '{' || concat_ws(',', '"id":' || id, '"user_id":' || user_id, '"type":' || to_json(type), '"payload":' || payload::text, '"created_at":' || to_json(created_at)) || '}' from (select id, user_id, type, payload, created_at from events where DAY order by created_at, id) e`;
const floor = (FROM: string, TO: string) =>
  measure({
    command: "bash",
    args: ["-c", floorScript],
    cwd: scratch,
    env: { ...aws, FROM, TO, SOURCE: source, LINES_OF: lines, URL: `${S3_ENDPOINT}/${S3_BUCKET}/${place("floor")}` },
  });
const ours = (FROM: string, TO: string) => measure(script("scripts/ops/backfill-events.ts", { ...shop.env, FROM, TO, FORCE: "1" }));

const clear = async (writes: string): Promise<void> =>
  removeObjects(
    shop.bucket,
    (await Array.fromAsync(listObjects(shop.bucket, place(writes)))).map(({ key }) => key),
  );

interface Writer extends Contender {
  /** Where, below the shop's prefix. */
  writes: string;
}

/** Compares them. @throws Error where the objects of one do not hold all rows. */
async function bench(job: string, writers: Writer[]): Promise<void> {
  await compare(job, rows, writers);
  for (const { by, writes } of writers) {
    let found = 0;
    for await (const { key } of listObjects(shop.bucket, place(writes))) {
      if (!/part|events|parquet|gz/.test(key.slice(place(writes).length)) || /_dlt|manifest|init|schema/.test(key)) continue;
      const body = (await get(shop.bucket, key))?.body ?? Buffer.alloc(0);
      if (by === "ingestr") {
        writeFileSync(join(scratch, "file.parquet"), body);
        const count = "import duckdb; print(duckdb.sql(\"select count(*) from 'file.parquet'\").fetchone()[0])";
        found += Number(execFileSync(python, ["-c", count], { cwd: scratch }));
      } else for (const byte of body[0] === 0x1f ? gunzipSync(body) : body) if (byte === 10) found += 1;
    }
    if (found !== rows) throw new Error(`${by} wrote ${found} rows, not ${rows}`);
    await clear(writes);
  }
}

const both = (FROM: string, TO: string): Writer[] => [
  { by: "for each day psql | gzip -6, curl", writes: "floor/", run: () => floor(FROM, TO) },
  { by: "ours", writes: "events/", run: () => ours(FROM, TO) },
];

// 1. The days as they are

const [range] = await shop.admin`
  select to_char(min(created_at), 'YYYY-MM-DD') as first, to_char(max(created_at), 'YYYY-MM-DD') as last from events`;
await bench("backfill", both(range?.first, addDays(range?.last)));

// 2. All in one day

await shop.admin`
  update events set created_at = ${day}::text::timestamptz + (id % 86400) * interval '1 s' + (id % 1000000) * interval '1 us'`;
await shop.admin`cluster events using events_created_at`;
await shop.admin`vacuum analyze events`;
await bench("archive", [...both(day, addDays(day)), ...(process.env.PEERS ? await peers() : [])]);

async function peers(): Promise<Writer[]> {
  const open = await openPeers(scratch);
  const keys = { access_key_id: AWS_ACCESS_KEY_ID, secret_access_key: AWS_SECRET_ACCESS_KEY };
  const bucket = JSON.stringify({ type: "s3", endpoint: S3_ENDPOINT, region: AWS_REGION, bucket: S3_BUCKET, ...keys });
  const uri = new URLSearchParams({ endpoint_url: S3_ENDPOINT, region: AWS_REGION, layout: "{table_name}.{ext}", ...keys });
  const dlt = () => ({
    ...{ ...aws, S3_ENDPOINT, HOME: open.newHome(), TABLE: "events", DATASET: "archive", BACKEND: "connectorx" },
    TARGET: `s3://${S3_BUCKET}/${place("dlt")}`,
  });
  const sling = {
    ...{ "src-stream": "public.events", "tgt-object": `s3://${S3_BUCKET}/${place("sling/events.jsonl.gz")}` },
    "tgt-options": JSON.stringify({ format: "jsonlines", compression: "gzip" }),
  };
  const ingestr = { "source-table": "public.events", "dest-table": `${S3_BUCKET}/${place("ingestr/events")}` };
  return [
    { by: "dlt", writes: "dlt/", run: () => measure(open.dlt(source, dlt())) },
    { by: "Sling", writes: "sling/", run: () => measure(open.sling(source, bucket, sling)) },
    { by: "ingestr", writes: "ingestr/", run: () => measure(open.ingestr(plain(source), `s3://?${uri}`, ingestr)) },
  ].map((writer) => ({ ...writer, before: () => clear(writer.writes) }));
}
