/** Edits of the project's files that can be repeated: what is in a file already stays as it is. */
import { spawnSync } from "node:child_process";
import { existsSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { root, UsageError } from "../../../shared/env.ts";
import { log } from "../../../shared/log.ts";

/** Unless the file has `has`, `text` is put behind what `behind` finds, which it gets. A new file has nothing before it. */
export type Edit = [file: string, has: string, behind: RegExp, text: (found: string) => string];

/** Writes what is missing, a log line for each file; in a dry run prints the differences instead. @throws UsageError before it writes. */
export function applyEdits(edits: Edit[], dryRun: boolean): void {
  const planned = edits.map(([file, has, behind, text]) => {
    const path = join(root, file);
    const now = existsSync(path) ? readFileSync(path, "utf8") : undefined;
    if (now?.includes(has)) return { file, path };
    if (now && !now.match(behind)) throw new UsageError(`${file} has no ${behind} to add to. Run: git checkout ${file}`);
    return { file, path, next: (now ?? "").replace(behind, (found) => found + text(found)) };
  });
  for (const { file, path, next } of planned) {
    if (next === undefined) log({ step: "kept", file });
    else if (dryRun) {
      const diff = ["-uN", `--label=a/${file}`, `--label=b/${file}`, path, "-"];
      process.stdout.write(spawnSync("diff", diff, { input: next }).stdout);
    } else {
      writeFileSync(path, next, { mode: file.startsWith("scripts/") ? 0o755 : 0o644 });
      log({ step: "wrote", file });
    }
  }
}
