/** What the consumer says of itself: metrics and /healthz at METRICS_PORT, and a line every ten seconds. */
import { once } from "node:events";
import { createServer } from "node:http";
import type { AddressInfo } from "node:net";
import { setTimeout as delay } from "node:timers/promises";
import { Counter, collectDefaultMetrics, Gauge, Histogram, Registry } from "prom-client";
import { log } from "../log.ts";
import { connect } from "../session.ts";
import { type ConnectEnv, isRunning, namesOf } from "./connector.ts";
import type { PartitionState } from "./epoch.ts";
import type { Batch } from "./kafka.ts";

type ReportEnv = ConnectEnv & { METRICS_PORT: number; SOURCE_DATABASE_URL: string };

/** @param lag asks Kafka. @throws Error where the port is taken. */
export async function createReport(env: ReportEnv, lag: () => Promise<PartitionState[]>) {
  const metrics = createMetrics(env, lag);
  const server = await serve(env.METRICS_PORT, metrics.registry);
  const { port } = server.address() as AddressInfo;
  log({ step: "serving", metrics: `http://127.0.0.1:${port}/metrics` });
  const started = performance.now();
  const total = { rows: 0, batches: 0, dead_letters: 0 };
  let [said, saidRows, waitingSince] = [started, 0, 0];
  const rate = (rows: number, since: number): number => Math.round((rows * 1000) / (performance.now() - since));
  return {
    unknownColumns: (columns: string[]): void => metrics.unknownColumns.set(columns.length),
    /** A batch was inserted, and its dead letters counted. */
    inserted: ({ messages }: Batch, dead: number, seconds: number): void => {
      const rows = messages.filter(({ value }) => value).length - dead;
      total.rows += rows;
      total.batches += 1;
      total.dead_letters += dead;
      metrics.rows.inc(rows);
      metrics.batches.inc();
      metrics.deadLetters.inc(dead);
      metrics.insertSeconds.observe(seconds);
      const age = ageOf(messages.at(-1)?.value);
      if (age !== undefined) metrics.eventAge.set(age);
      if (performance.now() - said < 10_000) return;
      const rows_per_second = rate(total.rows - saidRows, said);
      log({ step: "inserted", ...total, rows_per_second, event_age_seconds: age && Number(age.toFixed(1)) });
      [said, saidRows] = [performance.now(), total.rows];
    },
    /** The server is away, or is up again. */
    waiting: (server: string, error?: Error): void => {
      metrics.away.set(error ? 1 : 0);
      if (error && !waitingSince) log({ step: "waiting", for: server, error: error.message.slice(0, 300) });
      if (!error && waitingSince)
        log({ step: "back", waited_seconds: Math.round((performance.now() - waitingSince) / 1000) });
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

/** Seconds since the source committed the message's change, by the message's own source.ts_ms. */
function ageOf(value: Buffer | null | undefined): number | undefined {
  try {
    const at = JSON.parse(value?.toString() ?? "").source.ts_ms;
    return typeof at === "number" ? (Date.now() - at) / 1000 : undefined;
  } catch {
    return undefined; // a dead letter
  }
}

async function serve(port: number, registry: Registry) {
  const server = createServer(async (request, response) => {
    const path = request.url?.split("?")[0];
    if (path === "/metrics") response.setHeader("content-type", registry.contentType).end(await registry.metrics());
    else if (path === "/healthz") response.end("ok\n");
    else response.writeHead(404).end("only /metrics and /healthz exist\n");
  });
  await once(server.listen(port), "listening").catch((error: Error) => {
    throw new Error(`METRICS_PORT ${port}: ${error.message}. Is another consumer running here? Choose another port`);
  });
  return server;
}

function createMetrics(env: ReportEnv, lag: () => Promise<PartitionState[]>) {
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
    await using source = connect(env.SOURCE_DATABASE_URL, { application: "etl:sensors", timeoutSeconds: 3 });
    const [slot] = await source<{ bytes: string }[]>`
      select pg_wal_lsn_diff(pg_current_wal_lsn(), restart_lsn) as bytes from pg_replication_slots
      where slot_name = ${namesOf(env).slot}`;
    if (slot) gauge.set(Number(slot.bytes));
  });
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
    eventAge: gauge("etl_sensors_event_age_seconds", "From the commit of the last change at the source to its insert."),
    away: gauge("etl_sensors_clickhouse_away", "1 while a batch waits for ClickHouse, or for schema etl."),
    unknownColumns: gauge("etl_sensors_unknown_source_columns", "Columns of the source that are kept in _unknown."),
  };
}
