/** What the benches share: a command's wall time, peak memory and CPU, the source's CPU meanwhile. */
import { type ChildProcess, spawn } from "node:child_process";
import { once } from "node:events";
import { readFileSync } from "node:fs";
import { thousands } from "../../shared/log.ts";
import { table } from "../../shared/table.ts";
import { running } from "../stack/process.ts";
import { say } from "../stack/stack.ts";

const sorted = (values: number[]): number[] => [...values].sort((a, b) => a - b);
export const median = (values: number[]): number => sorted(values)[Math.floor(values.length / 2)] ?? 0;
/** At least this share of the values is at most the result. */
export const percentile = (values: number[], share: number): number => sorted(values)[Math.ceil(values.length * share) - 1] ?? 0;
const spread = (values: number[], digits = 2): string =>
  `${median(values).toFixed(digits)} (${Math.min(...values).toFixed(digits)} to ${Math.max(...values).toFixed(digits)})`;

export interface Measured {
  seconds: number;
  /** Of all its processes together, sampled every 100 ms. */
  megabytes?: number | undefined;
  /** CPU seconds of the whole Postgres server of the stack meanwhile. */
  sourceCpu?: number | undefined;
  /** Its seconds by those of its floor in the same round. */
  times?: number;
}

function readProc(pid: number, file: string): string {
  try {
    return readFileSync(`/proc/${pid}/${file}`, "utf8");
  } catch {
    return ""; // it has just ended
  }
}

const childrenOf = (pid: number): number[] => readProc(pid, `task/${pid}/children`).split(" ").filter(Boolean).map(Number);

/** Kilobytes of a process and of all that it started. */
function resident(pid: number): number {
  const own = Number(/^VmRSS:\s+(\d+)/m.exec(readProc(pid, "status"))?.[1] ?? 0);
  return childrenOf(pid).reduce((sum, child) => sum + resident(child), own);
}

/** CPU seconds, in user mode and in the kernel, of a process and of all that it started, ended ones too; proc(5) has the fields. */
function treeCpu(pid: number): number {
  const fields = readProc(pid, "stat")
    .replace(/^.*\) /s, "")
    .split(" ")
    .map(Number);
  const own = fields.slice(11, 15).reduce((sum, ticks) => sum + ticks, 0) / 100;
  return childrenOf(pid).reduce((sum, child) => sum + treeCpu(child), own);
}

/** CPU seconds of the Postgres server of the stack so far: those of its backends and of its own work. */
export const sourceCpu = (): number => treeCpu(running("postgres")?.pid ?? 0);

/** Who does a job. `before` is not measured. */
export interface Contender {
  by: string;
  /** The least that could do it: what comes after it, up to the next floor, is measured against it. The first one always is. */
  floor?: boolean;
  before?(): Promise<unknown>;
  run(): Promise<Measured>;
}

const runs = Number(process.env.RUNS ?? 3);
const peerRuns = Math.min(runs, Number(process.env.PEER_RUNS ?? runs));

/**
 * RUNS= (default 3) runs of each contender, interleaved; PEER_RUNS= (default as many) of those after the second, in
 * the last rounds. `round` comes before each round. Prints a table.
 */
export async function compare(
  job: string,
  rows: number,
  contenders: Contender[],
  round: () => Promise<unknown> = async () => {},
): Promise<void> {
  const results: Measured[][] = contenders.map(() => []);
  for (let run = 0; run < runs; run++) {
    await round();
    let floor = 0;
    for (const [index, contender] of contenders.entries()) {
      if (index > 1 && run < runs - peerRuns) continue;
      await contender.before?.();
      const { seconds, megabytes, sourceCpu } = await contender.run();
      if (!index || contender.floor) floor = seconds;
      const times = index && !contender.floor ? { times: seconds / floor } : {};
      const measured = { seconds, megabytes, sourceCpu, ...times };
      results[index]?.push(measured);
      say(`bench: ${job}, run ${run + 1} of ${runs}: ${contender.by}: ${seconds.toFixed(2)} s`);
    }
  }
  const report = contenders.map(({ by }, index) => {
    const of = (name: keyof Measured): number[] => results[index]?.flatMap((one) => one[name] ?? []) ?? [];
    return {
      [job]: by,
      seconds: spread(of("seconds")),
      "times the floor": of("times").length ? spread(of("times")) : "",
      "rows/s": rows ? thousands(rows / median(of("seconds"))) : "",
      "peak RSS, MB": of("megabytes").length ? Math.round(median(of("megabytes"))) : "",
      "source's CPU, s": of("sourceCpu").length ? median(of("sourceCpu")).toFixed(2) : "",
    };
  });
  process.stdout.write(`\n${thousands(rows)} rows\n${table(report)}\n`);
}

export async function timed<T>(work: () => Promise<T>): Promise<[number, T]> {
  const started = performance.now();
  const result = await work();
  return [(performance.now() - started) / 1000, result];
}

export interface Command {
  command: string;
  args: string[];
  env?: NodeJS.Dict<string>;
  cwd?: string;
}

/** Runs a command to its end. @throws Error where it fails, with the end of its output. */
export async function measure({ command, args, env, cwd }: Command): Promise<Measured & { output: string; started: Date }> {
  const [startedAt, started, before] = [new Date(), performance.now(), sourceCpu()];
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
  return { seconds, megabytes: kilobytes / 1024, sourceCpu: sourceCpu() - before, output, started: startedAt };
}
