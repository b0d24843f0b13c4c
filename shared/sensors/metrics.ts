/** The consumer's Prometheus metrics, served at METRICS_PORT as long as the process lives. */
import { once } from "node:events";
import { createServer } from "node:http";
import type { AddressInfo } from "node:net";
import { setTimeout as delay } from "node:timers/promises";
import { Counter, collectDefaultMetrics, Gauge, Histogram, Registry } from "prom-client";
import type { PartitionState } from "./epoch.ts";

/** What others are asked at each scrape. Where they do not answer within 3 s, what was known stays. */
interface Questions {
  lag(): Promise<PartitionState[]>;
  connectorRunning(): Promise<boolean>;
  /** Undefined where there is no slot. */
  slotRetainedBytes(): Promise<number | undefined>;
}

/**
 * Serves /metrics, and /healthz, which answers 200.
 * @param port 0 is any free one.
 * @throws Error where the port is taken.
 */
export async function serveMetrics(port: number, ask: Questions) {
  const registry = new Registry();
  const registers = [registry];
  collectDefaultMetrics({ register: registry });
  const gauge = (name: string, help: string): Gauge => new Gauge({ name, help, registers });
  const counter = (name: string, help: string): Counter => new Counter({ name, help, registers });
  const asked = (name: string, help: string, labelNames: string[], ask: (gauge: Gauge) => Promise<void>): void => {
    const within = () => delay(3000, undefined, { ref: false });
    new Gauge({
      name,
      help,
      registers,
      labelNames,
      collect() {
        return Promise.race([ask(this).catch(() => {}), within()]);
      },
    });
  };
  asked("etl_sensors_lag", "Messages that the group has not committed yet.", ["partition"], async (gauge) => {
    for (const { partition, lag } of await ask.lag()) gauge.set({ partition: String(partition) }, lag);
  });
  asked("etl_sensors_connector_running", "1 while Debezium's connector and its task run.", [], async (gauge) =>
    gauge.set((await ask.connectorRunning().catch(() => false)) ? 1 : 0),
  );
  asked("etl_sensors_slot_retained_bytes", "WAL that the source keeps for the connector's slot.", [], async (gauge) => {
    const bytes = await ask.slotRetainedBytes();
    if (bytes !== undefined) gauge.set(bytes);
  });
  const server = createServer(async (request, response) => {
    const path = request.url?.split("?")[0];
    if (path === "/metrics") response.setHeader("content-type", registry.contentType).end(await registry.metrics());
    else if (path === "/healthz") response.end("ok\n");
    else response.writeHead(404).end("only /metrics and /healthz exist\n");
  });
  await once(server.listen(port), "listening").catch((error: Error) => {
    throw new Error(`METRICS_PORT ${port}: ${error.message}. Is another consumer running here? Choose another port`);
  });
  return {
    rows: counter("etl_sensors_rows_total", "Changes inserted."),
    batches: counter("etl_sensors_batches_total", "Batches inserted, each by one insert."),
    deadLetters: counter(
      "etl_sensors_dead_letters_total",
      "Messages that were no valid change and were dead-lettered.",
    ),
    insertSeconds: new Histogram({
      name: "etl_sensors_insert_seconds",
      help: "Duration of a batch's insert, waiting for ClickHouse included.",
      buckets: [0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100],
      registers,
    }),
    eventAge: gauge("etl_sensors_event_age_seconds", "From the commit of the last change at the source to its insert."),
    away: gauge("etl_sensors_clickhouse_away", "1 while an insert waits for ClickHouse."),
    unknownColumns: gauge("etl_sensors_unknown_source_columns", "Columns of the source that are kept in _unknown."),
    port: (server.address() as AddressInfo).port,
    [Symbol.asyncDispose]: async () => {
      server.closeAllConnections();
      server.close();
    },
  };
}
