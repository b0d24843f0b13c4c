/** What a bench writes into the README: the text between <!-- NAME --> and <!-- /NAME -->. README= names another file, for a trial. */
import { readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { root } from "../stack/env.ts";

/** A table, its first row the head. */
export function markdown([head = [], ...lines]: (string | number)[][]): string {
  return [head, head.map(() => "---"), ...lines].map((cells) => `| ${cells.join(" | ")} |`).join("\n");
}

export function writeSection(name: string, text: string): void {
  const file = process.env.README ?? join(root, "README.md");
  const readme = readFileSync(file, "utf8");
  const [before, rest, more] = readme.split(`<!-- ${name} -->`);
  const after = rest?.split(`<!-- /${name} -->`)[1];
  if (after === undefined || more !== undefined)
    throw new Error(`${file} has not one <!-- ${name} --> with its <!-- /${name} -->; the text would be:\n${text}`);
  writeFileSync(file, `${before}<!-- ${name} -->${text}<!-- /${name} -->${after}`);
}
