// Prometheus: scrapes the Pushgateway and the consumer of sensors, and evaluates the alerts.
import { readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { debianPackage, debianPath } from "./debian.ts";
import { type Env, endpoint, root } from "./env.ts";
import { answers, type Command } from "./process.ts";
import { digest, type Part } from "./stack.ts";

/** Prometheus and promtool. */
export const prometheusInstall = debianPackage("prometheus");

/** host:port of each; none is no target. */
export interface Targets {
  pushgateway?: string | undefined;
  sensors?: string | undefined;
  alertmanager?: string | undefined;
}

/** ops/prometheus.yml with these targets, in the places of its examples, and this file of rules. */
export function prometheusConfig({ pushgateway, sensors, alertmanager }: Targets, rules: string): string {
  const places: Record<string, string | undefined> = { pushgateway, "etl-1": sensors, alertmanager };
  return readFileSync(join(root, "ops/prometheus.yml"), "utf8")
    .replaceAll(/"([\w-]+)\.example\.com:\d+"/g, (_, host) => (places[host] ? `"${places[host]}"` : ""))
    .replace("[alerts.yml]", () => `["${rules}"]`);
}

export const prometheusCommand = (config: string, data: string, { host, port }: ReturnType<typeof endpoint>): Command => ({
  command: debianPath("prometheus", "usr/bin/prometheus"),
  args: [`--config.file=${config}`, `--storage.tsdb.path=${data}`, `--web.listen-address=${host}:${port}`, "--log.level=warn"],
});

/** Named after its content and the rules', so that make up restarts it where one of them changed. */
function configOf({ PUSHGATEWAY_URL, METRICS_PORT = "9464" }: Env, folder: string): { file: string; text: string } {
  const rules = join(root, "ops/alerts.yml");
  const { host, port } = PUSHGATEWAY_URL ? endpoint(PUSHGATEWAY_URL) : {};
  const text = prometheusConfig({ pushgateway: host && `${host}:${port}`, sensors: `127.0.0.1:${METRICS_PORT}` }, rules);
  return { file: join(folder, `${digest(text + readFileSync(rules, "utf8"))}.yml`), text };
}

export const prometheus: Part = {
  name: "prometheus",
  variable: "PROMETHEUS_URL",
  installs: [prometheusInstall],
  prepare: async (env, folder) => {
    const { file, text } = configOf(env, folder);
    writeFileSync(file, text);
  },
  command: (env, folder) => prometheusCommand(configOf(env, folder).file, join(folder, "data"), endpoint(env.PROMETHEUS_URL ?? "")),
  ready: (env) => answers(`${env.PROMETHEUS_URL}/-/ready`),
};
