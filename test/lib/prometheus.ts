/**
 * A Prometheus of a test's own, made as the local stack's is, with the rules of ops/alerts.yml; only time passes faster.
 */
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { endpoint, root } from "../stack/env.ts";
import { ensureInstalled } from "../stack/install.ts";
import { answers } from "../stack/process.ts";
import { prometheusCommand, prometheusConfig, prometheusInstall, type Targets } from "../stack/prometheus.ts";
import { startServer } from "./servers.ts";
import { freePort, until } from "./shop.ts";

type Labels = Record<string, string>;
interface Sample {
  metric: Labels;
  value: number;
}

export type Prometheus = Awaited<ReturnType<typeof startPrometheus>>;

/**
 * The file's text with all of its durations divided by `speed`, and nothing else changed: `5m` after a key, as in `for: 5m`; `[1h]`;
 * the constants of seconds, `vector(3600)`, and those that seconds are compared with, as in `…_seconds < 3600` and `…_seconds{…} > 1800`.
 */
export function scaleDurations(text: string, speed: number): string {
  const ms: Record<string, number> = { s: 1000, m: 60_000, h: 3_600_000, d: 86_400_000 };
  const short = (number: string, unit: string): string => `${Math.ceil((Number(number) * (ms[unit] ?? Number.NaN)) / speed)}ms`;
  return text
    .replaceAll(/(?<=^ *(?:- )?\w+: )(\d+)([smhd])$/gm, (_, number, unit) => short(number, unit))
    .replaceAll(/(?<=\[)(\d+)([smhd])(?=\])/g, (_, number, unit) => short(number, unit))
    .replaceAll(/(?<=vector\()\d+(?=\))/g, (seconds) => String(Number(seconds) / speed))
    .replaceAll(/(?<=_seconds(?:\{[^}]*\})? [<>] )\d+/g, (seconds) => String(Number(seconds) / speed));
}

/**
 * Scrapes and evaluates four times a second; a consumer twice, since its answer, for which it asks Kafka, Connect and Postgres, has to come
 * before the next is due. `speed`: 600 makes an hour six seconds; 1 leaves the rules as they are.
 */
export async function startPrometheus(targets: Targets, speed: number) {
  await ensureInstalled(prometheusInstall);
  const folder = mkdtempSync(join(tmpdir(), "etl-prometheus-"));
  const [rules, config] = [join(folder, "alerts.yml"), join(folder, "prometheus.yml")];
  writeFileSync(rules, scaleDurations(readFileSync(join(root, "ops/alerts.yml"), "utf8"), speed));
  writeFileSync(config, scaleDurations(prometheusConfig(targets, rules), targets.sensors ? 30 : 60));
  const url = `http://127.0.0.1:${await freePort()}`;
  const { command, args } = prometheusCommand(config, join(folder, "data"), endpoint(url));
  // A minute otherwise; what was sent before it knew its Alertmanager is sent again only then.
  const server = await startServer("prometheus", { command, args: [...args, "--rules.alert.resend-delay=1s"] }, () =>
    answers(`${url}/-/ready`),
  );

  // biome-ignore lint/suspicious/noExplicitAny: the API's own JSON
  const api = async (path: string): Promise<any> => {
    const answer = (await (await fetch(`${url}/api/v1/${path}`)).json()) as {
      status: string;
      error?: string;
      data: unknown;
    };
    if (answer.status !== "success") throw new Error(`${decodeURIComponent(path)}: ${answer.error}`);
    return answer.data;
  };
  /** Labels of what /api/v1/alerts shows as firing under this name. */
  const firing = async (alert: string): Promise<Labels[]> =>
    (await api("alerts")).alerts
      .filter(({ labels, state }: { labels: Labels; state: string }) => labels.alertname === alert && state === "firing")
      .map(({ labels }: { labels: Labels }) => labels);
  const of = async (alert: string, pipeline?: string): Promise<Labels | undefined> =>
    (await firing(alert)).find((labels) => pipeline === undefined || labels.pipeline === pipeline);
  return {
    url,
    /** Evaluates an expression now. Throws what Prometheus says is wrong with it. */
    query: async (expression: string): Promise<Sample[]> => {
      const { result } = await api(`query?query=${encodeURIComponent(expression)}`);
      return result.map(({ metric, value }: { metric: Labels; value: [number, string] }) => ({
        metric,
        value: Number(value[1].replace("Inf", "Infinity")),
      }));
    },
    firing,
    /** Waits until the alert fires for the pipeline (or at all), and until it does not. */
    fires: (alert: string, pipeline?: string) => until(`${alert} fires for ${pipeline}`, () => of(alert, pipeline)),
    resolves: async (alert: string, pipeline?: string): Promise<void> =>
      void (await until(`${alert} resolves for ${pipeline}`, async () => !(await of(alert, pipeline)))),
    [Symbol.asyncDispose]: async (): Promise<void> => {
      await server[Symbol.asyncDispose]();
      rmSync(folder, { recursive: true, force: true });
    },
  };
}
