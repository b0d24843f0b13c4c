// What `make up` does after the start. Apart from parts.ts: down and status must work however broken these steps are.
import { execFile } from "node:child_process";
import { join } from "node:path";
import { promisify } from "node:util";
import { createStackSource, fillSource } from "../data/source.ts";
import { type Env, root } from "./env.ts";

/** What `make up` does once the parts it needs serve, in this order, each time: it must be safe to repeat, and quick then. */
export type AfterStart = {
  name: string;
  /** Names of parts; the step is left out where one of them is not this stack's. */
  needs: string[];
  run: (env: Env) => Promise<unknown>;
};

export const afterStart: AfterStart[] = [
  { name: "source", needs: ["postgres"], run: createStackSource },
  // Before anything is synced: rows that came later with their old timestamps would be behind the watermark.
  { name: "real-data", needs: ["postgres", "bigquery"], run: (env) => fillSource(env.STACK_ADMIN_DATABASE_URL ?? "") },
  {
    name: "migrate",
    needs: ["postgres", "bigquery", "s3", "clickhouse"],
    run: (env) => promisify(execFile)(process.execPath, [join(root, "scripts/ops/migrate.ts")], { env }),
  },
];
