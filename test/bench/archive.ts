/**
 * make bench: what archiving a day of events costs, against psql | gzip | curl of the same JSON, and what each gzip level costs.
 * make bench-peers (PEERS=1): also dlt, Sling and ingestr, each in a venv of its own, on the same rows to the same server.
 * ROWS= (default 1,000,000), RUNS= (default 3) of each, interleaved; medians are quoted. Absolute times are this machine's.
 */
import { execFileSync, spawn } from "node:child_process";
import { once } from "node:events";
import { mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { gunzipSync, gzipSync } from "node:zlib";
import { readManifest } from "../../shared/archive.ts";
import { table, thousands } from "../../shared/progress.ts";
import { getStream, listObjects, removeObjects } from "../../shared/s3.ts";
import { loadData } from "../data/load.ts";
import { createShop, rowsFlags } from "../lib/shop.ts";
import { root } from "../stack/env.ts";
import { python } from "../stack/python.ts";
import { say, stackPath } from "../stack/stack.ts";

const rows = Number(process.env.ROWS ?? 1_000_000);
const runs = Number(process.env.RUNS ?? 3);
const day = "2017-06-01";
const median = (values: number[]): number => [...values].sort((a, b) => a - b)[Math.floor(values.length / 2)] ?? 0;
const spread = (values: number[]): string =>
  `${median(values).toFixed(2)} (${Math.min(...values).toFixed(2)} to ${Math.max(...values).toFixed(2)})`;

await using shop = await createShop();
say(`bench: ${thousands(rows)} events of one day`);
await loadData(shop.env.STACK_ADMIN_DATABASE_URL ?? "", { only: ["events"], maxRows: rows });
await shop.admin`
  update events set created_at = ${day}::text::timestamptz + (id % 86400) * interval '1 s' + (id % 1000000) * interval '1 us'`;
await shop.admin`cluster events using events_created_at`;
await shop.admin`vacuum analyze events`;
const scratch = mkdtempSync(join(tmpdir(), "etl-bench-"));
const {
  S3_ENDPOINT = "",
  S3_BUCKET = "",
  AWS_ACCESS_KEY_ID = "",
  AWS_SECRET_ACCESS_KEY = "",
  AWS_REGION = "",
} = shop.env;
const source = (shop.env.SOURCE_DATABASE_URL ?? "").replace(/^postgres:/, "postgresql:");

interface Measured {
  seconds: number;
  /** Of all its processes together, sampled every 200 ms. */
  megabytes: number;
}

/** Kilobytes of a process and its children. */
function resident(pid: number): number {
  try {
    const own = Number(/^VmRSS:\s+(\d+)/m.exec(readFileSync(`/proc/${pid}/status`, "utf8"))?.[1] ?? 0);
    const children = readFileSync(`/proc/${pid}/task/${pid}/children`, "utf8").split(" ").filter(Boolean);
    return children.reduce((sum, child) => sum + resident(Number(child)), own);
  } catch {
    return 0; // it has just ended
  }
}

/** Runs a command to its end. */
async function measure(command: string, args: string[], env: NodeJS.Dict<string>): Promise<Measured> {
  const started = performance.now();
  const child = spawn(command, args, {
    env: { ...process.env, ...env },
    stdio: ["ignore", "pipe", "pipe"],
    cwd: scratch,
    detached: true,
  });
  let output = "";
  for (const stream of [child.stdout, child.stderr])
    stream.setEncoding("utf8").on("data", (text) => (output = (output + text).slice(-3000)));
  let kilobytes = 0;
  const sampler = setInterval(() => (kilobytes = Math.max(kilobytes, resident(child.pid ?? 0))), 200);
  const [code] = await once(child, "close");
  clearInterval(sampler);
  if (code !== 0) throw new Error(`${command} ${args.join(" ").slice(0, 200)} exited with ${code}:\n${output}`);
  return { seconds: (performance.now() - started) / 1000, megabytes: kilobytes / 1024 };
}

const lines = `select '{' || concat_ws(',', '"id":' || id, '"user_id":' || user_id, '"type":' || to_json(type), '"payload":' || payload::text, '"created_at":' || to_json(created_at)) || '}' from (select id, user_id, type, payload, created_at from events order by created_at, id) e`;
const aws = { AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION, AWS_DEFAULT_REGION: AWS_REGION };
/** Where a tool writes, below the shop's prefix. */
const place = (name: string): string => `${shop.bucket.prefix}${name}`;

interface Contender {
  name: string;
  run(): Promise<Measured>;
  /** Below the shop's prefix. */
  writes: string;
  format: string;
}
const contenders: Contender[] = [
  {
    name: "psql | gzip -6, curl",
    format: "NDJSON.gz",
    writes: "floor/",
    run: () =>
      measure(
        "bash",
        [
          "-c",
          `set -o pipefail; psql -qX "$SOURCE" -c "$COPY" | gzip -6 >part.gz && curl -sSf --aws-sigv4 "aws:amz:$AWS_REGION:s3" --user "$AWS_ACCESS_KEY_ID:$AWS_SECRET_ACCESS_KEY" -H "x-amz-content-sha256: UNSIGNED-PAYLOAD" -T part.gz "$URL"`,
        ],
        {
          ...aws,
          SOURCE: source,
          COPY: `copy (${lines}) to stdout (format csv, quote E'\\x01', delimiter E'\\x02')`,
          URL: `${S3_ENDPOINT}/${S3_BUCKET}/${place("floor/part.ndjson.gz")}`,
        },
      ),
  },
  {
    name: "make events (this project)",
    format: "NDJSON.gz, manifest",
    writes: "events/",
    run: () =>
      measure(process.execPath, [rowsFlags(), join(root, "scripts/events.ts")], {
        ...shop.env,
        FROM: day,
        TO: "2017-06-02",
        BACKFILL: "1",
        FORCE: "1",
      }),
  },
];
if (process.env.PEERS) contenders.push(...(await peers()));

const results = new Map(contenders.map(({ name }) => [name, [] as Measured[]]));
for (let run = 1; run <= runs; run++) {
  for (const { name, run: once } of contenders) {
    say(`bench: run ${run} of ${runs}: ${name}`);
    results.get(name)?.push(await once());
  }
}

/** Rows and compressed bytes of what a contender wrote last. */
async function written({ writes, format }: Contender): Promise<{ rows: number; bytes: number }> {
  const [sum] = [{ rows: 0, bytes: 0 }];
  for await (const { key } of listObjects(shop.bucket, place(writes))) {
    if (!/part|events|parquet|gz/.test(key.slice(place(writes).length)) || /_dlt|manifest|init|schema/.test(key))
      continue;
    const body = Buffer.concat(await Array.fromAsync(await getStream(shop.bucket, key)));
    sum.bytes += body.length;
    if (format === "Parquet") {
      writeFileSync(join(scratch, "file.parquet"), body);
      sum.rows += Number(
        execFileSync(python, [
          "-c",
          `import pyarrow.parquet as p;print(p.ParquetFile(${JSON.stringify(join(scratch, "file.parquet"))}).metadata.num_rows)`,
        ]),
      );
    } else for (const byte of body[0] === 0x1f ? gunzipSync(body) : body) if (byte === 10) sum.rows += 1;
  }
  return sum;
}

const floor = median(results.get(contenders[0]?.name ?? "")?.map(({ seconds }) => seconds) ?? []);
const report = [];
for (const contender of contenders) {
  const measured = results.get(contender.name) ?? [];
  const wrote = await written(contender);
  if (wrote.rows !== rows) say(`bench: ${contender.name} wrote ${wrote.rows} rows, not ${rows}`);
  const seconds = measured.map((one) => one.seconds);
  report.push({
    writes: contender.name,
    format: contender.format,
    seconds: spread(seconds),
    "times the floor": (median(seconds) / floor).toFixed(2),
    "rows/s": thousands(rows / median(seconds)),
    "peak RSS, MiB": Math.round(median(measured.map((one) => one.megabytes))),
    "MB written": (wrote.bytes / 1e6).toFixed(1),
    rows: thousands(wrote.rows),
  });
}
process.stdout.write(`\n${table(report)}\n\n`);

// The levels, on the day's first part.
const manifest = (await readManifest(shop.bucket, day))?.manifest;
const [part] = manifest?.parts ?? [];
if (!part) throw new Error("no part");
const raw = gunzipSync(Buffer.concat(await Array.fromAsync(await getStream(shop.bucket, part.key))));
const levels = [1, 2, 3, 4, 5, 6, 7, 8, 9].map((level) => {
  const started = performance.now();
  const packed = gzipSync(raw, { level });
  const seconds = (performance.now() - started) / 1000;
  return {
    "gzip level": level,
    "MB/s of raw": Math.round(raw.length / 1e6 / seconds),
    "raw : compressed": (raw.length / packed.length).toFixed(1),
  };
});
process.stdout.write(`${table(levels)}\n`);
rmSync(scratch, { recursive: true, force: true });

/** The peers of DESIGN.md section 9, installed into .stack/peers/ once. */
async function peers(): Promise<Contender[]> {
  const venv = (name: string, ...packages: string[]): string => {
    const folder = stackPath("peers", name);
    const stamp = join(folder, "installed");
    try {
      if (readFileSync(stamp, "utf8") === packages.join()) return join(folder, "bin");
    } catch {}
    say(`bench: installing ${packages.join(", ")}`);
    mkdirSync(stackPath("peers"), { recursive: true });
    execFileSync("python3", ["-m", "venv", folder], { stdio: "inherit" });
    execFileSync(join(folder, "bin", "pip"), ["install", "-q", ...packages], { stdio: "inherit" });
    writeFileSync(stamp, packages.join());
    return join(folder, "bin");
  };
  const dlt = venv("dlt", "dlt[postgres,filesystem,s3,parquet,sql-database]==1.31.0", "connectorx==0.4.4");
  const wheel = `${venv("sling", "sling-linux-amd64==1.4.11")}/python`;
  const sling = execFileSync(wheel, ["-c", "import sling_linux_amd64 as s; print(list(s.__path__)[0], end='')"], {
    encoding: "utf8",
  });
  const ingestr = venv("ingestr", "ingestr==1.1.22");
  const quiet = {
    DO_NOT_TRACK: "1",
    RUNTIME__DLTHUB_TELEMETRY: "false",
    SLING_DISABLE_TELEMETRY: "true",
    DISABLE_TELEMETRY: "true",
  };
  const clear = async (writes: string): Promise<void> =>
    removeObjects(
      shop.bucket,
      (await Array.fromAsync(listObjects(shop.bucket, place(writes)))).map(({ key }) => key),
    );
  return [
    {
      name: "dlt 1.31.0 (connectorx)",
      format: "NDJSON.gz",
      writes: "dlt/",
      run: async () => {
        await clear("dlt/");
        return await measure(join(dlt, "python"), [join(root, "test/bench/peers/dlt_events.py")], {
          ...aws,
          ...quiet,
          HOME: mkdtempSync(join(scratch, "dlt-")),
          SOURCE: source.replace("postgresql:", "postgresql+psycopg2:"),
          BUCKET_URL: `s3://${S3_BUCKET}/${place("dlt")}`,
          S3_ENDPOINT,
          NORMALIZE__DATA_WRITER__DISABLE_COMPRESSION: "false",
        });
      },
    },
    {
      name: "Sling 1.4.11",
      format: "NDJSON.gz",
      writes: "sling/",
      run: async () => {
        await clear("sling/");
        const options = JSON.stringify({ format: "jsonlines", compression: "gzip" });
        const to = `s3://${S3_BUCKET}/${place("sling/events.jsonl.gz")}`;
        return await measure(
          join(sling, "bin", "sling-linux-amd64"),
          [
            "run",
            "--src-conn",
            "PG",
            "--src-stream",
            "public.events",
            "--tgt-conn",
            "ARCHIVE",
            "--tgt-object",
            to,
            "--tgt-options",
            options,
          ],
          {
            ...quiet,
            HOME: scratch,
            PG: `${source.replace("postgresql:", "postgres:")}?sslmode=disable`,
            ARCHIVE: JSON.stringify({
              type: "s3",
              bucket: S3_BUCKET,
              access_key_id: AWS_ACCESS_KEY_ID,
              secret_access_key: AWS_SECRET_ACCESS_KEY,
              endpoint: S3_ENDPOINT,
              region: AWS_REGION,
            }),
          },
        );
      },
    },
    {
      name: "ingestr 1.1.22",
      format: "Parquet",
      writes: "ingestr/",
      run: async () => {
        await clear("ingestr/");
        const to = new URLSearchParams({
          access_key_id: AWS_ACCESS_KEY_ID,
          secret_access_key: AWS_SECRET_ACCESS_KEY,
          endpoint_url: S3_ENDPOINT,
          region: AWS_REGION,
          layout: "{table_name}.{ext}",
        });
        return await measure(
          join(ingestr, "ingestr"),
          [
            "ingest",
            "--source-uri",
            `${source}?sslmode=disable`,
            "--source-table",
            "public.events",
            "--dest-uri",
            `s3://?${to}`,
            "--dest-table",
            `${S3_BUCKET}/${place("ingestr/events")}`,
            "--yes",
            "--progress",
            "log",
          ],
          { ...quiet, HOME: scratch },
        );
      },
    },
  ];
}
