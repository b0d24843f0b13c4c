// Go programs at the versions of go/go.mod and go/go.sum, built once into .stack/bin/.
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { type Install, run } from "./install.ts";
import { stackPath } from "./stack.ts";

export const goDir = join(import.meta.dirname, "go");
export const needsGo = "Install Go 1.21 or later: one older than go/go.mod asks for (1.26) fetches that itself";

/** `package` is the import path of a `tool` line of go/go.mod. */
export const goProgram = (name: string, path: string): Install => ({
  name,
  definition: () => path + readFileSync(join(goDir, "go.mod")) + readFileSync(join(goDir, "go.sum")),
  run: async () => {
    const args = ["build", "-trimpath", "-ldflags=-s -w", "-o", stackPath("bin", name), path];
    // Without cgo no C compiler is needed.
    await run("go", args, { cwd: goDir, env: { ...process.env, CGO_ENABLED: "0" }, needs: needsGo });
  },
});
