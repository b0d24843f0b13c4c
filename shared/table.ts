/** What a person reads on stdout. */

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
