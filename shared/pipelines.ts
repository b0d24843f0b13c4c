/** Which pipelines there are. */
import { readdirSync } from "node:fs";
import { join } from "node:path";
import { root, UsageError } from "./env.ts";

/** The pipelines that have a contract. */
export function pipelines(): string[] {
  const files = readdirSync(join(root, "schemas/bigquery")).filter((file) => /^\w.*\.json$/.test(file));
  const names = files.sort().map((file) => file.replace(/\.json$/, ""));
  const odd = names.find((name) => !/^[\w-]+$/.test(name));
  if (odd !== undefined) throw new UsageError(`schemas/bigquery: ${JSON.stringify(odd)} may hold letters, digits, _ and - only`);
  return names;
}

/** The pipelines that have a watermark. */
export const watermarked = (): string[] => [...pipelines(), "events"].sort();
