/**
 * One line a step in key=value form on stderr, and on a terminal a line below them that shows how far a long step is. With
 * LOG_FORMAT=json each line is a JSON object with the same fields, for programs.
 */
import { redact } from "./env.ts";

export type Fields = Record<string, string | number | boolean | null | undefined>;

/** A wrong value is readEnv's to refuse. */
export const json = (): boolean => process.env.LOG_FORMAT === "json";
/** Whether a person sees stderr as it comes. */
export const terminal = (): boolean => !json() && process.stderr.isTTY === true;
let shown = "";
let drawn = 0;

function clear(): void {
  if (shown) process.stderr.write("\r\x1b[K");
}

/** Prints one line: ts, then the fields in their order. Text with spaces or quotes is written as JSON; undefined is left out. */
export function log(fields: Fields): void {
  const pairs = Object.entries({ ts: new Date().toISOString(), ...fields })
    .filter(([, value]) => value !== undefined)
    // Before JSON escapes it: a secret would look different then.
    .map(([key, value]) => [key, typeof value === "string" ? redact(value) : value] as const);
  const text = (value: unknown): unknown => (/[\s"=\p{Cc}]|^$/u.test(String(value)) ? JSON.stringify(value) : value);
  const line = json()
    ? JSON.stringify(Object.fromEntries(pairs.map(([key, value]) => [key, typed(key, value)])))
    : pairs.map(([key, value]) => `${key}=${text(value)}`).join(" ");
  clear();
  process.stderr.write(`${line}\n${shown}`);
}

/** What is counted or measured is a number for programs, also where it came as text: a bigint of Postgres's, or rounded decimals. */
function typed(key: string, value: Fields[string]): Fields[string] {
  const counted =
    /(^|_)(rows|bytes|seconds|count|attempts?)(_|$)/.test(key) && /^-?\d{1,15}(\.\d+)?$/.test(String(value));
  return counted ? Number(value) : value;
}

/** The error that ends a script: a sentence with what to do, of several lines where it lists things. `run`: pipeline and run, if known. */
export function logError(error: string, run: Fields): void {
  progress("");
  if (json()) log({ ...run, step: "error", error });
  else process.stderr.write(redact(`error: ${error}\n`));
}

/** On a terminal, draws `text` as the last line, at most ten times a second; elsewhere does nothing. `""` removes it. */
export function progress(text: string): void {
  if (!terminal() || (text && performance.now() - drawn < 100)) return;
  clear();
  shown = text.slice(0, (process.stderr.columns ?? 80) - 1);
  process.stderr.write(shown);
  drawn = performance.now();
}

/** 1234567 → "1,234,567" */
export function thousands(value: number): string {
  return Math.round(value).toLocaleString("en-US");
}

/** Anybody's text as part of a line: without lines of its own, and nothing that a terminal obeys. */
const printable = (text: string): string => text.replaceAll(/\p{Cc}/gu, "?");

/** Rows as aligned columns under their names, for a person. */
export function table(rows: Record<string, string | number>[]): string {
  const names = Object.keys(rows[0] ?? {});
  const lines = [
    names.map((name) => name.toUpperCase()),
    ...rows.map((row) => names.map((name) => printable(String(row[name])))),
  ];
  const widths = names.map((_, column) => Math.max(...lines.map((line) => line[column]?.length ?? 0)));
  const padded = lines.map((line) => line.map((cell, column) => cell.padEnd(widths[column] ?? 0)).join("  "));
  return padded.map((line) => line.trimEnd()).join("\n");
}

/** 93784 → "1d 2h"; 125 → "2m 5s": the two largest units of a duration in seconds. */
export function duration(seconds: number): string {
  const whole = Math.max(0, Math.round(seconds));
  const [days, hours, minutes] = [
    Math.floor(whole / 86_400),
    Math.floor(whole / 3600) % 24,
    Math.floor(whole / 60) % 60,
  ];
  const units = [`${days}d`, `${hours}h`, `${minutes}m`, `${whole % 60}s`];
  const first = units.findIndex((unit) => !unit.startsWith("0"));
  return first < 0 ? "0s" : units.slice(first, first + 2).join(" ");
}
