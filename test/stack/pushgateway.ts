// Pushgateway: what the pipelines push their metrics to.
import { mkdirSync } from "node:fs";
import { endpoint } from "./env.ts";
import { goProgram } from "./go.ts";
import { type Part, stackPath } from "./stack.ts";

export const pushgateway: Part = {
  name: "pushgateway",
  variable: "PUSHGATEWAY_URL",
  installs: [goProgram("pushgateway", "github.com/prometheus/pushgateway")],
  prepare: async () => void mkdirSync(stackPath("pushgateway"), { recursive: true }),
  command: (env) => {
    const { host, port } = endpoint(env.PUSHGATEWAY_URL ?? "");
    const file = stackPath("pushgateway", "metrics");
    // It writes its file at a stop too; the interval is what a SIGKILL can lose.
    const args = [`--web.listen-address=${host}:${port}`, `--persistence.file=${file}`, "--persistence.interval=1s"];
    return { command: stackPath("bin", "pushgateway"), args };
  },
  ready: async (env) => {
    const answer = await fetch(new URL("/-/ready", env.PUSHGATEWAY_URL), { signal: AbortSignal.timeout(5_000) });
    if (!answer.ok) throw new Error(`HTTP ${answer.status}`);
  },
};
