/** Edits of the project's files that can be repeated: what is in a file already stays as it is. */
import { spawnSync } from "node:child_process";
import { existsSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { root, UsageError } from "../../../shared/env.ts";
import { log } from "../../../shared/log.ts";

export interface Edit {
  /** From the project's root. */
  file: string;
  /** Of a new file: the whole text. It is never written over another. */
  text?: string;
  /** Of a file that exists: what tells that it has been edited; and the edit. */
  has?: string;
  change?(text: string): string;
}

/** Puts text behind what `found` finds. @param text gets that. @throws UsageError where it finds nothing. */
export const after = (file: string, found: RegExp, text: (found: string) => string) => (whole: string) => {
  if (whole.search(found) < 0) throw new UsageError(`${file} has no ${found} to add to. Run: git checkout ${file}`);
  return whole.replace(found, (match) => match + text(match));
};

/** Writes what is missing, a log line for each file; in a dry run prints the differences instead. */
export function applyEdits(edits: Edit[], dryRun: boolean): void {
  const planned = edits.map(({ file, text, has = "", change }) => {
    const path = join(root, file);
    const now = existsSync(path) ? readFileSync(path, "utf8") : undefined;
    const changed = now !== undefined && change && !now.includes(has) ? change(now) : now;
    return { file, path, now, next: changed ?? text };
  });
  for (const { file, path, now, next } of planned) {
    if (next === undefined || now === next) log({ step: "kept", file });
    else if (dryRun) {
      const labels = ["--label", now === undefined ? "/dev/null" : `a/${file}`, "--label", `b/${file}`];
      const { stdout } = spawnSync("diff", ["-u", ...labels, now === undefined ? "/dev/null" : path, "-"], {
        input: next,
      });
      process.stdout.write(stdout);
    } else {
      writeFileSync(path, next, { mode: /^scripts\//.test(file) ? 0o755 : 0o644 });
      log({ step: "wrote", file });
    }
  }
}
