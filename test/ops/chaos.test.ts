/**
 * make chaos: a short campaign, always of the same schedule; with SOAK=1 ten minutes of another one each time.
 */
import assert from "node:assert/strict";
import { execFile } from "node:child_process";
import { join } from "node:path";
import { test } from "node:test";
import { promisify } from "node:util";
import { applyBreak, breaks } from "../chaos/breaks.ts";
import { createSchedule, kinds } from "../chaos/schedule.ts";
import { seed } from "../lib/random.ts";
import { scratchCopy } from "../lib/scratch.ts";
import { root } from "../stack/env.ts";

test("all jobs at once, with live writers, under faults of every kind: in the end source and destinations are the same", async (t) => {
  const env = { ...process.env, MINUTES: process.env.SOAK === "1" ? "10" : "0.35", SEED: String(seed), BREAK: "" };
  const { stdout, stderr } = await promisify(execFile)(process.execPath, [join(root, "test/chaos.ts")], { env, maxBuffer: 1e9 });
  assert.match(stdout + stderr, new RegExp(`SEED=${seed}: passed`));
  t.diagnostic(stdout.slice(stdout.indexOf("PIPELINE")));
});

test("a seed's schedule is always the same, another seed's another, and a short campaign has faults of every kind", () => {
  const [one, again, other] = [7, 7, 8].map((each) => createSchedule(each, 600));
  assert.deepEqual(one, again);
  assert.notDeepEqual(one, other);
  assert.deepEqual(new Set(createSchedule(7, 25).map(({ kind }) => kind)), new Set(kinds));
});

test("each patch of BREAK= is one of the code as it is, and one that is not fails loudly", () => {
  for (const name of breaks) {
    using scratch = scratchCopy();
    applyBreak(name, scratch.folder);
    assert.throws(() => applyBreak(name, scratch.folder), /patch does not apply/);
  }
});
