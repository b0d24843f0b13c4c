// BigQuery: local-bigquery, which speaks its REST API over DuckDB. What it does less strictly than Google's: test/README.md.
import { join } from "node:path";
import { endpoint } from "./env.ts";
import { answers } from "./process.ts";
import { python, pythonInstall } from "./python.ts";
import { type Part, stackPath } from "./stack.ts";

export const bigquery: Part = {
  name: "bigquery",
  variable: "BIGQUERY_ENDPOINT",
  installs: [pythonInstall],
  command: (env, folder) => {
    const { host, port } = endpoint(env.BIGQUERY_ENDPOINT ?? "");
    const args = [`--host=${host}`, `--port=${port}`, `--project=${env.BIGQUERY_PROJECT}`, `--data-dir=${folder}`];
    return {
      command: python,
      // The gRPC API is not used here: port 0 is any free one.
      args: [join(import.meta.dirname, "bigquery.py"), ...args, "--grpc-port=0"],
      env: { HOME: stackPath("python"), PYTHONUNBUFFERED: "1" }, // DuckDB's extensions are below this HOME
      grace: 3, // it waits for its clients' open connections; its data survives SIGKILL
    };
  },
  ready: (env) => answers(`${env.BIGQUERY_ENDPOINT}/bigquery/v2/projects/${env.BIGQUERY_PROJECT}/datasets`),
};
