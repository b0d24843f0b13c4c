/**
 * A temporary copy of the project's code, for tests that change a schema file, a SELECT or the code itself:
 * `createShop({ folder })` runs the scripts of that copy. Nobody else's tree is touched.
 */
import { cpSync, mkdtempSync, readFileSync, rmSync, symlinkSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { root } from "../stack/env.ts";

export interface Scratch extends Disposable {
  folder: string;
  /**
   * Rewrites one file of the copy, until what it returns is disposed of. Throws where `change` leaves it as it was: the
   * test would prove nothing.
   */
  edit(file: string, change: (text: string) => string): Disposable;
  /** Rewrites the fields of a pipeline's contract. */
  // biome-ignore lint/suspicious/noExplicitAny: the file's own JSON
  editFields(pipeline: string, change: (fields: any[]) => any[]): void;
}

const copied = ["scripts", "shared", "sql", "schemas", "ops", "package.json", "tsconfig.json", "Makefile", ".env.example"];
/** Large, or (the lock file) compared by make with the time of the installation. */
const linked = ["node_modules", ".stack", "package-lock.json"];

/**
 * There is no .env in it: without ENV_FILE its scripts see the environment only.
 * @param also further folders to copy, such as test.
 */
export function scratchCopy(also: string[] = []): Scratch {
  const folder = mkdtempSync(join(tmpdir(), "etl-scratch-"));
  for (const name of [...copied, ...also]) cpSync(join(root, name), join(folder, name), { recursive: true });
  for (const name of linked) symlinkSync(join(root, name), join(folder, name));
  const edit = (file: string, change: (text: string) => string): Disposable => {
    const path = join(folder, file);
    const before = readFileSync(path, "utf8");
    const after = change(before);
    if (after === before) throw new Error(`${file}: the edit changed nothing`);
    writeFileSync(path, after);
    return { [Symbol.dispose]: () => writeFileSync(path, before) };
  };
  return {
    folder,
    edit,
    editFields: (pipeline, change) => {
      edit(`schemas/bigquery/${pipeline}.json`, (text) => {
        const resource = JSON.parse(text);
        resource.schema.fields = change(resource.schema.fields);
        return JSON.stringify(resource, null, 2);
      });
    },
    [Symbol.dispose]: () => rmSync(folder, { recursive: true, force: true }),
  };
}
