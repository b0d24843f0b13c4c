// ClickHouse: its engine in a Node process (npm chdb), behind the HTTP interface of clickhouse-server.ts.
import { mkdirSync } from "node:fs";
import { fileURLToPath } from "node:url";
import { endpoint } from "./env.ts";
import { type Part, stackPath } from "./stack.ts";

export const clickhouse: Part = {
  name: "clickhouse",
  variable: "CLICKHOUSE_URL",
  installs: [],
  prepare: async () => void mkdirSync(stackPath("clickhouse"), { recursive: true }),
  command: (env) => {
    const { host, port } = endpoint(env.CLICKHOUSE_URL ?? "");
    return {
      command: process.execPath,
      args: [fileURLToPath(import.meta.resolve("./clickhouse-server.ts")), host, String(port), stackPath("clickhouse")],
      env: {
        CLICKHOUSE_USER: env.CLICKHOUSE_USER,
        CLICKHOUSE_PASSWORD: env.CLICKHOUSE_PASSWORD,
        // A running query holds one of these threads; with the default of 4, a fifth would wait.
        UV_THREADPOOL_SIZE: "64",
      },
      grace: 5,
    };
  },
  ready: async (env) => {
    const credentials = Buffer.from(`${env.CLICKHOUSE_USER}:${env.CLICKHOUSE_PASSWORD}`).toString("base64");
    const answer = await fetch(new URL("/", env.CLICKHOUSE_URL), {
      method: "POST",
      headers: { authorization: `Basic ${credentials}` },
      body: "SELECT 1",
      signal: AbortSignal.timeout(5_000),
    });
    if (!answer.ok) throw new Error(`HTTP ${answer.status} ${await answer.text()}`);
  },
};
