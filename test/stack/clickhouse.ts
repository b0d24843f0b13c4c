// ClickHouse: its engine in a Node process (npm chdb), behind the HTTP interface of clickhouse-server.ts.
import { fileURLToPath } from "node:url";
import { endpoint } from "./env.ts";
import { answers } from "./process.ts";
import type { Part } from "./stack.ts";

export const clickhouse: Part = {
  name: "clickhouse",
  variable: "CLICKHOUSE_URL",
  installs: [],
  command: (env, folder) => {
    const { host, port } = endpoint(env.CLICKHOUSE_URL ?? "");
    const { CLICKHOUSE_USER, CLICKHOUSE_PASSWORD } = env;
    return {
      command: process.execPath,
      args: [fileURLToPath(import.meta.resolve("./clickhouse-server.ts")), host, String(port), folder],
      // A running query holds one of the threads; with the default of 4, a fifth would wait.
      env: { CLICKHOUSE_USER, CLICKHOUSE_PASSWORD, UV_THREADPOOL_SIZE: "64" },
      grace: 5,
    };
  },
  ready: (env) => answers(`${env.CLICKHOUSE_URL}/ping`),
};
