// A CPython of our own in .stack/python/, with the packages of requirements.txt: the machine's Python, if it has one, plays
// no part, so the lock file is for one version. It comes as a Go module (the stack needs Go anyway), which brings a pip.
import { existsSync, mkdirSync, readFileSync, renameSync, rmSync, symlinkSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { gunzipSync } from "node:zlib";
import { downloadModule } from "./go.ts";
import { type Install, run } from "./install.ts";
import { say, stackPath } from "./stack.ts";

export const python = stackPath("python", "bin", "python3");
const module = {
  path: "github.com/kluctl/go-embed-python",
  version: "v0.0.0-3.14.6-20260610-1",
  sum: "h1:oGUS7++Wm3LgxUfD6AmJgKbKQD2wdQFO9PzyJv6T+E4=",
};
const locks = ["requirements.txt", "requirements-sdist.txt"].map((name) => join(import.meta.dirname, name));
// Puts DuckDB's extensions where it looks for them (below HOME): else it would try to download them at the first use. The
// packages' own copies (160 MB) then go.
const importExtensions = `
import importlib.util, shutil
from duckdb_extensions import import_extension
for name in ("icu", "json", "ducklake", "spatial"):
    import_extension(name)
    shutil.rmtree(importlib.util.find_spec("duckdb_extension_" + name).submodule_search_locations[0])
`;

type Entry = { name: string; perm: number; symlink?: string; compressed?: boolean };

/** The module's own layout: files.json lists the entries; the large ones are gzipped. */
function unpack(from: string, to: string): void {
  const { files } = JSON.parse(readFileSync(join(from, "files.json"), "utf8")) as { files: Entry[] };
  for (const { name, perm, symlink, compressed } of files) {
    const path = join(to, name);
    if (symlink) symlinkSync(symlink, path);
    else if (perm & 0x80000000) mkdirSync(path, { recursive: true });
    else {
      const data = readFileSync(join(from, compressed ? `${name}.gz` : name));
      writeFileSync(path, compressed ? gunzipSync(data) : data, { mode: perm & 0o777 });
    }
  }
}

async function install(): Promise<void> {
  const arch = process.arch === "x64" ? "amd64" : process.arch;
  const dir = await downloadModule(module);
  const data = join(dir, "python/internal/data", `${process.platform}-${arch}`);
  if (!existsSync(data)) throw new Error(`python: ${module.path} has no CPython for ${process.platform} on ${arch}`);
  // Under another name until it is whole; what an install that was killed left behind goes first.
  const fresh = stackPath("python.new");
  rmSync(fresh, { recursive: true, force: true });
  unpack(data, fresh);
  say("python: CPython unpacked, installing its packages");
  const env = { ...process.env, PYTHONPATH: join(dir, "pip/internal/data"), PYTHONHOME: undefined };
  const flags = ["--quiet", "--no-deps", "--require-hashes", "--no-compile", "--root-user-action=ignore"];
  const interpreter = join(fresh, "bin/python3");
  for (const lock of locks) {
    // An sdist's build would fetch its build tools unpinned: --no-build-isolation takes setuptools from the first lock.
    const only = lock.includes("sdist") ? "--no-build-isolation" : "--only-binary=:all:";
    await run(interpreter, ["-m", "pip", "install", ...flags, only, "-r", lock], { env });
  }
  await run(interpreter, ["-c", importExtensions], { env: { ...process.env, PYTHONPATH: undefined, HOME: fresh } });
  rmSync(stackPath("python"), { recursive: true, force: true });
  renameSync(fresh, stackPath("python"));
}

export const pythonInstall: Install = {
  name: "python",
  definition: () => [...locks, import.meta.filename].map((file) => readFileSync(file, "utf8")).join("\n"),
  run: install,
};
