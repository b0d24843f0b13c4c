/**
 * A Prometheus of a test's own, made as the local stack's is, with the rules of ops/alerts.yml; only time passes faster.
 */
import { type ChildProcess, spawn } from "node:child_process";
import { once } from "node:events";
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { endpoint, root } from "../stack/env.ts";
import { ensureInstalled } from "../stack/install.ts";
import { prometheusCommand, prometheusConfig, prometheusInstall, type Targets } from "../stack/prometheus.ts";
import { freePort, until } from "./shop.ts";

type Labels = Record<string, string>;
interface Sample {
  metric: Labels;
  value: number;
}

export interface Prometheus extends AsyncDisposable {
  url: string;
  /** Evaluates an expression now. Throws what Prometheus says is wrong with it. */
  query(expression: string): Promise<Sample[]>;
  /** Labels of what /api/v1/alerts shows as firing under this name. */
  firing(alert: string): Promise<Labels[]>;
  /** Waits until the alert fires for the pipeline (or at all), and until it does not. */
  fires(alert: string, pipeline?: string): Promise<Labels>;
  resolves(alert: string, pipeline?: string): Promise<void>;
}

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
export async function startPrometheus(targets: Targets, speed: number): Promise<Prometheus> {
  await ensureInstalled(prometheusInstall);
  const folder = mkdtempSync(join(tmpdir(), "etl-prometheus-"));
  const [rules, config] = [join(folder, "alerts.yml"), join(folder, "prometheus.yml")];
  writeFileSync(rules, scaleDurations(readFileSync(join(root, "ops/alerts.yml"), "utf8"), speed));
  writeFileSync(config, scaleDurations(prometheusConfig(targets, rules), targets.sensors ? 30 : 60));
  const url = `http://127.0.0.1:${await freePort()}`;
  const { command, args } = prometheusCommand(config, join(folder, "data"), endpoint(url));
  // A minute otherwise; what was sent before it knew its Alertmanager is sent again only then.
  const child = spawn(command, [...args, "--rules.alert.resend-delay=1s"], { stdio: ["ignore", "ignore", "pipe"] });
  let log = "";
  child.stderr.setEncoding("utf8").on("data", (text) => {
    log += text;
  });
  const dispose = async (): Promise<void> => {
    await stop(child);
    rmSync(folder, { recursive: true, force: true });
  };
  try {
    await ready(url, child);
  } catch (error) {
    await dispose();
    throw new Error(`${(error as Error).message}: ${log}`);
  }

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
  const firing = async (alert: string): Promise<Labels[]> =>
    (await api("alerts")).alerts
      .filter(({ labels, state }: { labels: Labels; state: string }) => labels.alertname === alert && state === "firing")
      .map(({ labels }: { labels: Labels }) => labels);
  const of = async (alert: string, pipeline?: string): Promise<Labels | undefined> =>
    (await firing(alert)).find((labels) => pipeline === undefined || labels.pipeline === pipeline);
  return {
    url,
    query: async (expression) => {
      const { result } = await api(`query?query=${encodeURIComponent(expression)}`);
      return result.map(({ metric, value }: { metric: Labels; value: [number, string] }) => ({
        metric,
        value: Number(value[1].replace("Inf", "Infinity")),
      }));
    },
    firing,
    fires: (alert, pipeline) => until(`${alert} fires for ${pipeline}`, () => of(alert, pipeline), 60),
    resolves: async (alert, pipeline) =>
      void (await until(`${alert} resolves for ${pipeline}`, async () => !(await of(alert, pipeline)), 60)),
    [Symbol.asyncDispose]: dispose,
  };
}

/** Waits until a server of Prometheus's family says at /-/ready that it is. */
export async function ready(url: string, child: ChildProcess): Promise<void> {
  const answers = async (): Promise<boolean> => {
    if (child.exitCode !== null) throw new Error(`${child.spawnfile} exited ${child.exitCode}`);
    return fetch(`${url}/-/ready`).then(
      ({ ok }) => ok,
      () => false,
    );
  };
  await until(`${child.spawnfile} is ready`, answers);
}

export async function stop(child: ChildProcess): Promise<void> {
  if (child.exitCode !== null || child.signalCode !== null) return;
  const gone = once(child, "close");
  child.kill("SIGKILL");
  await gone;
}
