// Prometheus: scrapes the Pushgateway and the consumer of sensors, and evaluates the alerts.
import { mkdirSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { debianPackage, debianPath } from "./debian.ts";
import { type Env, endpoint, root } from "./env.ts";
import type { Command } from "./process.ts";
import { digest, type Part, stackPath } from "./stack.ts";

/** Prometheus and promtool. */
export const prometheusInstall = debianPackage("prometheus");

/** host:port of each; none is no target. */
export interface Targets {
  pushgateway?: string | undefined;
  sensors?: string | undefined;
  alertmanager?: string | undefined;
}

/** ops/prometheus.yml with these targets and this file of rules. */
export function prometheusConfig({ pushgateway, sensors, alertmanager }: Targets, rules: string): string {
  const places: [string, string][] = [
    ['"pushgateway.example.com:9091"', pushgateway ? `"${pushgateway}"` : ""],
    ['"etl-1.example.com:9464"', sensors ? `"${sensors}"` : ""],
    ['"alertmanager.example.com:9093"', alertmanager ? `"${alertmanager}"` : ""],
    ["rule_files: [alerts.yml]", `rule_files: ["${rules}"]`],
  ];
  return places.reduce(
    (text, [example, value]) => {
      if (!text.includes(example)) throw new Error(`ops/prometheus.yml has no ${example}`);
      return text.replace(example, () => value);
    },
    readFileSync(join(root, "ops/prometheus.yml"), "utf8"),
  );
}

export const prometheusCommand = (config: string, data: string, { host, port }: ReturnType<typeof endpoint>): Command => ({
  command: debianPath("prometheus", "usr/bin/prometheus"),
  args: [`--config.file=${config}`, `--storage.tsdb.path=${data}`, `--web.listen-address=${host}:${port}`, "--log.level=warn"],
});

function configOf(env: Env): { file: string; text: string } {
  const { PUSHGATEWAY_URL, METRICS_PORT = "9464" } = env;
  const rules = join(root, "ops/alerts.yml");
  const { host, port } = PUSHGATEWAY_URL ? endpoint(PUSHGATEWAY_URL) : {};
  const targets = { pushgateway: host && `${host}:${port}`, sensors: `127.0.0.1:${METRICS_PORT}` };
  const text = prometheusConfig(targets, rules);
  // Named after its content and the rules', so that make up restarts it where one of them changed.
  return { file: stackPath("prometheus", `${digest(text + readFileSync(rules, "utf8"))}.yml`), text };
}

export const prometheus: Part = {
  name: "prometheus",
  variable: "PROMETHEUS_URL",
  installs: [prometheusInstall],
  prepare: async (env) => {
    const { file, text } = configOf(env);
    mkdirSync(stackPath("prometheus"), { recursive: true });
    writeFileSync(file, text);
  },
  command: (env) => prometheusCommand(configOf(env).file, stackPath("prometheus", "data"), endpoint(env.PROMETHEUS_URL ?? "")),
  ready: async (env) => {
    const answer = await fetch(new URL("/-/ready", env.PROMETHEUS_URL), { signal: AbortSignal.timeout(5_000) });
    if (!answer.ok) throw new Error(`HTTP ${answer.status}`);
  },
};
