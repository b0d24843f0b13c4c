// Pushgateway: what the pipelines push their metrics to.
import { mkdirSync } from "node:fs";
import { debianPackage, debianPath } from "./debian.ts";
import { endpoint } from "./env.ts";
import { type Part, stackPath } from "./stack.ts";

const debian = "prometheus-pushgateway";
export const pushgatewayProgram: string = debianPath(debian, `usr/bin/${debian}`);

export const pushgateway: Part = {
  name: "pushgateway",
  variable: "PUSHGATEWAY_URL",
  installs: [debianPackage(debian)],
  prepare: async () => void mkdirSync(stackPath("pushgateway"), { recursive: true }),
  command: (env) => {
    const { host, port } = endpoint(env.PUSHGATEWAY_URL ?? "");
    const file = stackPath("pushgateway", "metrics");
    // It writes its file at a stop too; the interval is what a SIGKILL can lose.
    const args = [`--web.listen-address=${host}:${port}`, `--persistence.file=${file}`, "--persistence.interval=1s"];
    return { command: pushgatewayProgram, args };
  },
  ready: async (env) => {
    const answer = await fetch(new URL("/-/ready", env.PUSHGATEWAY_URL), { signal: AbortSignal.timeout(5_000) });
    if (!answer.ok) throw new Error(`HTTP ${answer.status}`);
  },
};
