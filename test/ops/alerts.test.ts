// The rules of ops/alerts.yml, by promtool: what it reads, unit tests of each alert, and the runbook's section for each.
import assert from "node:assert/strict";
import { execFile } from "node:child_process";
import { test } from "node:test";
import { promisify } from "node:util";
import { read, sectionsOf } from "../lib/documents.ts";
import { debianPackage, debianPath } from "../stack/debian.ts";
import { root } from "../stack/env.ts";
import { ensureInstalled } from "../stack/install.ts";

const unitTests = ["test/ops/alerts.test.yml", "test/ops/alerts.weekly.test.yml"];

test("each alert fires on its fault, is quiet on what is well, and resolves (test/ops/alerts*.test.yml)", async () => {
  await ensureInstalled(debianPackage("prometheus"));
  const promtool = (...args: string[]) => promisify(execFile)(debianPath("prometheus", "usr/bin/promtool"), args, { cwd: root });
  assert.match((await promtool("check", "rules", "ops/alerts.yml")).stdout, /SUCCESS: \d+ rules found/);
  assert.match((await promtool("test", "rules", ...unitTests)).stdout, /SUCCESS/);
});

test("each alert has unit tests and a section in the runbook, which it names: meaning, impact, diagnosis, mitigation", () => {
  const rules = read("ops/alerts.yml")
    .split(/^ +- alert: /m)
    .slice(1);
  const alerts = rules.map((rule) => /^\w+/.exec(rule)?.[0] ?? "");
  const tested = unitTests.flatMap((file) => [...read(file).matchAll(/alertname(?:: |=")(\w+)/g)].map(([, name]) => name));
  assert.deepEqual([...new Set(tested)].sort(), [...alerts].sort());
  const sections = sectionsOf(read("ops/runbook.md"));
  assert.deepEqual(
    [...sections.keys()].filter((name) => /^Etl\w+$/.test(name)),
    alerts,
  );
  for (const [at, alert] of alerts.entries()) {
    assert.ok(rules[at]?.includes(`runbook: ops/runbook.md#${alert.toLowerCase()}\n`), alert);
    const parts = [...(sections.get(alert) ?? "").matchAll(/^\*\*(\w+)\.\*\* +\S.{10,}/gm)].map(([, part]) => part);
    assert.deepEqual(parts, ["Meaning", "Impact", "Diagnosis", "Mitigation"], alert);
  }
});
