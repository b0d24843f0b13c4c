/** Metrics of the cron pipelines, pushed to a Pushgateway: job="etl", pipeline="NAME", and nothing that changes per run. */

import { ask } from "./http.ts";

/** Name → value; ops/README.md, "Metrics", says what they are. */
export type Metrics = Record<string, number>;

/**
 * Adds the values to the pipeline's group (POST): what is not named stays as it was. The registry is a new one each time, because
 * prom-client starts every gauge of a registry at 0, and pushing that would erase the last success.
 * @param within a group of its own, such as one model's: a push replaces only what is in its own group.
 * @throws Error where the Pushgateway refuses them, or has not answered within 5 s.
 */
export async function pushMetrics(
  url: string,
  pipeline: string,
  values: Metrics,
  within: Record<string, string> = {},
): Promise<void> {
  const { Gauge, Registry } = await import("prom-client"); // a tenth of a command's start, and most push nothing
  const registry = new Registry();
  for (const [name, value] of Object.entries(values)) new Gauge({ name, help: name, registers: [registry] }).set(value);
  await askGateway(url, "POST", { pipeline, ...within }, await registry.metrics());
}

async function askGateway(url: string, method: string, group: Record<string, string>, body?: string): Promise<void> {
  const path = ["metrics", ...Object.entries({ job: "etl", ...group }).flat()].map(encodeURIComponent).join("/");
  const answer = await ask("PUSHGATEWAY_URL", url, path, { method, ...(body !== undefined && { body }) }, 5);
  const text = await answer.text(); // its end, too, comes within the time
  if (!answer.ok) throw new Error(`PUSHGATEWAY_URL answered HTTP ${answer.status}: ${text.slice(0, 300)}`);
}

/** Deletes the group of a pipeline, and what is in it. @throws Error as above. */
export const deleteMetrics = (url: string, pipeline: string): Promise<void> => askGateway(url, "DELETE", { pipeline });
