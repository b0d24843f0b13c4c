/** Metrics of the cron pipelines, pushed to a Pushgateway as job="etl", pipeline="NAME"; nothing in it changes per run. HEARTBEAT_URL. */
import { ask, below } from "./http.ts";
import { log } from "./log.ts";

/** Name → value; ops/README.md, "Metrics", says what they are. */
export type Metrics = Record<string, number>;

/** What is told of a run must not end it: an error becomes a warning. */
export const orWarn = (warning: string, told: Promise<unknown>): Promise<unknown> =>
  told.catch(({ message }: Error) => log({ step: "warning", warning: `${warning}; the run itself is not affected`, error: message }));

/** @throws Error where it is refused, or was not answered to the end within 5 s. */
async function send(variable: string, url: URL, init: RequestInit = {}): Promise<void> {
  const answer = await ask(variable, url, init, 5);
  const text = await answer.text();
  if (!answer.ok) throw new Error(`${variable} answered HTTP ${answer.status}: ${text.slice(0, 300)}`);
}

/**
 * Adds the values to the pipeline's group, or to one `within` it, such as a model's (POST): what is not named stays as it was.
 * @throws Error where the Pushgateway refuses them, or has not answered within 5 s.
 */
export async function pushMetrics(url: string, pipeline: string, values: Metrics, within: Record<string, string> = {}): Promise<void> {
  const path = ["metrics", ...Object.entries({ job: "etl", pipeline, ...within }).flat()].map(encodeURIComponent).join("/");
  const lines = Object.entries(values).map(([name, value]) => `# TYPE ${name} gauge\n${name} ${value}\n`);
  await send("PUSHGATEWAY_URL", below(url, path), { method: "POST", body: lines.join("") });
}

/** HEARTBEAT_URL: one GET at each event, for a service that alerts on silence, without Prometheus. At most 5 s; never throws. */
export async function tellHeartbeat(url: string, pipeline: string, event: "start" | "success" | "fail"): Promise<void> {
  if (!url) return;
  const target = new URL(url.replaceAll("{pipeline}", pipeline));
  if (event !== "success") target.pathname = `${target.pathname.replace(/\/$/, "")}/${event}`;
  await orWarn(`HEARTBEAT_URL was not told of ${event}`, send("HEARTBEAT_URL", target));
}
