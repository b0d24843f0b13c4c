/** What the benches share: a command's wall time and peak memory, and the table of them. */
import { type ChildProcess, spawn } from "node:child_process";
import { once } from "node:events";
import { mkdtempSync, readFileSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { thousands } from "../../shared/log.ts";
import { table } from "../../shared/table.ts";
import { root } from "../stack/env.ts";
import { say } from "../stack/stack.ts";

/** At least this share of the values is at most the result. */
export const percentile = (values: number[], share: number): number =>
  values.toSorted((a, b) => a - b)[Math.ceil(values.length * share) - 1] ?? 0;
const median = (values: number[]): number => percentile(values, 0.5);
const spread = (values: number[]): string =>
  `${median(values).toFixed(2)} (${Math.min(...values).toFixed(2)} to ${Math.max(...values).toFixed(2)})`;

export interface Measured {
  seconds: number;
  /** Of all its processes together, sampled every 100 ms. */
  megabytes: number;
}

function readProc(pid: number, file: string): string {
  try {
    return readFileSync(`/proc/${pid}/${file}`, "utf8");
  } catch {
    return ""; // it has just ended
  }
}

/** Kilobytes of a process and of all that it started. */
function resident(pid: number): number {
  const own = Number(/^VmRSS:\s+(\d+)/m.exec(readProc(pid, "status"))?.[1] ?? 0);
  const children = readProc(pid, `task/${pid}/children`).split(" ").filter(Boolean);
  return children.reduce((sum, child) => sum + resident(Number(child)), own);
}

/** Who does a job. `before` is not measured. */
export interface Contender {
  by: string;
  /** The least that could do it: what comes after it, up to the next floor, is measured against it. The first one always is. */
  floor?: boolean;
  before?(): Promise<unknown>;
  run(): Promise<Measured>;
}

const runs = Number(process.env.RUNS ?? 3);

/** RUNS= (default 3) runs of each contender, interleaved. `round` comes before each round. Prints a table. */
export async function compare(
  job: string,
  rows: number,
  contenders: Contender[],
  round: () => Promise<unknown> = async () => {},
): Promise<void> {
  const results: (Measured & { times: number })[][] = contenders.map(() => []);
  for (let run = 0; run < runs; run++) {
    await round();
    let floor = 0;
    for (const [index, contender] of contenders.entries()) {
      await contender.before?.();
      const { seconds, megabytes } = await contender.run();
      if (!index || contender.floor) floor = seconds;
      results[index]?.push({ seconds, megabytes, times: seconds / floor });
      say(`bench: ${job}, run ${run + 1} of ${runs}: ${contender.by}: ${seconds.toFixed(2)} s`);
    }
  }
  const report = contenders.map(({ by, floor }, index) => {
    const of = (name: keyof Measured | "times"): number[] => (results[index] ?? []).map((one) => one[name]);
    return {
      [job]: by,
      seconds: spread(of("seconds")),
      "times the floor": index && !floor ? spread(of("times")) : "",
      "rows/s": rows ? thousands(rows / median(of("seconds"))) : "",
      "peak RSS, MB": Math.round(median(of("megabytes"))),
    };
  });
  process.stdout.write(`\n${thousands(rows)} rows\n${table(report)}\n`);
}

export interface Command {
  command: string;
  args: string[];
  env?: NodeJS.Dict<string>;
  cwd?: string;
}

/** A script of the project. */
export const script = (name: string, env: NodeJS.Dict<string>): Command => ({ command: process.execPath, args: [join(root, name)], env });

/** A folder that goes with this process. */
export function scratchFolder(): string {
  const folder = mkdtempSync(join(tmpdir(), "etl-bench-"));
  process.on("exit", () => rmSync(folder, { recursive: true, force: true }));
  return folder;
}

/** Runs a command to its end. @throws Error where it fails, with the end of its output. */
export async function measure({ command, args, env, cwd }: Command): Promise<Measured & { output: string }> {
  const started = performance.now();
  const child: ChildProcess = spawn(command, args, {
    env: { ...process.env, ...env },
    stdio: ["ignore", "pipe", "pipe"],
    cwd,
    detached: true,
  });
  let output = "";
  for (const stream of [child.stdout, child.stderr])
    stream?.setEncoding("utf8").on("data", (text) => (output = (output + text).slice(-5000)));
  let kilobytes = 0;
  const sampler = setInterval(() => (kilobytes = Math.max(kilobytes, resident(child.pid ?? 0))), 100);
  const [code] = await once(child, "close").finally(() => clearInterval(sampler));
  if (code !== 0) throw new Error(`${command} ${args.join(" ").slice(0, 200)} exited with ${code}:\n${output}`);
  const seconds = (performance.now() - started) / 1000;
  return { seconds, megabytes: kilobytes / 1024, output };
}
