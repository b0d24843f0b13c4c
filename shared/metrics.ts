/**
 * Metrics of the cron pipelines, pushed to a Pushgateway: job="etl", pipeline="NAME", and nothing that changes per run. And what the
 * rules over them expect.
 */
import { once } from "node:events";
import { readFileSync } from "node:fs";
import type { AddressInfo } from "node:net";
import { join } from "node:path";
import type { Registry } from "prom-client";
import { root } from "./env.ts";

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
  // Of one model of views/. Names of their own: the alerts compare those above by pipeline, of which each has one.
  etl_model_last_success_timestamp_seconds: "When the model was last published.",
  etl_model_last_failure_timestamp_seconds: "When the model last failed, or what it needs did.",
  etl_model_rows: "Rows of the model when it was last published.",
  etl_model_bytes: "Bytes that the model and its checks read then.",
  etl_model_duration_seconds: "How long the model and its checks took then.",
  // Of a pipeline's verification.
  etl_verify_differences: "Rows that differed between source and destination when they were last compared.",
  etl_verify_last_success_timestamp_seconds: "When source and destination were last proven to agree.",
};

export type Metrics = { [name in keyof typeof help]?: number };

/**
 * Adds the values to the pipeline's group (POST): what is not named stays as it was. The registry is a new one each time,
 * because prom-client starts every gauge of a registry at 0, and pushing that would erase the last success.
 * @param within a group of its own, such as one model's: a push replaces only what is in its own group.
 * @throws Error where the Pushgateway refuses them, or has not answered within 5 s.
 */
export async function pushMetrics(
  url: string,
  pipeline: string,
  values: Metrics,
  within: Record<string, string> = {},
): Promise<void> {
  const { Gauge, Pushgateway, Registry } = await import("prom-client"); // a tenth of a command's start, and most push nothing
  const registry = new Registry();
  for (const [name, value] of Object.entries(values))
    new Gauge({ name, help: help[name as keyof Metrics], registers: [registry] }).set(value);
  const gateway = new Pushgateway(url, { signal: AbortSignal.timeout(5000) } as object, registry);
  await gateway.pushAdd({ jobName: "etl", groupings: { pipeline, ...within } });
}

/** A timestamp in UTC as Postgres writes it, in seconds since 1970. */
export const epochSeconds = (timestamp: string): number => Date.parse(timestamp.replace(/\+00$/, "Z")) / 1000;

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
  const { createServer } = await import("node:http"); // as an ES module it loads all of fetch: 15 ms of each command's start
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

const rules = (): string => readFileSync(join(root, "ops/alerts.yml"), "utf8");

/** How often each pipeline is meant to succeed, in seconds, as ops/alerts.yml says. */
export function readIntervals(): Map<string, number> {
  const intervals = rules().matchAll(/labels: \{ pipeline: (\w+) \}\s+expr: vector\((\d+)\)/g);
  return new Map([...intervals].map(([, pipeline = "", seconds]) => [pipeline, Number(seconds)]));
}

/** From where on ops/alerts.yml calls a metric an alert. */
export function readThreshold(metric: string): number {
  const [, limit] = new RegExp(`\\b${metric}(?:\\{[^}]*\\})?\\)* > ([\\d.e]+)`).exec(rules()) ?? [];
  if (limit === undefined) throw new Error(`ops/alerts.yml has no alert of the form ${metric} > NUMBER`);
  return Number(limit);
}
