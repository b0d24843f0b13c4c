// make stack-status: one line a part.
import { existsSync } from "node:fs";
import { join } from "node:path";
import { endpoint, localEnv, notOurs, root } from "./env.ts";
import { parts } from "./parts.ts";
import { portHolder, recordedNames, running } from "./process.ts";
import { logPath } from "./stack.ts";

const file = process.env.ENV_FILE || (existsSync(join(root, ".env")) ? ".env" : ".env.example");
const env = localEnv(file);

function uptime(startedAt: number): string {
  const seconds = Math.round((Date.now() - startedAt) / 1000);
  return `${Math.floor(seconds / 3600)}h${String(Math.floor(seconds / 60) % 60).padStart(2, "0")}m${String(seconds % 60).padStart(2, "0")}s`;
}

function state(name: string, variable?: string): string {
  const record = running(name);
  if (record) return `running, pid ${record.pid}`;
  const reason = variable && notOurs(variable, env);
  if (reason) return `not ours: ${reason}`;
  const holder = variable && portHolder(endpoint(env[variable] ?? "").port);
  return holder ? `stopped; its port is taken by ${holder}` : "stopped";
}

const others = recordedNames().filter((name) => !parts.some((part) => part.name === name));
const rows = [
  ["PART", "STATE", "AT", "UPTIME", "LOG"],
  ...[...parts, ...others.map((name) => ({ name, variable: undefined }))].map(({ name, variable }) => {
    const record = running(name);
    const value = variable && env[variable];
    const at = value ? Object.values(endpoint(value)).join(":") : "";
    return [name, state(name, variable), at, record ? uptime(record.startedAt) : "", existsSync(logPath(name)) ? logPath(name) : ""];
  }),
];
const widths = rows[0]?.map((_, column) => Math.max(...rows.map((row) => row[column]?.length ?? 0))) ?? [];
for (const row of rows)
  console.log(
    row
      .map((cell, column) => cell.padEnd(widths[column] ?? 0))
      .join("  ")
      .trimEnd(),
  );
