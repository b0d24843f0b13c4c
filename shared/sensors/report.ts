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
  const metrics = createMetrics();
  await serve(env.METRICS_PORT, canary, async () => {
    await askOthers(metrics, env, lag, canary).catch(() => {}); // a scrape ends nothing
    return await metrics.registry.metrics();
  });
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
      log({ step: "inserted", ...total, rows_per_second: rate(total.rows - saidRows, said) });
      [said, saidRows] = [performance.now(), total.rows];
    },
    /** ClickHouse is away, or takes batches again. */
    waiting: (error?: Error): void => {
      metrics.away.set(error ? 1 : 0);
      if (error && !waitingSince) log({ step: "waiting", for: "ClickHouse", error: error.message.slice(0, 300) });
      if (!error && waitingSince) log({ step: "back", waited_seconds: Math.round((performance.now() - waitingSince) / 1000) });
      waitingSince = error ? waitingSince || performance.now() : 0;
    },
    done: (): void => {
      const seconds = Math.round(performance.now() - started) / 1000;
      const peak_rss_mb = Math.round(process.resourceUsage().maxRSS / 1024);
      log({ step: "done", ...total, seconds, rows_per_second: rate(total.rows, started), peak_rss_mb });
    },
  };
}

async function serve(port: number, canary: Canary, metrics: () => Promise<string>): Promise<void> {
  const server = createServer(async (request, response) => {
    const path = request.url?.split("?")[0];
    if (path === "/metrics") response.setHeader("content-type", Registry.PROMETHEUS_CONTENT_TYPE).end(await metrics());
    else if (path === "/healthz") {
      const { age_seconds: age = 0, gap = null } = (await canary().catch(() => undefined)) ?? {};
      const fault = age > STALE_SECONDS ? `no canary from the source for ${Math.round(age)} s` : gap;
      response.writeHead(fault ? 503 : 200).end(`${fault ?? "ok"}\n`);
    } else response.writeHead(404).end("only /metrics and /healthz exist\n");
  });
  await once(server.listen(port), "listening").catch((error: Error) => {
    throw new Error(`METRICS_PORT ${port}: ${error.message}. Is another consumer running here? Choose another port`);
  });
  log({ step: "serving", metrics: `http://127.0.0.1:${(server.address() as AddressInfo).port}/metrics` });
}

function createMetrics() {
  const registry = new Registry();
  const registers = [registry];
  collectDefaultMetrics({ register: registry });
  const counter = (name: string, help: string) => new Counter({ name, help, registers });
  const gauge = (name: string, help: string, labelNames: string[] = []) => new Gauge({ name, help, registers, labelNames });
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
    away: gauge("etl_sensors_clickhouse_away", "1 while a batch waits for ClickHouse."),
    unknownColumns: gauge("etl_sensors_unknown_source_columns", "Columns of the source that are kept in _unknown."),
    lag: gauge("etl_sensors_lag", "Messages that the group has not committed yet.", ["partition"]),
    connectorRunning: gauge("etl_sensors_connector_running", "1 while Debezium's connector and its task run."),
    slotBytes: gauge("etl_sensors_slot_retained_bytes", "WAL that the source keeps for the connector's slot."),
    canaryTime: gauge("etl_sensors_canary_timestamp_seconds", "When the source wrote the last canary that came."),
    canaryGap: gauge("etl_sensors_canary_gap", "1 where changes of the source never came."),
  };
}

/** Others are asked at each scrape. What they do not answer within 3 s stays as it was; a connector that is not known does not run. */
async function askOthers(metrics: ReturnType<typeof createMetrics>, env: ReportEnv, lag: Lag, canary: Canary): Promise<void> {
  const answer = <T>(asked: Promise<T>) => Promise.race([asked.catch(() => {}), delay(3000, undefined, { ref: false })]);
  const askSlot = async () => {
    await using source = openSession(env.SOURCE_DATABASE_URL, { application: "etl:sensors", timeoutSeconds: 3 });
    return await source`
      select coalesce(pg_wal_lsn_diff(pg_current_wal_lsn(), restart_lsn), 0)::float8 as bytes -- a lost slot keeps none
      from pg_replication_slots where slot_name = ${namesOf(env).slot}`;
  };
  const asked = [answer(lag()), answer(isRunning(env)), answer(askSlot()), answer(canary())] as const;
  const [partitions, running, slots, last] = await Promise.all(asked);
  for (const { partition, lag: messages } of partitions ?? []) metrics.lag.set({ partition: String(partition) }, messages);
  metrics.connectorRunning.set(running ? 1 : 0);
  if (slots?.[0]) metrics.slotBytes.set(slots[0].bytes);
  if (last) metrics.canaryTime.set(Date.now() / 1000 - last.age_seconds);
  if (last) metrics.canaryGap.set(last.gap ? 1 : 0);
}
