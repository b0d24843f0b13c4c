import assert from "node:assert/strict";
import { execFile } from "node:child_process";
import { globSync, readFileSync } from "node:fs";
import { basename, join } from "node:path";
import { test } from "node:test";
import { promisify } from "node:util";
import { localEnv, root } from "./stack/env.ts";
import { python } from "./stack/python.ts";
import { stackPath } from "./stack/stack.ts";

const readme = readFileSync(join(root, "README.md"), "utf8");

/** Numbers, times and run ids differ from run to run; everything else of a sample must not. */
function shape(text: string): string {
  return text
    .replaceAll(/run=\w+/g, "run=N")
    .replaceAll(/\d[\d,.:T+-]*(?=\s|$)/gm, "N")
    .replaceAll(/=\d\S*/g, "=N")
    .replaceAll(/(\d+[dhms] ?)+/g, "N ")
    .replaceAll(/ +/g, " ")
    .trim();
}

test("every command in the README's shell blocks works, and its sample outputs are what they print", async () => {
  const blocks = [...readme.matchAll(/^```sh\n([\s\S]*?)^```$/gm)].map(([, block]) => block as string);
  const commands = blocks.flatMap((block) => block.split("\n")).map((line) => line.replace(/\s+#.*$/, ""));
  let output = "";
  for (const command of commands.filter((line) => line && line !== "make test")) {
    // As a newcomer's shell would, on the local stack whatever .env says.
    const { stdout, stderr } = await promisify(execFile)("bash", ["-ec", command], {
      cwd: root,
      env: localEnv() as NodeJS.ProcessEnv,
      maxBuffer: 100 * 1024 * 1024,
    });
    output += `${stderr}${stdout}\n`;
  }
  assert.ok(commands.includes("make demo") && commands.includes("make test"));
  const printed = new Set(output.split("\n").map(shape));
  const samples = [...readme.matchAll(/^<!-- sample: (\w+) -->\n```\n([\s\S]*?)^```$/gm)];
  assert.deepEqual(
    samples.map(([, name]) => name),
    ["demo", "log", "status"],
  );
  for (const [, name, sample] of samples) {
    for (const line of (sample as string).trim().split("\n")) {
      assert.ok(
        printed.has(shape(line)),
        `sample "${name}": no command printed a line like\n${line}\nthat is\n${shape(line)}`,
      );
    }
  }
});

test("the README's DuckDB statements read a day of the archive by its manifest", async () => {
  const [, block = ""] = /^```duckdb\n([\s\S]*?)^```$/m.exec(readme) ?? [];
  // The local S3 server's objects are files; DuckDB would have to download its extension for S3.
  const statements = block.replaceAll("s3://archive/", `${stackPath("s3", "archive")}/`).split(";\n");
  const program = `import duckdb, sys\nfor text in sys.argv[1:]: answer = duckdb.execute(text).fetchall()\nprint(*answer[0])`;
  const { stdout } = await promisify(execFile)(python, ["-c", program, ...statements.filter((text) => text.trim())]);
  const manifest = stackPath("s3", "archive", "events", "dt=2017-01-18", "manifest.json");
  const { rows, min_id, max_id } = JSON.parse(readFileSync(manifest, "utf8"));
  assert.equal(stdout.trim(), `${rows} ${min_id} ${max_id}`);
});

test("every make target that the README, the runbook and the scripts name is there", () => {
  const targets = new Set(
    [...readFileSync(join(root, "Makefile"), "utf8").matchAll(/^([a-z-]+):/gm)].map(([, name]) => name),
  );
  for (const file of [
    "README.md",
    ".env.example",
    ...globSync(["ops/*", "scripts/**/*.ts", "shared/**/*.ts"], { cwd: root }),
  ]) {
    for (const [, name] of readFileSync(join(root, file), "utf8").matchAll(
      /(?:`|: |, |^)make ([a-z]+(?:-[a-z]+)*)\b(?=[ `;:.,)]|$)/gm,
    )) {
      assert.ok(targets.has(name), `${file} names make ${name}`);
    }
  }
});

test("every test that the README names beside a promise is there", () => {
  const tests = new Map(
    globSync("test/**/*.test.ts", { cwd: root }).map((file) => [file, readFileSync(join(root, file), "utf8")]),
  );
  const rows = [...readme.matchAll(/^\| .*? \| (test\/\S+\.test\.\w+): (.*) \|$/gm)];
  assert.ok(rows.length >= 10);
  for (const [, file, names] of rows) {
    for (const name of (names as string).split("; "))
      assert.ok(tests.get(file as string)?.includes(name), `${file} has no test "${name}"`);
  }
});

/** The names of the variables that the scripts and the toolkit declare. */
const declaredVariables = (): Set<string> =>
  new Set(
    globSync("{scripts,shared}/**/*.ts", { cwd: root }).flatMap((file) =>
      [...readFileSync(join(root, file), "utf8").matchAll(/\b([A-Z][A-Z0-9_]+): (?:required|optional)\(/g)].map(
        ([, name = ""]) => name,
      ),
    ),
  );

/** Variables that are a command's arguments. */
const given =
  "FROM TO PIPELINE JSON DRY_RUN FORCE ALLOW_SHRINK CLEAN CONCURRENCY MAX_ROWS_PER_SECOND UNTIL LIMIT ONLY ALLOW_STALE REPAIR CONFIRM".split(
    " ",
  );

test("every variable that the code reads is explained in .env.example and, unless it is an argument, in the README's table; and no other is", () => {
  const example = new Set(readFileSync(join(root, ".env.example"), "utf8").match(/(?<=^(?:# )?)[A-Z_0-9]+(?==)/gm));
  const read = declaredVariables();
  assert.ok(read.size > 40);
  for (const variable of read) {
    assert.ok(example.has(variable), `.env.example has no ${variable}`);
    if (!given.includes(variable)) assert.ok(readme.includes(`\`${variable}\``), `README has no ${variable}`);
  }
  // What the clients read themselves, and what only the local stack does.
  const others = ["GOOGLE_APPLICATION_CREDENTIALS", "AWS_PROFILE", "PROMETHEUS_URL", "STACK_ADMIN_DATABASE_URL"];
  for (const variable of example)
    assert.ok(read.has(variable) || others.includes(variable), `nothing reads ${variable}`);
});

test("each script runs by itself: ./scripts/orders.ts --help prints its header", { concurrency: 2 }, async (t) => {
  const scripts = globSync(["scripts/*.ts", "scripts/ops/*.ts"], { cwd: root });
  assert.ok(scripts.length > 15);
  await Promise.all(
    scripts.map((script) =>
      t.test(script, async () => {
        const { stdout } = await promisify(execFile)(join(root, script), ["--help"], { cwd: root });
        assert.match(stdout, new RegExp(`^${basename(script, ".ts")}: `));
      }),
    ),
  );
});
