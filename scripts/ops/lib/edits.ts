/** Edits of the project's files that can be repeated: what is in a file already stays as it is. */
import { spawnSync } from "node:child_process";
import { existsSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { root, UsageError } from "../../../shared/env.ts";
import { log } from "../../../shared/log.ts";

/** Of a file, from the project's root. `has` tells that it has been edited: nothing for a new file, which is never written over another. */
export type Edit = { file: string; has: string; change(text: string): string };

/** Puts text behind what `found` finds. @param text gets that. @throws UsageError where it finds nothing. */
export const after = (file: string, has: string, found: RegExp, text: (found: string) => string): Edit => ({
  file,
  has,
  change: (whole) => {
    if (whole.search(found) < 0) throw new UsageError(`${file} has no ${found} to add to. Run: git checkout ${file}`);
    return whole.replace(found, (match) => match + text(match));
  },
});

/** Writes what is missing, a log line for each file; in a dry run prints the differences instead. */
export function applyEdits(edits: Edit[], dryRun: boolean): void {
  const planned = edits.map(({ file, has, change }) => {
    const path = join(root, file);
    const now = existsSync(path) ? readFileSync(path, "utf8") : undefined;
    return { file, path, next: now?.includes(has) ? undefined : change(now ?? "") };
  });
  for (const { file, path, next } of planned) {
    if (next === undefined) log({ step: "kept", file });
    else if (dryRun) {
      const labels = ["--label", `a/${file}`, "--label", `b/${file}`];
      process.stdout.write(spawnSync("diff", ["-uN", ...labels, path, "-"], { input: next }).stdout);
    } else {
      writeFileSync(path, next, { mode: /^scripts\//.test(file) ? 0o755 : 0o644 });
      log({ step: "wrote", file });
    }
  }
}
