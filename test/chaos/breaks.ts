/** The promises that `make chaos BREAK=` switches off, each by a patch of the copy that runs: breaks/NAME.patch, whose first line says which. */
import { execFileSync } from "node:child_process";
import { globSync, readFileSync } from "node:fs";
import { basename, join } from "node:path";

const patches = join(import.meta.dirname, "breaks");
const file = (name: string): string => join(patches, `${name}.patch`);
export const breaks = globSync(file("*"))
  .map((path) => basename(path, ".patch"))
  .sort();
export const about = (name: string): string => readFileSync(file(name), "utf8").split("\n")[0] ?? "";

/** @throws Error where the code is no longer what the patch was made for: the campaign would prove nothing. */
export function applyBreak(name: string, folder: string): void {
  execFileSync("git", ["apply", "--verbose", file(name)], { cwd: folder, stdio: ["ignore", "ignore", "pipe"] });
}
