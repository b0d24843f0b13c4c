/**
 * make check: a file imports only downwards (scripts → shared/FOLDER → shared), and no two import each other, types included. A folder
 * of shared/ imports no other, but views BigQuery's client. Prints each fault as file: message; exit code 1 where there are any.
 */
import { globSync, readFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { root } from "../../shared/env.ts";

const files = globSync("{scripts,shared}/**/*.ts", { cwd: root }).sort();
const imports = new Map(
  files.map((file) => {
    const found = readFileSync(join(root, file), "utf8").matchAll(/(?:from|import\()\s*"(\.[^"]+)"/g);
    return [file, [...found].map(([, path = ""]) => join(dirname(file), path))];
  }),
);

/** What a file of this folder may import, from the project's root. */
function allowed(file: string): RegExp {
  const [, folder] = /^shared\/(\w+)\//.exec(file) ?? [];
  if (file.startsWith("scripts/ops/")) return /^(scripts\/ops\/lib|shared)\//;
  if (file.startsWith("scripts/")) return /^shared\//;
  if (!folder) return /^shared\/[\w-]+\.ts$/;
  const client = folder === "views" ? "|bigquery/client\\.ts" : "";
  return new RegExp(`^shared/([\\w-]+\\.ts|${folder}/[\\w-]+\\.ts${client})$`);
}

const faults: string[] = [];
for (const [file, of] of imports)
  for (const path of of) if (!allowed(file).test(path)) faults.push(`${file}: imports ${path}, which is not below it`);

// What imports nothing that is left goes; a circle stays, and what imports it.
let left = files;
for (let before = 0; before !== left.length; ) {
  before = left.length;
  left = left.filter((file) => imports.get(file)?.some((path) => left.includes(path)));
}
if (left.length) faults.push(`${left.join(", ")}: import one another in a circle`);

for (const fault of faults) console.log(fault);
process.exit(faults.length ? 1 : 0);
