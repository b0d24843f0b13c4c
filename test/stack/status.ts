// make stack-status: one line a part.
import { existsSync } from "node:fs";
import { join } from "node:path";
import { table } from "../../shared/table.ts";
import { endpoint, localEnv, notOurs, root } from "./env.ts";
import { parts } from "./parts.ts";
import { portHolder, recordedNames, running } from "./process.ts";
import { logPath } from "./stack.ts";

const file = process.env.ENV_FILE || (existsSync(join(root, ".env")) ? ".env" : ".env.example");
const env = localEnv(file);

function state(name: string, variable?: string): string {
  const record = running(name);
  if (record) return `running, pid ${record.pid}`;
  const reason = variable && notOurs(variable, env);
  if (reason) return `not ours: ${reason}`;
  const holder = variable && portHolder(endpoint(env[variable] ?? "").port);
  return holder ? `stopped; its port is taken by ${holder}` : "stopped";
}

const others = recordedNames().filter((name) => !parts.some((part) => part.name === name));
const rows = [...parts, ...others.map((name) => ({ name, variable: undefined }))].map(({ name, variable }) => {
  const record = running(name);
  const value = variable && env[variable];
  return {
    part: name,
    state: state(name, variable),
    at: value ? Object.values(endpoint(value)).join(":") : "",
    uptime: record ? `${Math.round((Date.now() - record.startedAt) / 60_000)} min` : "",
    log: existsSync(logPath(name)) ? logPath(name) : "",
  };
});
console.log(table(rows));
