/** What a person reads on stdout: tables and durations. */

/** Anybody's text as part of a line: without lines of its own, and nothing that a terminal obeys. */
const printable = (text: string): string => text.replaceAll(/\p{Cc}/gu, "?");

/** Rows as aligned columns under their names, for a person. */
export function table(rows: Record<string, string | number>[]): string {
  const names = Object.keys(rows[0] ?? {});
  const lines = [names.map((name) => name.toUpperCase()), ...rows.map((row) => names.map((name) => printable(String(row[name]))))];
  const widths = names.map((_, column) => Math.max(...lines.map((line) => line[column]?.length ?? 0)));
  const padded = lines.map((line) => line.map((cell, column) => cell.padEnd(widths[column] ?? 0)).join("  "));
  return padded.map((line) => line.trimEnd()).join("\n");
}

/** 93784 → "1d 2h"; 125 → "2m 5s": the two largest units of a duration in seconds. */
export function duration(seconds: number): string {
  const whole = Math.max(0, Math.round(seconds));
  const [days = 0, hours = 0, minutes = 0] = [86_400, 3600, 60].map((unit) => Math.floor(whole / unit));
  const units = `${days}d ${hours % 24}h ${minutes % 60}m ${whole % 60}s`;
  return /\b[1-9]\d*\w( \d+\w)?/.exec(units)?.[0] ?? "0s";
}
