/**
 * make demo: the pipelines on the real data and the local stack, and what happened as a table. May be run again at any time.
 * It always runs on the local stack (.env.example), whatever .env says: it changes rows of the source. DEMO_ENV_FILE= names a copy of
 * .env.example with other databases, datasets, prefixes and topics: docs/readme.test.ts leaves those of the demo alone. DEMO_SMALL=1, for
 * it too, takes the first weeks of the data only.
 */
import { type ChildProcess, execFile, spawn } from "node:child_process";
import { once } from "node:events";
import { constants, copyFileSync, existsSync } from "node:fs";
import { join } from "node:path";
import { createInterface } from "node:readline";
import { setTimeout as delay } from "node:timers/promises";
import { promisify } from "node:util";
import { connectBigQuery } from "../shared/bigquery/client.ts";
import { dayPrefix } from "../shared/events/archive.ts";
import { listObjects, removeObjects } from "../shared/events/s3.ts";
import { thousands } from "../shared/log.ts";
import { main } from "../shared/main.ts";
import { table } from "../shared/table.ts";
import { changeReadings, changeSource } from "./data/change.ts";
import { loadData } from "./data/load.ts";
import { connectBucket } from "./lib/shop.ts";
import { localEnv, root } from "./stack/env.ts";
import { say } from "./stack/stack.ts";

const env = localEnv(process.env.DEMO_ENV_FILE);
const admin = env.STACK_ADMIN_DATABASE_URL ?? "";
const small = env.DEMO_SMALL === "1";

// The commands that it ends with read .env.
if (!existsSync(join(root, ".env"))) copyFileSync(join(root, ".env.example"), join(root, ".env"), constants.COPYFILE_EXCL);

/**
 * Runs a command of the project, showing what it says. Returns the fields of its last line.
 * @param heard is asked of each line whether to show it, and may kill the process.
 */
async function command(
  script: string,
  variables: NodeJS.Dict<string> = {},
  heard: (line: string, child: ChildProcess) => boolean = () => true,
): Promise<Record<string, string>> {
  const [file = "", ...args] = script.split(" ");
  const child = spawn(process.execPath, [join(root, file), ...args], {
    env: { ...env, ...variables },
    stdio: ["ignore", "inherit", "pipe"],
  });
  let last = "";
  createInterface({ input: child.stderr }).on("line", (line) => {
    last = line;
    if (heard(line, child)) process.stderr.write(`  ${line}\n`);
  });
  const [code] = await once(child, "close");
  // make status exits with 1 where something is red: here the consumer has ended, and the source writes on.
  if (code !== 0 && !child.killed && !script.endsWith("status.ts")) throw new Error(`${script} exited with ${code}`);
  return Object.fromEntries([...last.matchAll(/(\w+)=(\S+)/g)].map(([, name, value]) => [name, value]));
}

const runs: Record<string, string>[] = [];
const story: Record<string, string>[] = [];
const flow: Record<string, string>[] = [];

/** Both pipelines, with chunks that are small enough to be seen. */
async function sync(run: string): Promise<void> {
  for (const pipeline of ["orders", "users"]) {
    say(`\ndemo: ${run}: make ${pipeline} CHUNK_ROWS=50000`);
    const done = await command(`scripts/${pipeline}.ts`, { CHUNK_ROWS: "50000" });
    const { rows, chunks = "", seconds = "", rows_per_second: rate, watermark = "" } = done;
    runs.push({ pipeline, run, rows: thousands(Number(rows)), chunks, seconds, "rows/s": thousands(Number(rate)), watermark });
  }
}

/** The backfill that survives day 18 of 365. */
async function archive(): Promise<void> {
  const bucket = connectBucket(env);
  // A demo of before has archived these days; this one is to do it again.
  const old = await Array.fromAsync(listObjects(bucket, dayPrefix(bucket, "2017-").slice(0, -1)));
  await removeObjects(
    bucket,
    old.map(({ key }) => key),
  );
  const year = { FROM: "2017-01-01", TO: small ? "2017-02-01" : "2018-01-01" };
  const tell = (archive: string, { days = "", rows, seconds = "" }: Record<string, string>) =>
    story.push({ archive, days, rows: thousands(Number(rows)), seconds });
  let days = 0;

  say(`\ndemo: make backfill-events FROM=${year.FROM} TO=${year.TO}, killed with SIGKILL at day 18`);
  const started = performance.now();
  let rows = 0;
  await command("scripts/ops/backfill-events.ts", year, (line, child) => {
    if (days === 18) return false; // of what was said before it was killed
    rows += Number(/step=day .*rows=(\d+)/.exec(line)?.[1] ?? 0);
    if (line.includes("step=day") && ++days === 18) child.kill("SIGKILL");
    return !line.includes("step=day") || days <= 3 || days === 18;
  });
  tell("killed at day 18", { days: `${days}`, rows: `${rows}`, seconds: ((performance.now() - started) / 1000).toFixed(3) });

  say("\ndemo: the same command again");
  const resumed = await command("scripts/ops/backfill-events.ts", year, (line) => {
    return !line.includes("step=day ") || /day=2017-..-01/.test(line);
  });
  tell("resumed", { ...resumed, days: resumed.chunks ?? "" });

  say(`\ndemo: make verify-events FROM=${year.FROM} TO=${year.TO}: every part read back, against manifests and source`);
  tell("verified", await command("scripts/ops/verify-events.ts", year));
  const few = small ? { FROM: "2017-01-02", TO: "2017-01-05" } : { FROM: "2017-12-24", TO: "2017-12-27" };
  say(`\ndemo: make restore-events FROM=${few.FROM} TO=${few.TO}`);
  tell("restored", await command("scripts/ops/restore-events.ts", few));
  say("\ndemo: make events: from now on every day that ends");
  await command("scripts/events.ts");
  bucket.client.destroy();
}

