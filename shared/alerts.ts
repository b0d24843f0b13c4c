/** What ops/alerts.yml expects: the one place where intervals and thresholds are set. */
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { root } from "./env.ts";

const rules = (): string => readFileSync(join(root, "ops/alerts.yml"), "utf8");

/**
 * How often each pipeline is meant to succeed, in seconds, as ops/alerts.yml says.
 * @throws Error where one is not written as the others: its pipeline would never be called stale.
 */
export function readIntervals(): Map<string, number> {
  const record = "record: etl_expected_interval_seconds";
  const form = new RegExp(`${record}\\s+labels: \\{ pipeline: (\\w+) \\}\\s+expr: vector\\((\\d+)\\)$`, "gm");
  const found = [...rules().matchAll(form)];
  const records = rules().match(new RegExp(`${record}$`, "gm")) ?? [];
  const count = `${records.length} etl_expected_interval_seconds, of which ${found.length} can be read`;
  if (!found.length || found.length !== records.length)
    throw new Error(`ops/alerts.yml has ${count}. Write each as: labels: { pipeline: NAME }, expr: vector(SECONDS)`);
  return new Map(found.map(([, pipeline = "", seconds]) => [pipeline, Number(seconds)]));
}

/** From where on ops/alerts.yml calls a metric an alert. */
export function readThreshold(metric: string): number {
  const [, limit] = new RegExp(`\\b${metric}(?:\\{[^}]*\\})?(?:\\[\\w+\\])?\\)* > ([\\d.e]+)`).exec(rules()) ?? [];
  if (limit === undefined) throw new Error(`ops/alerts.yml has no alert of the form ${metric} > NUMBER`);
  return Number(limit);
}
