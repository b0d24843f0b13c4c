/**
 * Metrics of the cron pipelines, pushed to a Pushgateway: job="etl", pipeline="NAME", and nothing that changes per run.
 */
import { once } from "node:events";
import { createServer } from "node:http";
import type { AddressInfo } from "node:net";
import { Gauge, Pushgateway, Registry } from "prom-client";

const help = {
  etl_last_success_timestamp_seconds: "When the pipeline last succeeded.",
  etl_last_failure_timestamp_seconds: "When the pipeline last failed.",
  etl_last_run_timestamp_seconds: "When the pipeline last ended, well or not.",
  etl_rows: "Rows upserted by the last successful run.",
  etl_bytes: "Bytes of JSON lines loaded by the last successful run.",
  etl_duration_seconds: "Duration of the last successful run.",
  etl_watermark_timestamp_seconds: "The watermark: every row that changed before it is at the destination.",
  etl_watermark_hold_seconds: "For how long an open transaction has kept the watermark from advancing; 0 if none does.",
  etl_unknown_source_columns: "Columns of the source table that the contract does not know.",
};

export type Metrics = { [name in keyof typeof help]?: number };

/**
 * Adds the values to the pipeline's group (POST): what is not named stays as it was. The registry is a new one each time,
 * because prom-client starts every gauge of a registry at 0, and pushing that would erase the last success.
 * @throws Error where the Pushgateway refuses them, or has not answered within 5 s.
 */
export async function pushMetrics(url: string, pipeline: string, values: Metrics): Promise<void> {
  const registry = new Registry();
  for (const [name, value] of Object.entries(values) as [keyof typeof help, number][]) {
    new Gauge({ name, help: help[name], registers: [registry] }).set(value);
  }
  const gateway = new Pushgateway(url, { signal: AbortSignal.timeout(5000) } as object, registry);
  await gateway.pushAdd({ jobName: "etl", groupings: { pipeline } });
}

/** The value of a timestamp in UTC as text, in seconds since 1970. */
export function epochSeconds(timestamp: string): number {
  return Date.parse(timestamp.replace(/(\.\d{3})\d*/, "$1").replace(/\+00$/, "Z")) / 1000;
}

/**
 * Serves /metrics of the registry, and /healthz: 200, or 503 with what is wrong.
 * @param port 0 is any free one.
 * @throws Error where the port is taken.
 */
export async function serveMetrics(
  port: number,
  registry: Registry,
  fault: () => string | undefined,
): Promise<{ port: number } & AsyncDisposable> {
  const server = createServer(async (request, response) => {
    const path = request.url?.split("?")[0];
    if (path === "/metrics") response.setHeader("content-type", registry.contentType).end(await registry.metrics());
    else if (path === "/healthz") response.writeHead(fault() ? 503 : 200).end(`${fault() ?? "ok"}\n`);
    else response.writeHead(404).end("/metrics and /healthz are here\n");
  });
  server.listen(port);
  await once(server, "listening").catch((error: Error) => {
    throw new Error(`METRICS_PORT ${port}: ${error.message}. Is another consumer running here? Choose another port`);
  });
  return {
    port: (server.address() as AddressInfo).port,
    [Symbol.asyncDispose]: async () => {
      server.closeAllConnections();
      server.close();
    },
  };
}