/** Readings flow while they change; meanwhile every row of each source is compared with its destination. */
async function sensors(): Promise<void> {
  say("\ndemo: make connector: Debezium reads sensor_readings, first a snapshot, then every change");
  await command("scripts/ops/connector.ts");
  say("\ndemo: make sensors, and meanwhile readings are inserted, updated and deleted");
  let consumer: ChildProcess | undefined;
  const consuming = command("scripts/sensors.ts", { METRICS_PORT: "0" }, (_, child) => {
    consumer = child;
    return true;
  });
  consuming.catch(() => {}); // told by the race below
  const changed = await changeReadings(admin, Date.now() % 1_000_000);
  say(`demo: ${thousands(changed)} readings were inserted, updated, moved and deleted`);
  say("\ndemo: make verify: source and destination agree, row by row and column by column");
  await Promise.race([command("scripts/ops/verify.ts"), consuming]).finally(() => consumer?.kill("SIGTERM"));
  const { rows, batches = "", dead_letters: dead = "", seconds = "" } = await consuming;
  flow.push({ sensors: "snapshot and changes", rows: thousands(Number(rows)), batches, "dead letters": dead, seconds });
}

/** The weekly models, and one of them as a person would look at it. */
async function models(): Promise<void> {
  say("\ndemo: make views: twelve models from one state of orders and users, each checked before it is published");
  await command("scripts/views.ts");
  const { BIGQUERY_PROJECT = "", BIGQUERY_VIEWS_DATASET: datasetId = "", BIGQUERY_LOCATION = "", BIGQUERY_ENDPOINT } = env;
  const bigquery = connectBigQuery({ BIGQUERY_PROJECT, BIGQUERY_DATASET: datasetId, BIGQUERY_LOCATION, BIGQUERY_ENDPOINT });
  say("\ndemo: the last five weeks of 2017 (weekly_summary)");
  const columns = "order_count as orders, revenue, refunds, basket_value, active_users, new_users, repeat_share";
  // The real data's weeks, whatever earlier demos have sold since.
  const query = `select string(week) as week, ${columns} from weekly_summary where week < date '2018-01-01' order by week desc limit 5`;
  const [rows] = await bigquery.query({ query, defaultDataset: { datasetId } });
  process.stdout.write(`${table(rows)}\n`);
}

await main(import.meta, async () => {
  say("demo: starting the local stack (make up)");
  await command("test/stack/up.ts --without=real-data");
  say("\ndemo: the real data (make data)");
  const loaded = await loadData(admin, { ...(small && { maxRows: 60_000 }), log: (line) => say(`  ${line}`) });
  // Rows that were loaded only now, with timestamps of 2017, may be behind a watermark of earlier runs.
  const { stdout } = await promisify(execFile)(process.execPath, [join(root, "scripts/ops/status.ts")], {
    env: { ...env, JSON: "1" },
  }).catch((error: { stdout: string }) => error); // exit code 1: something is red, such as a demo of yesterday
  for (const { pipeline, watermark } of JSON.parse(stdout)) {
    if (loaded && watermark && pipeline !== "events") await command("scripts/ops/rewind.ts", { PIPELINE: pipeline, TO: "2017-01-01" });
  }
  await sync("everything so far");

  await changeSource(admin, { orders: 500, users: 50, newOrders: 20, seed: Date.now() % 1_000_000 });
  say("\ndemo: the shop goes on: 500 orders changed, 20 new, 50 users changed");
  say(`demo: waiting ${env.WATERMARK_LAG_SECONDS} s: rows younger than WATERMARK_LAG_SECONDS are left for the next run`);
  await delay(Number(env.WATERMARK_LAG_SECONDS) * 1000);
  await sync("what changed");
  await sync("nothing new");
  await archive();
  await sensors();

  say("\ndemo: what happened");
  process.stdout.write(`${table(runs)}\n\n`);
  process.stdout.write(`${table(story)}\n\n${table(flow)}\n`);
  await models();
  say("\ndemo: make status");
  await command("scripts/ops/status.ts");
  await command("scripts/ops/report.ts");
  say(`\nThe same and more, on one page: ${join(root, "report.html")}`);
  say("\nThe stack keeps running: try make orders, make status, make rewind PIPELINE=orders TO=2017-12-01; make down stops it.");
});
