// The READMEs: their commands, samples, links and lists hold what they say. Needs the local stack (make up).
import assert from "node:assert/strict";
import { execFile } from "node:child_process";
import { existsSync, globSync, mkdtempSync, readFileSync, rmSync, statSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { basename, dirname, join } from "node:path";
import { after, before, suite, test } from "node:test";
import { promisify } from "node:util";
import { blocksOf, commandsOf, documents, exampleVariables, missingTests, read, readmes, sectionsOf, targets } from "../lib/documents.ts";
import { createSensors, type Sensors } from "../lib/sensors.ts";
import { type Env, localEnv, root } from "../stack/env.ts";
import { python } from "../stack/python.ts";
import { stackPath } from "../stack/stack.ts";

const soak = process.env.SOAK === "1";
const shells = readmes.flatMap((file) => blocksOf(read(file)).filter(({ language }) => language === "sh"));

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

suite("a newcomer's hour, in databases of its own on the local stack", () => {
  let sensors: Sensors;
  let env: Env;
  let folder: string;
  before(async () => {
    sensors = await createSensors();
    env = { ...sensors.shop.env };
    // For make demo, which takes nothing else from its caller: its make up must find the stack, so Prometheus's target, as it runs.
    folder = mkdtempSync(join(tmpdir(), "etl-readme-"));
    const file = join(folder, "env");
    const given: Env = { ...env, METRICS_PORT: localEnv().METRICS_PORT };
    const lines = [...exampleVariables()].flatMap((name) => (given[name] === undefined ? [] : `${name}="${given[name]}"\n`));
    writeFileSync(file, lines.join(""));
    // A test runner in it is no part of this one. The first weeks are enough to see each command work; make soak takes all.
    Object.assign(env, { DEMO_ENV_FILE: file, NODE_TEST_CONTEXT: undefined, DEMO_SMALL: soak ? undefined : "1" });
  });
  after(async () => {
    if (folder) rmSync(folder, { recursive: true });
    await sensors?.[Symbol.asyncDispose]();
  });

  test("every command in a shell block of a README works, and the samples are what they print", async () => {
    const commands = shells.filter(({ attributes }) => !Object.keys(attributes).length).flatMap(commandsOf);
    assert.ok(commands.includes("make demo"));
    let output = "";
    for (const command of new Set(commands)) {
      const year = soak ? "TO=2018-01-01" : "TO=2017-02-01";
      const here = command.replace("shop_rebuild", `${env.CLICKHOUSE_DATABASE}_rebuild`).replace("TO=2018-01-01", year);
      const options = { cwd: root, env: env as NodeJS.ProcessEnv, maxBuffer: 100 * 1024 * 1024 };
      const { stdout, stderr } = await promisify(execFile)("bash", ["-ec", here], options).catch((error) => {
        if (!command.startsWith("make status")) throw error; // that tells what is red: the consumer has ended
        return error as { stdout: string; stderr: string };
      });
      output += `${stderr}${stdout}\n`;
    }
    const printed = new Set(output.split("\n").map(shape));
    const samples = readmes.flatMap((file) => [...read(file).matchAll(/^<!-- sample: (\w+) -->\n```\n([\s\S]*?)^```$/gm)]);
    assert.deepEqual(samples.map(([, name]) => name).sort(), ["demo", "log", "status"]);
    for (const [, name, sample] of samples)
      for (const line of (sample as string).trim().split("\n"))
        assert.ok(printed.has(shape(line)), `sample "${name}": no command printed a line like\n${line}\nthat is\n${shape(line)}`);
  });

  test("the DuckDB statements of scripts/README.md read a day of the archive by its manifest", async () => {
    const block = blocksOf(read("scripts/README.md")).find(({ language }) => language === "duckdb");
    // The local S3 server's objects are files; DuckDB would have to download its extension for S3.
    const archive = stackPath("s3", env.S3_BUCKET ?? "", env.S3_PREFIX ?? "");
    const text = (block ?? assert.fail("no block")).text.replaceAll("s3://archive/events/", `${archive}events/`);
    const statements = text
      .replaceAll("2017-01-18", "2017-01-03")
      .replaceAll("s3://archive/", stackPath("s3", "archive/"))
      .split(";\n")
      .filter((one) => one.trim());
    const program = `import duckdb, sys\nfor text in sys.argv[1:]: answer = duckdb.execute(text).fetchall()\nprint(*answer[0])`;
    const { stdout } = await promisify(execFile)(python, ["-c", program, ...statements]);
    const manifest = readFileSync(`${archive}events/dt=2017-01-03/manifest.json`, "utf8");
    const { rows, min_id, max_id } = JSON.parse(manifest);
    assert.equal(stdout.trim(), `${rows} ${min_id} ${max_id}`);
  });
});

test("what a README says that CI runs is in .ci/run", () => {
  const ci = read(".ci/run").split("\n");
  const commands = shells.filter(({ attributes }) => attributes.run === "ci").flatMap(commandsOf);
  assert.ok(commands.includes("make test"));
  for (const command of commands) assert.ok(ci.includes(command), command);
});

test("every make target and variable that a document names exists, as does every target that the code names", () => {
  const [known, variables] = [targets(), exampleVariables()];
  for (const file of documents) {
    const inline = [...read(file).matchAll(/`(make [^`\n]+)`/g)].map(([, code = ""]) => code);
    const blocks = blocksOf(read(file)).filter(({ language }) => language === "sh");
    const commands = [...inline, ...blocks.flatMap(commandsOf)].filter((line) => /^make \w/.test(line));
    for (const word of new Set(commands.flatMap((line) => line.split(/ (?=\S+$| )| /).slice(1)))) {
      const [, variable] = /^([A-Z_]+)=/.exec(word) ?? [];
      assert.ok(
        variable
          ? variables.has(variable) || ["TESTS", "MINUTES", "SEED", "BREAK"].includes(variable)
          : known.has(word) || word === "stores",
        `${file} names ${word}`,
      );
    }
  }
  for (const file of [".env.example", ...globSync(["ops/*", "scripts/**/*.ts", "shared/**/*.ts"], { cwd: root })])
    for (const [, name = ""] of read(file).matchAll(/(?:`|: |, |^)make ([a-z]+(?:-[a-z]+)*)\b(?=[ `;:.,)]|$)/gm))
      assert.ok(known.has(name), `${file} names make ${name}`);
});

/** As GitHub makes it of a heading. */
const anchor = (heading: string): string =>
  heading
    .toLowerCase()
    .replaceAll(/[^\p{L}\p{N} _-]/gu, "")
    .replaceAll(" ", "-");

test("every link in a document, and every section that the code points to, exists", () => {
  for (const file of documents)
    for (const [, path = "", name] of read(file).matchAll(/\]\((?!https?:)([^)#\s]*)(?:#([^)\s]*))?\)/g)) {
      const to = path ? join(dirname(file), path) : file;
      assert.ok(existsSync(join(root, to)), `${file} links to ${to}`);
      if (name)
        assert.ok(
          [...sectionsOf(read(to)).keys()].some((one) => anchor(one) === name),
          `${file}: ${to}#${name}`,
        );
    }
  const pointing = globSync(["Makefile", ".env.example", "ops/*", "{scripts,shared,sql,schemas,views}/**/*.*"], {
    cwd: root,
  });
  for (const file of new Set([...pointing, ...documents])) {
    const text = read(file).replaceAll(/["`] \+\n\s*["`]/g, "");
    for (const [, to = "", name = ""] of text.matchAll(/([\w/]*\b(?:README|runbook)\.md), "([^"]+)"/g))
      assert.ok(sectionsOf(read(to)).has(name), `${file} points to ${to}, "${name}"`);
  }
});

test("every test that stands beside a promise exists", () => {
  const rows = [...read("test/README.md").matchAll(/^\| [^|]* \| (\w+\/\w+) \| (.*) \|$/gm)];
  assert.ok(rows.length >= 60);
  const named = rows.map(([, file, names = ""]) => ({ file: `test/${file}.test.ts`, names: names.split("; ") }));
  assert.deepEqual(missingTests(named), []);
});

/** The names of the variables that the scripts and the toolkit declare. */
const declaredVariables = (): Set<string> =>
  new Set(
    globSync("{scripts,shared}/**/*.ts", { cwd: root }).flatMap((file) =>
      [...read(file).matchAll(/\b([A-Z][A-Z0-9_]+): (?:required|optional)\(/g)].map(([, name = ""]) => name),
    ),
  );

test("every variable that the code reads is in .env.example and, unless it is an argument, in ops/README.md; no other is", () => {
  const [example, declared] = [exampleVariables(), declaredVariables()];
  const given = read(".env.example").split("# What follows are arguments of single commands.")[1] ?? assert.fail();
  const configuration = sectionsOf(read("ops/README.md")).get("Configuration") ?? "";
  assert.ok(declared.size > 40);
  for (const variable of declared) {
    assert.ok(example.has(variable), `.env.example has no ${variable}`);
    if (!given.includes(`# ${variable}=`)) assert.ok(configuration.includes(`\`${variable}\``), `ops/README.md: ${variable}`);
  }
  // What the clients read themselves, and what only the local stack does.
  const others = ["GOOGLE_APPLICATION_CREDENTIALS", "AWS_PROFILE", "PROMETHEUS_URL", "STACK_ADMIN_DATABASE_URL"];
  for (const variable of example) assert.ok(declared.has(variable) || others.includes(variable), `nothing reads ${variable}`);
});

test("each script runs by itself: ./scripts/orders.ts --help prints its header", async () => {
  const scripts = globSync(["scripts/*.ts", "scripts/ops/*.ts"], { cwd: root });
  assert.ok(scripts.length > 15);
  const form = (name: string): RegExp =>
    new RegExp(`^#!/usr/bin/env -S npx tsx\n/\\*\\*\n \\* ${name}: [^]*^await main\\(import\\.meta, `, "m");
  for (const script of scripts) {
    assert.match(read(script), form(basename(script, ".ts")), script);
    assert.ok(statSync(join(root, script)).mode & 0o100, `${script} is not executable`);
  }
  const { stdout } = await promisify(execFile)(join(root, "scripts/orders.ts"), ["--help"], { cwd: root });
  assert.match(stdout, /^orders: /);
});
