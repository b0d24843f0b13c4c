/**
 * What ops/alerts.yml expects: the one place where intervals and thresholds are set.
 */
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { root } from "./env.ts";

const rules = (): string => readFileSync(join(root, "ops/alerts.yml"), "utf8");

/** How often each pipeline is meant to succeed, in seconds, as ops/alerts.yml says. */
export function readIntervals(): Map<string, number> {
  const intervals = rules().matchAll(/labels: \{ pipeline: (\w+) \}\s+expr: vector\((\d+)\)/g);
  return new Map([...intervals].map(([, pipeline = "", seconds]) => [pipeline, Number(seconds)]));
}

/** From where on ops/alerts.yml calls a metric an alert. */
export function readThreshold(metric: string): number {
  const [, limit] = new RegExp(`\\b${metric}(?:\\{[^}]*\\})?(?:\\[\\w+\\])?\\)* > ([\\d.e]+)`).exec(rules()) ?? [];
  if (limit === undefined) throw new Error(`ops/alerts.yml has no alert of the form ${metric} > NUMBER`);
  return Number(limit);
}
