import assert from "node:assert/strict";
import { execFile } from "node:child_process";
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { before, test } from "node:test";
import { promisify } from "node:util";
import { debianPackage, debianPath } from "./stack/debian.ts";
import { root } from "./stack/env.ts";
import { ensureInstalled } from "./stack/install.ts";

const promtool = (...args: string[]) =>
  promisify(execFile)(debianPath("prometheus", "usr/bin/promtool"), args, { cwd: root });

before(() => ensureInstalled(debianPackage("prometheus")));

test("ops/alerts.yml is what Prometheus reads", async () => {
  const { stdout } = await promtool("check", "rules", "ops/alerts.yml");
  assert.match(stdout, /SUCCESS: \d+ rules found/);
});

const unitTests = ["test/alerts.test.yml", "test/alerts.weekly.test.yml"];

test("each alert fires on its fault, is quiet on what is well, and resolves (test/alerts.test.yml, test/alerts.weekly.test.yml)", async () => {
  const { stdout } = await promtool("test", "rules", ...unitTests);
  assert.match(stdout, /SUCCESS/);
});

test("each alert has unit tests and a section in the runbook, and the runbook has no other", () => {
  const alerts = [...readFileSync(join(root, "ops/alerts.yml"), "utf8").matchAll(/alert: (\w+)/g)].map(
    ([, name]) => name,
  );
  const texts = unitTests.map((file) => readFileSync(join(root, file), "utf8")).join("");
  const tested = new Set([...texts.matchAll(/alertname: (\w+)/g)].map(([, name]) => name));
  const sections = [...readFileSync(join(root, "ops/runbook.md"), "utf8").matchAll(/^## (Etl\w+)$/gm)].map(
    ([, name]) => name,
  );
  assert.deepEqual([...tested].sort(), [...alerts].sort());
  assert.deepEqual(sections, alerts);
});
