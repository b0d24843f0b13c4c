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
  const [, ...records] = rules().split("record: etl_expected_interval_seconds\n");
  const found = records.map((record) => /^ *labels: \{ pipeline: (\w+) \}\n *expr: vector\((\d+)\)\n/.exec(record));
  const form = "labels: { pipeline: NAME }, expr: vector(SECONDS)";
  if (!found.length || found.includes(null)) throw new Error(`ops/alerts.yml: write each etl_expected_interval_seconds as: ${form}`);
  return new Map(found.map((match) => [match?.[1] ?? "", Number(match?.[2])]));
}

/** From where on ops/alerts.yml calls a metric an alert. */
export function readThreshold(metric: string): number {
  const [, limit] = new RegExp(`\\b${metric}(?:\\{[^}]*\\})?(?:\\[\\w+\\])?\\)* > ([\\d.e]+)`).exec(rules()) ?? [];
  if (limit === undefined) throw new Error(`ops/alerts.yml has no alert of the form ${metric} > NUMBER`);
  return Number(limit);
}
