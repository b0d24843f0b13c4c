import assert from "node:assert/strict";
import { execFile } from "node:child_process";
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { before, test } from "node:test";
import { promisify } from "node:util";
import { debianPackage, debianPath } from "../stack/debian.ts";
import { root } from "../stack/env.ts";
import { ensureInstalled } from "../stack/install.ts";

const promtool = (...args: string[]) => promisify(execFile)(debianPath("prometheus", "usr/bin/promtool"), args, { cwd: root });

before(() => ensureInstalled(debianPackage("prometheus")));

test("ops/alerts.yml is what Prometheus reads", async () => {
  const { stdout } = await promtool("check", "rules", "ops/alerts.yml");
  assert.match(stdout, /SUCCESS: \d+ rules found/);
});

const unitTests = ["test/ops/alerts.test.yml", "test/ops/alerts.weekly.test.yml"];

test("each alert fires on its fault, is quiet on what is well, and resolves (test/ops/alerts.test.yml, test/ops/alerts.weekly.test.yml)", async () => {
  const { stdout } = await promtool("test", "rules", ...unitTests);
  assert.match(stdout, /SUCCESS/);
});

test("a new pipeline needs its interval only: it fires EtlStale and EtlNeverRan until it has succeeded", async () => {
  const folder = mkdtempSync(join(tmpdir(), "etl-alerts-"));
  try {
    const rules = readFileSync(join(root, "ops/alerts.yml"), "utf8");
    const line = "      - record: etl_expected_interval_seconds\n        labels: { pipeline: orders }";
    const added = `      - record: etl_expected_interval_seconds\n        labels: { pipeline: refunds }\n        expr: vector(86400)\n${line}`;
    assert.ok(rules.includes(line));
    writeFileSync(join(folder, "alerts.yml"), rules.replace(line, added));
    const firing = (name: string, samples: string): string =>
      `      - { expr: 'ALERTS{alertname="${name}", alertstate="firing", pipeline="refunds"} * 0', eval_time: ${samples} }\n`;
    const fires =
      '10m, exp_samples: [{ labels: \'{alertname="NAME", alertstate="firing", pipeline="refunds", severity="page"}\', value: 0 }]';
    const alerts = ["EtlStale", "EtlNeverRan"].map(
      (name) => firing(name, fires.replace("NAME", name)) + firing(name, "30m, exp_samples: []"),
    );
    writeFileSync(
      join(folder, "test.yml"),
      `rule_files: [alerts.yml]
evaluation_interval: 1m
tests:
  - interval: 1m
    input_series:
      - { series: 'etl_last_success_timestamp_seconds{job="etl", pipeline="refunds"}', values: "_x19 1200x20" }
      - { series: 'etl_last_run_timestamp_seconds{job="etl", pipeline="refunds"}', values: "_x19 1200x20" }
    promql_expr_test:
${alerts.join("")}`,
    );
    const { stdout } = await promtool("test", "rules", join(folder, "test.yml"));
    assert.match(stdout, /SUCCESS/);
  } finally {
    rmSync(folder, { recursive: true });
  }
});

test("each alert has unit tests and a section in the runbook, and the runbook has no other", () => {
  const alerts = [...readFileSync(join(root, "ops/alerts.yml"), "utf8").matchAll(/alert: (\w+)/g)].map(([, name]) => name);
  const texts = unitTests.map((file) => readFileSync(join(root, file), "utf8")).join("");
  const tested = new Set([...texts.matchAll(/alertname: (\w+)/g)].map(([, name]) => name));
  const sections = [...readFileSync(join(root, "ops/runbook.md"), "utf8").matchAll(/^## (Etl\w+)$/gm)].map(([, name]) => name);
  assert.deepEqual([...tested].sort(), [...alerts].sort());
  assert.deepEqual(sections, alerts);
});
