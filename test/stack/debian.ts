// Debian's packages, unpacked into .stack/debian/NAME without being installed: neither root nor a change to the machine.
import { mkdirSync, readdirSync, rmSync } from "node:fs";
import { join } from "node:path";
import { type Install, run } from "./install.ts";
import { stackPath } from "./stack.ts";

const needsApt = "Install the program itself and have it on PATH: only Debian and its relatives have apt-get";

/**
 * apt checks the packages' signatures, with package lists of its own in .stack/: the machine's may be absent, and need
 * root to be fetched. A point release of Debian replaces a version, so none can be named here.
 */
export const debianPackage = (name: string): Install => ({
  name: `debian-${name}`,
  definition: () => name,
  run: async () => {
    const work = stackPath("debian", `${name}.work`);
    const folders = ["lists/partial", "cache/archives/partial"].map((folder) => join(work, folder));
    for (const folder of folders) mkdirSync(folder, { recursive: true });
    const options = [
      `Dir::State::Lists=${work}/lists`,
      `Dir::Cache=${work}/cache`,
      "Debug::NoLocking=1",
      "APT::Sandbox::User=",
    ];
    const apt = (...command: string[]): Promise<string> =>
      run("apt-get", [...options.flatMap((option) => ["-o", option]), ...command], { cwd: work, needs: needsApt });
    await apt("update");
    await apt("download", name);
    const file = readdirSync(work).find((entry) => entry.endsWith(".deb"));
    await run("dpkg", ["-x", join(work, file ?? ""), stackPath("debian", name)], { needs: needsApt });
    rmSync(work, { recursive: true });
  },
});

/** Where a file of the package is, for example debianPath("prometheus", "usr/bin/promtool"). */
export const debianPath = (name: string, file: string): string => stackPath("debian", name, file);
