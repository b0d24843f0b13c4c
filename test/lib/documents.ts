/**
 * The documents, as their tests read them. A code fence may have attributes behind its language:
 *   ```sh               commands, run by docs/readme.test.ts on the local stack
 *   ```sh run=ci        commands that .ci/run runs
 *   ```sql recipe=NAME file=PATH [after="TEXT" | replace="TEXT" | at=end]
 *                       part of a recipe, followed by docs/recipes.test.ts: a new file, or where in one it goes
 */
import { globSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { root } from "../stack/env.ts";

/** The READMEs, the root's first, then in the order in which a newcomer meets them. */
export const readmes = ["README.md", ...["scripts", "schemas", "views", "ops", "test"].map((name) => `${name}/README.md`)];
export const documents = [...readmes, "ops/managed-postgres.md", "ops/runbook.md", "CONTRIBUTING.md", "CHANGELOG.md"];

export const read = (file: string): string => readFileSync(join(root, file), "utf8");

export interface Block {
  language: string;
  attributes: Record<string, string>;
  text: string;
}

/** The fenced blocks of a document, in their order. */
export function blocksOf(document: string): Block[] {
  return [...document.matchAll(/^```(\w*)(.*)\n([\s\S]*?)^```$/gm)].map(([, language = "", rest = "", text = ""]) => ({
    language,
    attributes: Object.fromEntries(
      [...rest.matchAll(/(\w+)=(?:"([^"]*)"|'([^']*)'|(\S+))/g)].map(([, name, a, b, c]) => [name, a ?? b ?? c]),
    ),
    text,
  }));
}

/** The lines of a shell block, without their comments. */
export const commandsOf = ({ text }: Block): string[] =>
  text
    .split("\n")
    .map((line) => line.replace(/\s+#.*$/, ""))
    .filter(Boolean);

/** A document's text by heading, of the first three levels. */
export const sectionsOf = (document: string): Map<string, string> =>
  new Map(
    document
      .replaceAll(/^```[\s\S]*?^```$/gm, (fenced) => fenced.replaceAll(/^#/gm, "\0#"))
      .split(/^(?=#{1,3} )/m)
      .map((text) => [/^#+ (.*)/.exec(text)?.[1] ?? "", text.replace(/^#.*\n/, "").replaceAll("\0#", "#")]),
  );

/** @returns which of the tests that a document names are not in their files. */
export function missingTests(named: { file: string; names: string[] }[]): string[] {
  const files = new Map(globSync("test/**/*.test.ts", { cwd: root }).map((file) => [file, read(file)]));
  return named.flatMap(({ file, names }) =>
    names.filter((name) => !files.get(file)?.includes(name)).map((name) => `${file} has no test "${name}"`),
  );
}

/** The targets of the Makefile. */
export const targets = (): Set<string> => new Set([...read("Makefile").matchAll(/^([a-z-]+):/gm)].map(([, name = ""]) => name));

/** The variables of .env.example, set or commented out. */
export const exampleVariables = (): Set<string> => new Set(read(".env.example").match(/(?<=^(?:# )?)[A-Z_0-9]+(?==)/gm));
