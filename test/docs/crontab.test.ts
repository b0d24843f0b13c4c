// What production runs by itself: each line of ops/crontab, and the unit of the consumer.
import assert from "node:assert/strict";
import { execFileSync, spawn } from "node:child_process";
import { appendFileSync, globSync, mkdirSync, readdirSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { text } from "node:stream/consumers";
import { after, before, test } from "node:test";
import { readIntervals } from "../../shared/alerts.ts";
import { type Scratch, scratchCopy } from "../lib/scratch.ts";
import { createSensors, type Sensors } from "../lib/sensors.ts";
import { debianPackage, debianPath } from "../stack/debian.ts";
import { root } from "../stack/env.ts";
import { ensureInstalled } from "../stack/install.ts";

const logrotate = debianPackage("logrotate", "libpopt0");

const crontab = readFileSync(join(root, "ops/crontab"), "utf8");
const variables = Object.fromEntries([...crontab.matchAll(/^(\w+)=(.*)$/gm)].map(([, name = "", value = ""]) => [name, value]));
/** Each waits at random, has a timeout and a log, and no lock. cron reads % as the end of the line unless \ is before it. */
const form = new RegExp(
  String.raw`^(\d+) (\d+|\*) +\* \* ([*\d]) +(sleep \$\(\(RANDOM \\% \(JITTER \+ 1\)\)\); cd /srv/etl && ` +
    String.raw`timeout -k 60 (\d+)([mh]) make ([\w-]+) >>/var/log/etl/\7\.log 2>&1)$`,
);
const jobs = crontab
  .split("\n")
  .filter((line) => line && !/^(#|\w+=)/.test(line))
  .map((line) => {
    const [, minute = "", hour, weekday, command = "", limit, unit, target = ""] = form.exec(line) ?? assert.fail(line);
    const every = hour === "*" ? 3600 : weekday === "*" ? 86_400 : 604_800;
    return { minute, every, command: command.replace("\\%", "%"), timeout: Number(limit) * (unit === "m" ? 60 : 3600), target };
  });

test("ops/crontab: each pipeline as often as expected, verify nightly, sweep and report weekly; a minute of its own, a fitting timeout", () => {
  assert.deepEqual(Object.fromEntries(jobs.map(({ target, every }) => [target, every])), {
    ...Object.fromEntries(readIntervals()),
    verify: 86_400,
    "verify-events": 86_400,
    sweep: 604_800,
    report: 604_800,
  });
  assert.equal(new Set(jobs.map(({ minute }) => minute)).size, jobs.length);
  for (const { target, every, timeout } of jobs) assert.ok(timeout > 1800 && timeout + Number(variables.JITTER) < every, target);
  assert.ok(crontab.endsWith("\n"), "cron refuses a file whose last line has no end");
  assert.equal(variables.SHELL, "/bin/bash"); // for $RANDOM
  assert.ok(variables.MAILTO);
});

let scratch: Scratch;
let sensors: Sensors;
before(async () => {
  scratch = scratchCopy();
  // The twelve need a real shop's orders (test/views/models.test.ts); what is run here is the line.
  mkdirSync(join(scratch.folder, "views/checks"), { recursive: true });
  writeFileSync(
    join(scratch.folder, "views/order_count.sql"),
    "CREATE OR REPLACE TABLE order_count\nAS\nSELECT count(*) AS orders FROM orders;\n",
  );
  sensors = await createSensors({ connector: false, pushgateway: true, folder: scratch.folder });
  const { shop } = sensors;
  await shop.insertRows(1, 300);
  await shop.insertRows(1, 100, "users");
  await shop.insertEvents(new Date(Date.now() - 86_400_000).toISOString().slice(0, 10), 20);
  // As in production: cron gives next to no environment, and .env is in the folder.
  const example = readFileSync(join(root, ".env.example"), "utf8");
  const names = new Set([...example.matchAll(/^([A-Z0-9_]+)=/gm)].map(([, name]) => name));
  const lines = Object.entries(shop.env).filter(([name]) => names.has(name));
  writeFileSync(join(scratch.folder, ".env"), lines.map(([name, value]) => `${name}="${value}"\n`).join(""));
  mkdirSync(join(scratch.folder, "log"));
});
after(async () => {
  await sensors?.[Symbol.asyncDispose]();
  scratch?.[Symbol.dispose]();
});

/** As cron runs it: variables of the file, HOME, PATH and nothing else. */
async function cron(command: string, changes: Record<string, string> = {}): Promise<{ code: number | null; mail: string }> {
  const env = { HOME: scratch.folder, LOGNAME: "etl", PATH: "/usr/bin:/bin", ...variables, JITTER: "0", ...changes };
  const child = spawn(variables.SHELL ?? "", ["-c", command], {
    cwd: scratch.folder,
    env,
    stdio: ["ignore", "pipe", "pipe"],
  });
  const ended = new Promise<number | null>((resolve) => child.once("close", resolve));
  const mail = (await Promise.all([text(child.stdout), text(child.stderr)])).join("");
  return { code: await ended, mail };
}

/**
 * In the scratch copy. Its node_modules is a link to this checkout's, or further: make must never install there (npm ci empties the
 * folder first), however the lock file's time compares.
 */
const local = (command: string): string =>
  command
    .replace(/\bmake /, "make -o node_modules/.package-lock.json ")
    .replaceAll("/srv/etl", scratch.folder)
    .replaceAll("/var/log/etl", join(scratch.folder, "log"));
const logOf = (target: string): string => readFileSync(join(scratch.folder, "log", `${target}.log`), "utf8");

for (const { command, target } of jobs) {
  test(`ops/crontab: the line of ${target} does its work with cron's environment, and mails nothing`, async () => {
    const { shop } = sensors;
    assert.deepEqual(await cron(local(command)), { code: 0, mail: "" }, logOf(target));
    const done: Record<string, RegExp> = {
      verify: /pipeline=orders run=\w+ step=compared rows=300 /,
      sweep: /pipeline=users run=\w+ step=swept deleted=0 /,
    };
    assert.match(logOf(target), done[target] ?? /step=done/);
    if (readIntervals().has(target)) assert.ok((await shop.metrics(target)).etl_last_success_timestamp_seconds, logOf(target));
    if (target === "orders") assert.deepEqual(await shop.destinationRows(), await shop.sourceRows());
  });
}

test("ops/crontab: where there is no log to write, cron gets something to mail, and the exit code", async () => {
  const { command = "" } = jobs[0] ?? {};
  const { code, mail } = await cron(local(command).replace("/log/", "/missing/"));
  assert.notEqual(code, 0);
  assert.match(mail, /No such file or directory/);
});

test("ops/etl-sensors.service: its command works in its folder and environment", async () => {
  const unit = readFileSync(join(root, "ops/etl-sensors.service"), "utf8").replaceAll("/srv/etl", scratch.folder);
  const settings = Object.fromEntries([...unit.matchAll(/^(\w+)=(.*)$/gm)].map(([, name, value]) => [name, value]));
  const { code, mail } = await cron(`cd ${settings.WorkingDirectory} && exec ${settings.ExecStart}`, {
    ...Object.fromEntries([settings.Environment?.split("=") as [string, string]]),
    UNTIL: "caught-up",
  });
  assert.equal(code, 0, mail);
  assert.match(mail, /step=done rows=0 /);
});

test("ops/logrotate.conf, by logrotate itself: every log of the crontab is moved, kept, compressed a week later, and goes on", async () => {
  await ensureInstalled(logrotate);
  using scratch = scratchCopy();
  const logs = join(scratch.folder, "logs");
  mkdirSync(logs);
  const [config, state] = [join(scratch.folder, "logrotate.conf"), join(scratch.folder, "state")];
  const owner = ["-un", "-gn"].map((which) => execFileSync("id", [which], { encoding: "utf8" }).trim()).join(" ");
  const settings = readFileSync(join(root, "ops/logrotate.conf"), "utf8").replaceAll("/var/log/etl", logs);
  writeFileSync(config, settings.replaceAll("etl etl", owner), { mode: 0o644 });
  const names = jobs.map(({ command }) => /\/var\/log\/etl\/(\S+)/.exec(command)?.[1] ?? assert.fail(command));
  for (const week of ["first", "second", "third"]) {
    for (const name of names) appendFileSync(join(logs, name), `${week}\n`);
    const program = debianPath("logrotate", "usr/sbin/logrotate");
    const libraries = globSync(debianPath("logrotate", "usr/lib/*")).join(":");
    const env = { ...process.env, LD_LIBRARY_PATH: libraries };
    execFileSync(program, ["--force", "--state", state, config], { env });
  }
  const expected = names.flatMap((name) => [name, `${name}.1`, `${name}.2.gz`, `${name}.3.gz`]);
  assert.deepEqual(readdirSync(logs).sort(), [...new Set(expected)].sort());
  assert.equal(readFileSync(join(logs, `${names[0]}.1`), "utf8"), "third\n");
});
