// Go modules at pinned versions and sums, from the module proxy. What a program is built from is pinned by its module's own go.sum.
import { type Install, run } from "./install.ts";
import { stackDir, stackPath } from "./stack.ts";

const needs = "Install Go 1.21 or later: one older than a module asks for (1.25) fetches that itself";

/** `sum` is that of all its files, as a go.sum has it. */
export type Module = { path: string; version: string; sum: string };

/** @returns its folder. @throws Error where its files are others than those of the sum. */
export async function downloadModule({ path, version, sum }: Module): Promise<string> {
  const answer = await run("go", ["mod", "download", "-json", `${path}@${version}`], { cwd: stackDir, needs });
  const found = JSON.parse(answer) as { Dir: string; Sum: string };
  if (found.Sum !== sum) throw new Error(`go: ${path}@${version} has the sum ${found.Sum}, not ${sum}`);
  return found.Dir;
}

/** The program `name` of a module, built once into .stack/bin/. */
export const goProgram = (name: string, module: Module): Install => ({
  name,
  definition: () => JSON.stringify(module),
  run: async () => {
    const args = ["build", "-trimpath", "-ldflags=-s -w", "-o", stackPath("bin", name), `./cmd/${name}`];
    // Without cgo no C compiler is needed.
    await run("go", args, { cwd: await downloadModule(module), env: { ...process.env, CGO_ENABLED: "0" }, needs });
  },
});
