// What `make up` does after the start. Apart from parts.ts: down and status must work however broken these steps are.
import { execFile } from "node:child_process";
import { join } from "node:path";
import { promisify } from "node:util";
import { createSource, fillSource } from "../data/source.ts";
import { type Env, root } from "./env.ts";

/** What `make up` does once the parts it needs serve, in this order, each time: it must be safe to repeat, and quick then. */
export type AfterStart = {
  name: string;
  /** Names of parts; the step is left out where one of them is not this stack's. */
  needs: string[];
  run: (env: Env) => Promise<void>;
};

export const afterStart: AfterStart[] = [
  {
    name: "source",
    needs: ["postgres"],
    run: (env) =>
      createSource(env.STACK_ADMIN_DATABASE_URL ?? "", [
        env.SOURCE_DATABASE_URL ?? "",
        env.ETL_DATABASE_URL ?? "",
        env.REPLICATION_DATABASE_URL ?? "",
      ]),
  },
  {
    // Before anything is synced: rows that came later with their old timestamps would be behind the watermark.
    name: "real-data",
    needs: ["postgres", "bigquery"],
    run: (env) => fillSource(env.STACK_ADMIN_DATABASE_URL ?? ""),
  },
  {
    name: "migrate",
    needs: ["postgres", "bigquery", "s3", "clickhouse"],
    run: async (env) => void (await promisify(execFile)(process.execPath, [join(root, "scripts/ops/migrate.ts")], { env })),
  },
];
