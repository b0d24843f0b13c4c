/**
 * What a person sees of a run: one line a step in key=value form on stderr, and on a terminal a line below them that
 * shows how far a long step is.
 */
import { redact } from "./env.ts";

export type Fields = Record<string, string | number | boolean | null | undefined>;

/** Whether a person sees stderr as it comes. */
export const terminal = process.stderr.isTTY === true;
let shown = "";
let drawn = 0;

function clear(): void {
  if (shown) process.stderr.write("\r\x1b[K");
}

/** Prints one line: ts, then the fields in their order. Text with spaces or quotes is written as JSON; undefined is left out. */
export function log(fields: Fields): void {
  const pairs = Object.entries({ ts: new Date().toISOString(), ...fields }).filter(([, value]) => value !== undefined);
  const line = pairs
    .map(([key, value]) => `${key}=${/[\s"=]|^$/.test(String(value)) ? JSON.stringify(value) : value}`)
    .join(" ");
  clear();
  process.stderr.write(`${redact(line)}\n${shown}`);
}

/** On a terminal, draws `text` as the last line, at most ten times a second; elsewhere does nothing. `""` removes it. */
export function progress(text: string): void {
  if (!terminal || (text && performance.now() - drawn < 100)) return;
  clear();
  shown = text.slice(0, (process.stderr.columns ?? 80) - 1);
  process.stderr.write(shown);
  drawn = performance.now();
}

/** 1234567 → "1,234,567" */
export function thousands(value: number): string {
  return Math.round(value).toLocaleString("en-US");
}

/** Rows as aligned columns under their names, for a person. */
export function table(rows: Record<string, string | number>[]): string {
  const names = Object.keys(rows[0] ?? {});
  const lines = [names.map((name) => name.toUpperCase()), ...rows.map((row) => names.map((name) => String(row[name])))];
  const widths = names.map((_, column) => Math.max(...lines.map((line) => line[column]?.length ?? 0)));
  return lines
    .map((line) =>
      line
        .map((cell, column) => cell.padEnd(widths[column] ?? 0))
        .join("  ")
        .trimEnd(),
    )
    .join("\n");
}

/** 93784 → "1d 2h"; 125 → "2m 5s": the two largest units of a duration in seconds. */
export function duration(seconds: number): string {
  const whole = Math.max(0, Math.round(seconds));
  const units = [
    [Math.floor(whole / 86_400), "d"],
    [Math.floor(whole / 3600) % 24, "h"],
    [Math.floor(whole / 60) % 60, "m"],
    [whole % 60, "s"],
  ] as const;
  const first = units.findIndex(([count]) => count > 0);
  return first < 0
    ? "0s"
    : units
        .slice(first, first + 2)
        .map(([count, unit]) => `${count}${unit}`)
        .join(" ");
}
