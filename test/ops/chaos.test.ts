/**
 * make chaos: a short campaign, and an end of it by Ctrl-C.
 *   SOAK=1  ten minutes
 */
import assert from "node:assert/strict";
import { type ChildProcess, spawn } from "node:child_process";
import { once } from "node:events";
import { existsSync, readdirSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { createInterface } from "node:readline";
import { suite, test } from "node:test";
import { applyBreak, breaks } from "../chaos/breaks.ts";
import { createSchedule, kinds } from "../chaos/schedule.ts";
import { seed } from "../lib/random.ts";
import { scratchCopy } from "../lib/scratch.ts";
import { root } from "../stack/env.ts";

// In make test always the same schedule; make soak has another one each time, for longer.
const soak = process.env.SOAK === "1";
const minutes = soak ? "10" : "0.35";

/** Runs the command; `heard` gets each line. @returns its exit code and all that it printed. */
async function chaos(
  variables: Record<string, string>,
  heard: (line: string, child: ChildProcess) => void = () => {},
): Promise<{ code: number | null; output: string }> {
  const child = spawn(process.execPath, [join(root, "test/chaos.ts")], {
    env: { ...process.env, MINUTES: minutes, SEED: String(seed), BREAK: "", ...variables },
    stdio: ["ignore", "pipe", "pipe"],
  });
  const lines: string[] = [];
  for (const input of [child.stdout, child.stderr])
    createInterface({ input }).on("line", (line) => {
      lines.push(line);
      heard(line, child);
    });
  const [code] = await once(child, "close");
  return { code, output: lines.join("\n") };
}

/** Command lines of processes that name this folder. */
function processesOf(folder: string): string[] {
  const commandLine = (pid: string): string => {
    try {
      return readFileSync(`/proc/${pid}/cmdline`, "utf8").replaceAll("\0", " ");
    } catch {
      return ""; // gone meanwhile
    }
  };
  return readdirSync("/proc")
    .map(commandLine)
    .filter((line) => line.includes(folder));
}

suite("chaos", { concurrency: 1 }, () => {
  test(`all jobs at once, with live writers, under faults of every kind: in the end source and destinations are the same`, async (t) => {
    const { code, output } = await chaos({});
    assert.equal(code, 0, output);
    assert.match(output, new RegExp(`SEED=${seed}: passed`));
    t.diagnostic(output.slice(output.indexOf("PIPELINE")));
  });

  test("Ctrl-C, also while its stack is starting, leaves no process and no file behind", async () => {
    let folder = "";
    const { code, output } = await chaos({}, (line, child) => {
      folder ||= /its stack is in (\S+)/.exec(line)?.[1] ?? "";
      if (/ postgres serves/.test(line)) child.kill("SIGINT");
    });
    assert.match(output, /stopped by SIGINT\. The same again: make chaos/);
    assert.equal(code, 1, output);
    assert.ok(folder, output);
    assert.deepEqual(processesOf(folder), []);
    assert.equal(existsSync(folder), false);
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

  test("wrong arguments are named: exit code 2, and nothing is started", async () => {
    for (const [variables, says] of [
      [{ MINUTES: "soon" }, /MINUTES=soon must be a number/],
      [{ SEED: "1.5" }, /SEED=1\.5 must be a whole number/],
      [{ BREAK: "all" }, /BREAK=all: there are bound, commit, guard, manifest/],
    ] as const) {
      const { code, output } = await chaos(variables as Record<string, string>);
      assert.match(output, says);
      assert.doesNotMatch(output, /its stack is in/);
      assert.equal(code, 2);
    }
  });
});
