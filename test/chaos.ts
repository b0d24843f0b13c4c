/**
 * chaos: all five jobs at once on a whole stack of its own, with live writers on the source, while real faults hit at random. At the
 * end the writers stop, the faults are healed, each job runs once, and source and destinations must be the same: test/README.md.
 *
 *   make chaos MINUTES=10 SEED=7     the schedule of the faults follows from the seed: a failing one replays it (default: a new one)
 *   make chaos BREAK=guard           with a promise switched off in the copy that runs, by test/chaos/breaks/guard.patch. It must fail
 *
 *   exit code  0 all of it holds; 1 it does not; 2 wrong arguments
 *
 * Touches nothing but its own copy, ports and processes; needs what make up installs. Ctrl-C leaves nothing behind.
 */
import assert from "node:assert/strict";
import { appendFileSync, globSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { basename, join } from "node:path";
import { setTimeout as delay } from "node:timers/promises";
import { UsageError } from "../shared/env.ts";
import { addDays } from "../shared/events/archive.ts";
import { thousands } from "../shared/log.ts";
import { main } from "../shared/main.ts";
import { table } from "../shared/table.ts";
import { about, applyBreak, breaks } from "./chaos/breaks.ts";
import { createSchedule, type Fault, type Job } from "./chaos/schedule.ts";
import { createStack, type LinkName, type PrivateStack, type ServerName, servers, withFullDisk } from "./chaos/stack.ts";
import { startWriters } from "./chaos/writers.ts";
import { createStackSource } from "./data/source.ts";
import { createSensors } from "./lib/sensors.ts";
import type { Process, Result, Shop } from "./lib/shop.ts";
import type { Env } from "./stack/env.ts";
import { say } from "./stack/stack.ts";

const postgresJs = /postgres\/src\/connection\.js/;

/** A job that needs the server. */
const usedBy: Record<ServerName, Job> = {
  postgres: "orders",
  bigquery: "users",
  clickhouse: "sensors",
  kafka: "sensors",
  connect: "sensors",
  s3: "events",
  pushgateway: "views",
};

/** Where a job's rows go. */
const destination = (job: Job): LinkName => (job === "events" ? "S3_ENDPOINT" : job === "sensors" ? "CLICKHOUSE_URL" : "BIGQUERY_ENDPOINT");

/** Of a short campaign. */
const fewModels = /^(weekly_revenue|lifetime_value|income_band_revenue)(__|\.)/;

/** The events' days, three a block, the oldest in the last one. */
const blocks = 10;
const today = new Date().toISOString().slice(0, 10);
const blockDays = (FROM: number, TO: number): Env => ({ FROM: addDays(today, -3 * FROM), TO: addDays(today, -3 * TO) });
/** Several parts a day. */
const parts = { CHUNK_ROWS: "200" };
const backfill = { ...parts, CONCURRENCY: "2" };

const begun = performance.now();
const seconds = (): string => ((performance.now() - begun) / 1000).toFixed(1).padStart(6);
const tell = (text: string): void => say(`${seconds()} s  ${text}`);

await main(import.meta, async () => {
  const { MINUTES = "10", SEED = String(Date.now() % 1_000_000), BREAK } = process.env;
  const [minutes, seed] = [Number(MINUTES), Number(SEED)];
  if (!(minutes > 0 && minutes <= 1440)) throw new UsageError(`MINUTES=${MINUTES} must be a number of at most 1440`);
  if (!Number.isSafeInteger(seed) || seed < 0) throw new UsageError(`SEED=${SEED} must be a whole number`);
  if (BREAK && !breaks.includes(BREAK)) throw new UsageError(`BREAK=${BREAK}: there are ${breaks.join(", ")}`);
  say(`chaos: SEED=${seed} MINUTES=${minutes}${BREAK ? ` BREAK=${BREAK} (without ${about(BREAK)})` : ""}`);
  const again = `make chaos MINUTES=${MINUTES} SEED=${seed}${BREAK ? ` BREAK=${BREAK}` : ""}`;
  for (const signal of ["SIGINT", "SIGTERM"])
    process.on(signal, () => {
      say(`chaos: stopped by ${signal}. The same again: ${again}`);
      process.exit(1);
    });
  // postgres.js writes to a socket that is gone. Scripts end by that, with exit code 1; the writers go on.
  const [fail] = process.listeners("uncaughtException");
  process.removeAllListeners("uncaughtException").on("uncaughtException", (error, origin) => {
    if (!(error instanceof TypeError && postgresJs.test(error.stack ?? ""))) fail?.(error, origin);
  });
  const stack = await createStack((scratch) => {
    if (BREAK) applyBreak(BREAK, scratch.folder);
    // All twelve take half a minute.
    for (const file of minutes < 2 ? globSync(join(scratch.folder, "views/**/*.sql")) : [])
      if (!fewModels.test(basename(file))) rmSync(file);
  });
  say(`chaos: its stack is in ${stack.scratch.folder}`);
  const log = join(tmpdir(), `etl-chaos-${seed}.log`);
  rmSync(log, { force: true });
  await campaign(stack, seed, minutes * 60, log).catch((error: Error) => {
    const said = error instanceof assert.AssertionError ? error.message : error.stack;
    throw new Error(`${said}\nWhat each run said: ${log}\nThe same again: ${again}`);
  });
  rmSync(log, { force: true });
  process.exit(); // the links listen
});

async function campaign(stack: PrivateStack, seed: number, length: number, log: string): Promise<void> {
  // 1. The stack, and a shop in it.
  const serve = (name: ServerName) => stack.start(name).then(() => tell(`${name} serves`));
  await Promise.all(servers.filter((name) => name !== "connect").map(serve));
  await serve("connect"); // it needs Kafka
  await createStackSource(stack.env);
  const sensors = await createSensors({ lag: 0.5, stack: stack.env, folder: stack.scratch.folder });
  const { shop } = sensors;
  const { admin, env } = shop;
  await shop.succeed("scripts/ops/migrate.ts"); // the bucket: this stack has none yet
  Object.assign(env, stack.variables(env), { RUN_TIMEOUT_SECONDS: "60", CHUNK_ROWS: "500" });
  await fill(shop);

  // 2. The jobs. Each run is remembered while it goes on, and counted when it has ended.
  const tally = new Map<string, Record<"runs" | "succeeded" | "failed" | "killed" | "skipped" | "retries", number>>();
  const wrong: string[] = [];
  const running = new Map<string, Set<Process>>();
  const start = async (job: Job, variables: Env = {}): Promise<Result> => {
    const count = tally.get(job) ?? { runs: 0, succeeded: 0, failed: 0, killed: 0, skipped: 0, retries: 0 };
    tally.set(job, count);
    const run = shop.start(variables.FROM ? `scripts/ops/backfill-${job}.ts` : `scripts/${job}.ts`, variables);
    const mine = running.get(job) ?? new Set();
    running.set(job, mine.add(run));
    const result = await run.ended;
    const { code, signal, stderr } = result;
    mine.delete(run);
    count.runs += 1;
    count.retries += [...stderr.matchAll(/ step=(retry|waiting) /g)].length;
    count[signal ? "killed" : code ? "failed" : / step=skipped /.test(stderr) ? "skipped" : "succeeded"] += 1;
    appendFileSync(log, `${seconds()} s  ${job} ${JSON.stringify(variables)}: ${signal ?? `exit ${code}`}\n${stderr}\n\n`);
    // 2 would be: a person has to change something; and faults of others are no programming errors.
    if (code === 2 || (/TypeError|ReferenceError/.test(stderr) && !postgresJs.test(stderr)))
      wrong.push(`${job} exited ${code}:\n${stderr}`);
    return result;
  };
  await Promise.all([sensors.connector(), start("orders"), start("users")]); // by their links
  const over = new AbortController();
  const wait = (time: number): Promise<unknown> => delay(time * 1000, undefined, { signal: over.signal }).catch(() => {});
  /** As cron does: again while the run before has not ended, but not ever more of them. */
  const cron = async (job: Job, pause: number, work: () => Promise<unknown> = () => start(job)): Promise<void> => {
    for (; !over.signal.aborted; await wait(pause)) if ((running.get(job)?.size ?? 0) < 2) await Promise.race([work(), wait(2)]);
  };
  const archiveNext = createDays(shop, async (variables) => (over.signal.aborted ? null : (await start("events", variables)).code));
  const loops = [cron("orders", 0.5), cron("users", 2), cron("events", 1, archiveNext), cron("views", 10)];
  let drained = false;
  const consumers = [1, 2].map(async () => {
    for (; !drained; await delay(500)) await start("sensors");
  });

  // 3. The writers, and the faults as their schedule says.
  const writers = startWriters(shop.connect, seed, 12);
  const restart = `${env.CONNECT_URL}/connectors/etl-${env.CLICKHOUSE_DATABASE}-sensor_readings/restart?includeTasks=true`;
  const restartConnector = () => fetch(restart, { method: "POST" }).catch(() => {}); // its worker may be down
  const hit = createFaults(stack, { running, start, wait, restartConnector });
  const from = performance.now();
  const faults = createSchedule(seed, length).map(async (fault) => {
    await wait(fault.at - (performance.now() - from) / 1000);
    if (over.signal.aborted) return;
    const { at, kind, target, seconds: lasts } = fault;
    tell(`${at.toFixed(1)} ${kind} ${target} (${lasts.toFixed(1)} s)`);
    await hit(fault);
  });
  const busy = Promise.all([...faults, ...loops]);
  await Promise.race([delay(length * 1000), busy]);

  // 4. The writers stop, the faults are healed.
  tell("the writers stop, the faults are healed");
  over.abort();
  const left = [...running].flatMap(([job, going]) => (job === "sensors" ? [] : [...going]));
  for (const { child } of left) child.kill("SIGTERM");
  await Promise.all([busy, writers.stop(), ...left.map(({ ended }) => ended)]);

  // 5. Each job runs once.
  const once = async (script: string, variables: Env = {}): Promise<Result> => {
    const result = await shop.succeed(script, variables);
    tell(`${script} ${Object.entries(variables).map((pair) => pair.join("="))} done`);
    return result;
  };
  const synced = async (PIPELINE: string): Promise<void> => {
    await once(`scripts/${PIPELINE}.ts`);
    await once("scripts/ops/sweep.ts", { PIPELINE, CONFIRM: "1" });
  };
  const drain = async (): Promise<void> => {
    await sensors.connector();
    await sensors.drained(120);
    drained = true;
    for (const { child } of running.get("sensors") ?? []) child.kill("SIGTERM");
    await Promise.all(consumers);
    await once("scripts/sensors.ts", { UNTIL: "caught-up" });
  };
  const archive = async (): Promise<void> => {
    await once("scripts/events.ts");
    await once("scripts/ops/backfill-events.ts", { ...blockDays(blocks, 0), ...backfill });
  };
  await delay(600); // the lag
  await Promise.all([synced("orders").then(() => synced("users")), drain(), archive()]);
  await once("scripts/views.ts");

  // 6. Everything is the same. A consumer runs: verify waits for what is on its way, of which canaries always are.
  const consumer = shop.start("scripts/sensors.ts");
  const verified = await once("scripts/ops/verify.ts", { LIMIT: "50" });
  consumer.child.kill("SIGTERM");
  await consumer.ended;
  process.stdout.write(verified.stdout);
  const rows: Record<string, number> = {};
  for (const [, pipeline = "", compared] of verified.stderr.matchAll(/pipeline=(\w+) .*step=compared rows=(\d+)/g))
    rows[pipeline] = Number(compared);
  const [there] = await admin`select (select count(*)::int from orders) as orders, (select count(*)::int from users) as users`;
  assert.deepEqual({ orders: rows.orders, users: rows.users }, { ...there }, "rows were left out of the comparison");
  rows.events = Number(/ step=done .*rows=(\d+)/.exec((await once("scripts/ops/verify-events.ts", blockDays(blocks, 0))).stderr)?.[1]);
  assert.deepEqual(await sensors.deadLetters(), []);
  rows.models = await compareModels(shop, globSync(join(stack.scratch.folder, "views/*.sql")), once);
  assert.deepEqual(wrong, [], "runs that ended as no fault should end them");
  const total = Object.values(rows).reduce((sum, count) => sum + count, 0);
  process.stdout.write(`\n${table([...tally].map(([job, counts]) => ({ job, ...counts })))}\n`);
  say(
    `chaos: SEED=${seed}: passed. ${thousands(total)} rows checked, ${thousands(writers.count.committed)} transactions ` +
      `(${JSON.stringify(writers.count)})`,
  );
}

/** Rows to begin with. */
async function fill({ admin }: Shop): Promise<void> {
  await admin`
    insert into orders (id, user_id, store_id, status, item_count, total, discount, created_at)
    select i, case when i < 200 then 200 + i % 100 else i % 200 end, i % 10, 'completed', 1 + i % 7, i % 10000 / 100.0, i % 3,
      timestamptz '2017-01-02' + i * interval '100 minutes'
    from generate_series(1, 2000) i`;
  await admin`
    insert into users (id, age_band, income_band, created_at)
    select i, '45-54', i % 12 || 'K', timestamptz '2017-01-02' + i * interval '1 hour' from generate_series(1, 300) i`;
  await admin`
    insert into sensor_readings (id, sensor_id, metric, value, recorded_at)
    select i, 'S' || i % 5, 'temp', i, timestamptz '2024-01-01' + i % 50 * interval '1 hour' from generate_series(1, 2000) i`;
  await admin`
    insert into events (user_id, type, payload, created_at)
    select i, 'purchase', jsonb_build_object('n', i, 'text', md5(i::text)),
      ${blockDays(blocks, 0).FROM ?? ""}::text::timestamptz + i * interval '3 minutes'
    from generate_series(1, ${blocks * 3 * 480 - 1}::int) i`;
}

/** Archives block after block, each by a daily run or a backfill until it has succeeded; each third time those before it again. */
function createDays({ run }: Shop, archive: (variables: Env) => Promise<number | null>): () => Promise<void> {
  let done = 0;
  return async () => {
    const due = (done % blocks) + 1;
    const block = blockDays(due, due - 1);
    const daily = due % 2 === 0 && (await run("scripts/ops/rewind.ts", { PIPELINE: "events", TO: block.FROM })).code === 0;
    if ((await archive(daily ? parts : { ...block, ...backfill, ...(done >= blocks && { FORCE: "1" }) })) !== 0) return;
    done += 1;
    if (due % 3 === 0) await archive({ ...blockDays(due, due - 2), ...backfill, FORCE: "1" });
  };
}

interface Runs {
  running: Map<string, Set<Process>>;
  start(job: Job): Promise<Result>;
  /** So many seconds, or until the campaign is over. */
  wait(seconds: number): Promise<unknown>;
  /** With its task. */
  restartConnector(): Promise<unknown>;
}

/** Does to the stack what a fault says, and undoes it. */
function createFaults(
  { links, kill, start: startServer, signal }: PrivateStack,
  { running, start, wait, restartConnector }: Runs,
): (fault: Fault) => Promise<unknown> {
  /** One thing at a time is done to a server. */
  const queues = new Map<string, Promise<unknown>>();
  const inTurn = (name: string, work: () => Promise<unknown>): Promise<unknown> => {
    const turn = (queues.get(name) ?? Promise.resolve()).then(work);
    queues.set(name, turn);
    return turn;
  };
  const victim = async (job: string, after: number): Promise<Process | undefined> => {
    for (let tries = 0; tries < 100 && !running.get(job)?.size; tries++) await wait(0.05);
    await wait(after);
    return [...(running.get(job) ?? [])][0];
  };
  /** Kills a job in the middle of what it sends: that arrives later, by itself. */
  const killSending = async (job: Job, { after, writes, seconds }: Fault, what = /^(POST|PUT|DELETE) /): Promise<void> => {
    await victim(job, after);
    const link = links[destination(job)];
    link.after(writes, what, () => {
      const sending = running.get(job) ?? new Set(); // one of them; two may run
      if (!sending.size) return;
      link.stall(wait(5 + seconds)); // until another run has been there
      tell(`killed ${job} in mid-request`);
      for (const { child } of sending) child.kill("SIGKILL");
    });
  };
  return async (fault) => {
    const { kind, target, seconds, after, latency, both } = fault;
    const [server, link] = [target as ServerName, links[target as LinkName]];
    switch (kind) {
      case "kill script":
        if (both) return await killSending(target as Job, fault);
        return (await victim(target, after))?.child.kill("SIGKILL");
      case "late merge": // rows of an old version arrive after newer ones
        return await killSending(target as Job, { ...fault, after: 0, writes: 1 }, new RegExp(`MERGE .*${target}`));
      case "restart connector":
        return await restartConnector();
      case "freeze script": {
        const frozen = await victim(target, after);
        if (!frozen?.child.kill("SIGSTOP")) return;
        if (both) links.ETL_DATABASE_URL.cut();
        await wait(seconds);
        return frozen.child.kill("SIGCONT");
      }
      case "kill server":
      case "pushgateway outage":
      case "disk full":
        return await inTurn(target, async () => {
          await kill(server);
          if (kind === "disk full") await startServer(server, withFullDisk);
          await wait(seconds);
          // Those that wait for it go too, with what they hold.
          if (both && kind === "kill server") for (const { child } of running.get(usedBy[server]) ?? []) child.kill("SIGKILL");
          await kill(server);
          await startServer(server);
        });
      case "freeze server":
        return await inTurn(target, async () => {
          signal(server, "SIGSTOP");
          await wait(seconds);
          signal(server, "SIGCONT");
        });
      case "cut connections":
        link.refuse();
        await wait(seconds / 2);
        return await link.pass();
      case "latency":
        link.latency = latency;
        await wait(seconds);
        link.latency = 0;
        return;
      case "stall":
        return link.stall(wait(seconds));
      case "double fire":
        return await Promise.all([start(target as Job), start(target as Job)]);
    }
  };
}

/** The published models are those of a fresh build. @returns their rows. */
async function compareModels(
  { dataset, query }: Shop,
  files: string[],
  once: (script: string, variables: Env) => Promise<unknown>,
): Promise<number> {
  const fresh = { BIGQUERY_VIEWS_DATASET: `${dataset}_fresh` };
  await once("scripts/ops/migrate.ts", fresh);
  await once("scripts/views.ts", fresh);
  let rows = 0;
  for (const file of files) {
    const model = basename(file, ".sql");
    const [published, again] = await Promise.all(
      ["warehouse", "fresh"].map((of) => query(`SELECT TO_JSON_STRING(t) AS row FROM ${dataset}_${of}.${model} AS t ORDER BY row`)),
    );
    assert.deepEqual(published, again, `${model}: what is published is not what a fresh build makes`);
    rows += published?.length ?? 0;
  }
  return rows;
}
