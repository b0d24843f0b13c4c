/** Which pipelines there are. */
import { readdirSync } from "node:fs";
import { join } from "node:path";
import { root } from "./env.ts";

/** The pipelines that have a contract. */
export const pipelines = (): string[] =>
  readdirSync(join(root, "schemas/bigquery"))
    .flatMap((file) => /^([\w-]+)\.json$/.exec(file)?.[1] ?? [])
    .sort();

/** The pipelines that have a watermark. */
export const watermarked = (): string[] => [...pipelines(), "events"].sort();
