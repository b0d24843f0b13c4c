// Pushgateway: what the pipelines push their metrics to.
import { join } from "node:path";
import { debianPackage, debianPath } from "./debian.ts";
import { endpoint } from "./env.ts";
import { answers } from "./process.ts";
import type { Part } from "./stack.ts";

const debian = "prometheus-pushgateway";

export const pushgateway: Part = {
  name: "pushgateway",
  variable: "PUSHGATEWAY_URL",
  installs: [debianPackage(debian)],
  command: (env, folder) => {
    const { host, port } = endpoint(env.PUSHGATEWAY_URL ?? "");
    // It writes its file at a stop too; the interval is what a SIGKILL can lose.
    const file = [`--persistence.file=${join(folder, "metrics")}`, "--persistence.interval=1s"];
    return { command: debianPath(debian, `usr/bin/${debian}`), args: [`--web.listen-address=${host}:${port}`, ...file] };
  },
  ready: (env) => answers(`${env.PUSHGATEWAY_URL}/-/ready`),
};
