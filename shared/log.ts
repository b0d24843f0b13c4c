/** One line a step on stderr, as key=value or with LOG_FORMAT=json as a JSON object; on a terminal, below them, how far a long step is. */
import { redact } from "./env.ts";

export type Fields = Record<string, string | number | boolean | null | undefined>;

export const json = (): boolean => process.env.LOG_FORMAT === "json";
let [shown, drawn] = ["", 0];

const clear = (): void => void (shown && process.stderr.write("\r\x1b[K"));

/** Pipeline and run of this process, once there is one: they begin each line. */
export const context: Fields = {};

/** Prints one line: ts, the context, the fields in their order. Text with spaces or quotes is written as JSON; undefined is left out. */
export function log(fields: Fields): void {
  const pairs = Object.entries({ ts: new Date().toISOString(), ...context, ...fields })
    .filter(([, value]) => value !== undefined)
    // Before JSON escapes it: a secret would look different then.
    .map(([key, value]) => [key, typeof value === "string" ? redact(value) : value] as const);
  const text = (value: unknown): unknown => (/[\s"=\p{Cc}]|^$/u.test(String(value)) ? JSON.stringify(value) : value);
  const line = pairs.map(([key, value]) => `${key}=${text(value)}`).join(" ");
  clear();
  process.stderr.write(`${json() ? JSON.stringify(Object.fromEntries(pairs)) : line}\n${shown}`);
}

/** The error that ends a script: a sentence with what to do, of several lines where it lists things. */
export function logError(error: string): void {
  progress("");
  if (json()) log({ step: "error", error });
  else process.stderr.write(redact(`error: ${error}\n`));
}

/** On a terminal, draws `text` as the last line, at most ten times a second; elsewhere does nothing. `""` removes it. */
export function progress(text: string): void {
  if (json() || !process.stderr.isTTY || (text && performance.now() - drawn < 100)) return;
  clear();
  shown = text.slice(0, (process.stderr.columns ?? 80) - 1);
  process.stderr.write(shown);
  drawn = performance.now();
}

/** 1234567 → "1,234,567" */
export const thousands = (value: number): string => Math.round(value).toLocaleString("en-US");
