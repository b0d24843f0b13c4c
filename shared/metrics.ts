/** Metrics of the cron pipelines, pushed to a Pushgateway as job="etl", pipeline="NAME"; nothing in it changes per run. HEARTBEAT_URL. */
import { ask, below } from "./http.ts";
import { log } from "./log.ts";

/** Name → value; ops/README.md, "Metrics", says what they are. */
export type Metrics = Record<string, number>;

/**
 * Adds the values to the pipeline's group (POST): what is not named stays as it was.
 * @param within a group of its own, such as one model's: a push replaces only what is in its own group.
 * @throws Error where the Pushgateway refuses them, or has not answered within 5 s.
 */
export async function pushMetrics(url: string, pipeline: string, values: Metrics, within: Record<string, string> = {}): Promise<void> {
  const lines = Object.entries(values).map(([name, value]) => `# TYPE ${name} gauge\n${name} ${value}\n`);
  await askGateway(url, "POST", { pipeline, ...within }, lines.join(""));
}

async function askGateway(url: string, method: string, group: Record<string, string>, body?: string): Promise<void> {
  const path = ["metrics", ...Object.entries({ job: "etl", ...group }).flat()].map(encodeURIComponent).join("/");
  const answer = await ask("PUSHGATEWAY_URL", below(url, path), { method, ...(body !== undefined && { body }) }, 5);
  const text = await answer.text(); // its end, too, comes within the time
  if (!answer.ok) throw new Error(`PUSHGATEWAY_URL answered HTTP ${answer.status}: ${text.slice(0, 300)}`);
}

/** Deletes the group of a pipeline, and what is in it. @throws Error as above. */
export const deleteMetrics = (url: string, pipeline: string): Promise<void> => askGateway(url, "DELETE", { pipeline });

/**
 * For HEARTBEAT_URL: one GET at each event, for a service that alerts on silence and so needs neither Pushgateway nor Prometheus. Takes at
 * most 5 s, and never throws.
 */
export async function tellHeartbeat(url: string, pipeline: string, event: "start" | "success" | "fail"): Promise<void> {
  if (!url) return;
  try {
    const target = new URL(url.replaceAll("{pipeline}", pipeline));
    if (event !== "success") target.pathname = `${target.pathname.replace(/\/$/, "")}/${event}`;
    const { ok, status, body } = await ask("HEARTBEAT_URL", target, {}, 5);
    await body?.cancel();
    if (!ok) throw new Error(`HTTP status ${status}`);
  } catch (error) {
    const warning = `HEARTBEAT_URL was not told of ${event}; the run itself is not affected`;
    log({ step: "warning", warning, error: (error as Error).message });
  }
}
