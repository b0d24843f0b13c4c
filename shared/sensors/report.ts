/** What the consumer says of itself: metrics and /healthz at METRICS_PORT, and a line every ten seconds. */
import { once } from "node:events";
import { createServer } from "node:http";
import type { AddressInfo } from "node:net";
import { setTimeout as delay } from "node:timers/promises";
import { Counter, collectDefaultMetrics, Gauge, Histogram, Registry } from "prom-client";
import { log } from "../log.ts";
import { openSession } from "../session.ts";
import type { CanaryState } from "./canary.ts";
import { type ConnectEnv, isRunning, namesOf, sourceTable } from "./connector.ts";
import type { PartitionState } from "./epoch.ts";

type ReportEnv = ConnectEnv & { METRICS_PORT: number; SOURCE_DATABASE_URL: string };

type Lag = () => Promise<PartitionState[]>;
type Canary = () => Promise<CanaryState | undefined>;

/** A canary that is older is stale: /healthz answers 503. */
const STALE_SECONDS = 300;

/** @param lag asks Kafka. @param canary asks schema etl. @throws Error where the port is taken. */
export async function createReport(env: ReportEnv, lag: Lag, canary: Canary) {
  const metrics = createMetrics(env, lag, canary);
  const server = await serve(env.METRICS_PORT, metrics.registry, canary);
  const { port } = server.address() as AddressInfo;
  log({ step: "serving", metrics: `http://127.0.0.1:${port}/metrics` });
  const started = performance.now();
  const total = { rows: 0, batches: 0, dead_letters: 0 };
  let [said, saidRows, waitingSince, unknown] = [started, 0, 0, ""];
  const rate = (rows: number, since: number): number => Math.round((rows * 1000) / (performance.now() - since));
  return {
    unknownColumns: (columns: string[]): void => {
      metrics.unknownColumns.set(columns.length);
      const warning = `${sourceTable} has columns that sensor_readings does not have; their values are kept in _unknown`;
      if (columns.join() !== unknown) log({ step: "warning", warning, columns: columns.join() });
      unknown = columns.join();
    },
    /** A batch was inserted, and its dead letters counted. */
    inserted: (messages: { value: Buffer | null }[], dead: number, seconds: number): void => {
      const rows = messages.filter(({ value }) => value).length - dead;
      total.rows += rows;
      total.batches += 1;
      total.dead_letters += dead;
      metrics.rows.inc(rows);
      metrics.batches.inc();
      metrics.deadLetters.inc(dead);
      metrics.insertSeconds.observe(seconds);
      if (performance.now() - said < 10_000) return;
      const rows_per_second = rate(total.rows - saidRows, said);
      log({ step: "inserted", ...total, rows_per_second });
      [said, saidRows] = [performance.now(), total.rows];
    },
    /** The server is away, or is up again. */
    waiting: (server: string, error?: Error): void => {
      metrics.away.set(error ? 1 : 0);
      if (error && !waitingSince) log({ step: "waiting", for: server, error: error.message.slice(0, 300) });
      if (!error && waitingSince) log({ step: "back", waited_seconds: Math.round((performance.now() - waitingSince) / 1000) });
      waitingSince = error ? waitingSince || performance.now() : 0;
    },
    done: (): void => {
      const seconds = Math.round(performance.now() - started) / 1000;
      const peak_rss_mb = Math.round(process.resourceUsage().maxRSS / 1024);
      log({ step: "done", ...total, seconds, rows_per_second: rate(total.rows, started), peak_rss_mb });
    },
    [Symbol.asyncDispose]: async () => {
      server.closeAllConnections();
      server.close();
    },
  };
}

async function serve(port: number, registry: Registry, canary: Canary) {
  const server = createServer(async (request, response) => {
    const path = request.url?.split("?")[0];
    if (path === "/metrics") response.setHeader("content-type", registry.contentType).end(await registry.metrics());
    else if (path === "/healthz") {
      const { age_seconds: age = 0, gap = null } = (await canary().catch(() => undefined)) ?? {};
      const fault = age > STALE_SECONDS ? `no canary from the source for ${Math.round(age)} s` : gap;
      response.writeHead(fault ? 503 : 200).end(`${fault ?? "ok"}\n`);
    } else response.writeHead(404).end("only /metrics and /healthz exist\n");
  });
  await once(server.listen(port), "listening").catch((error: Error) => {
    throw new Error(`METRICS_PORT ${port}: ${error.message}. Is another consumer running here? Choose another port`);
  });
  return server;
}

function createMetrics(env: ReportEnv, lag: Lag, canary: Canary) {
  const registry = new Registry();
  const registers = [registry];
  collectDefaultMetrics({ register: registry });
  const counter = (name: string, help: string): Counter => new Counter({ name, help, registers });
  const gauge = (name: string, help: string): Gauge => new Gauge({ name, help, registers });
  /** Others are asked at each scrape. Where they do not answer within 3 s, what was known stays. */
  const asked = (name: string, help: string, ask: (gauge: Gauge) => Promise<void>, labelNames: string[] = []) =>
    new Gauge({
      name,
      help,
      registers,
      labelNames,
      collect() {
        return Promise.race([ask(this).catch(() => {}), delay(3000, undefined, { ref: false })]);
      },
    });
  const askLag = async (gauge: Gauge): Promise<void> => {
    for (const { partition, lag: messages } of await lag()) gauge.set({ partition: String(partition) }, messages);
  };
  asked("etl_sensors_lag", "Messages that the group has not committed yet.", askLag, ["partition"]);
  asked("etl_sensors_connector_running", "1 while Debezium's connector and its task run.", async (gauge) =>
    gauge.set((await isRunning(env).catch(() => false)) ? 1 : 0),
  );
  asked("etl_sensors_slot_retained_bytes", "WAL that the source keeps for the connector's slot.", async (gauge) => {
    await using source = openSession(env.SOURCE_DATABASE_URL, { application: "etl:sensors", timeoutSeconds: 3 });
    const [slot] = await source<{ bytes: string }[]>`
      select pg_wal_lsn_diff(pg_current_wal_lsn(), restart_lsn) as bytes from pg_replication_slots
      where slot_name = ${namesOf(env).slot}`;
    if (slot) gauge.set(Number(slot.bytes));
  });
  const stale = "When the source wrote the last canary that came.";
  asked("etl_sensors_canary_timestamp_seconds", stale, async (gauge) => {
    const state = await canary();
    if (state) gauge.set(Date.now() / 1000 - state.age_seconds);
  });
  asked("etl_sensors_canary_gap", "1 where changes of the source never came.", async (gauge) => gauge.set((await canary())?.gap ? 1 : 0));
  return {
    registry,
    rows: counter("etl_sensors_rows_total", "Changes inserted."),
    batches: counter("etl_sensors_batches_total", "Batches inserted, each by one insert."),
    deadLetters: counter("etl_sensors_dead_letters_total", "Messages that are not valid changes: dead letters."),
    insertSeconds: new Histogram({
      name: "etl_sensors_insert_seconds",
      help: "Duration of a batch's insert, waiting for ClickHouse included.",
      buckets: [0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100],
      registers,
    }),
    away: gauge("etl_sensors_clickhouse_away", "1 while a batch waits for ClickHouse, or for schema etl."),
    unknownColumns: gauge("etl_sensors_unknown_source_columns", "Columns of the source that are kept in _unknown."),
  };
}
