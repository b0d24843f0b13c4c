// Debian's packages, unpacked into .stack/debian/NAME without being installed: neither root nor a change to the machine.
import { mkdirSync, readdirSync, rmSync } from "node:fs";
import { join } from "node:path";
import { type Install, run } from "./install.ts";
import { stackPath } from "./stack.ts";

const needsApt = "Install the program itself and have it on PATH: only Debian and its relatives have apt-get";

/**
 * apt checks the packages' signatures. A point release of Debian replaces a version, so none can be named here. Where the
 * machine's package lists are absent or old, lists of our own are fetched, since renewing the machine's needs root.
 * `libraries` are packages that it needs and a machine may lack; they are unpacked beside it.
 */
export const debianPackage = (name: string, ...libraries: string[]): Install => ({
  name: `debian-${name}`,
  definition: () => [name, ...libraries].join(" "),
  run: async () => {
    const work = stackPath("debian", `${name}.work`);
    for (const folder of ["lists/partial", "cache/archives/partial"]) mkdirSync(join(work, folder), { recursive: true });
    const own = [`Dir::State::Lists=${work}/lists`, `Dir::Cache=${work}/cache`, "Debug::NoLocking=1", "APT::Sandbox::User="];
    const options = { cwd: work, needs: needsApt };
    await run("apt-get", ["download", name, ...libraries], options).catch(async () => {
      const settings = own.flatMap((option) => ["-o", option]);
      await run("apt-get", [...settings, "update"], options);
      await run("apt-get", [...settings, "download", name, ...libraries], options);
    });
    for (const file of readdirSync(work).filter((entry) => entry.endsWith(".deb")))
      await run("dpkg", ["-x", join(work, file), stackPath("debian", name)], options);
    rmSync(work, { recursive: true });
  },
});

/** Where a file of the package is, for example debianPath("prometheus", "usr/bin/promtool"). */
export const debianPath = (name: string, file: string): string => stackPath("debian", name, file);
