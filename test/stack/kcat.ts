// kcat, which reads and writes Kafka's topics through librdkafka: another client than the pipelines' own.
import { globSync } from "node:fs";
import { debianPackage, debianPath } from "./debian.ts";
import { type Env, endpoint } from "./env.ts";
import { ensureInstalled, run } from "./install.ts";

const kcatInstall = debianPackage("kcat", "librdkafka1", "libyajl2");

/** Runs it against the broker of `env`, and answers its output; such as kcat(env, "-C", "-e", "-t", topic). */
export async function kcat(env: Env, ...args: string[]): Promise<string> {
  await ensureInstalled(kcatInstall);
  const { host, port } = endpoint(env.KAFKA_BROKERS ?? "");
  const [libraries] = globSync(debianPath("kcat", "usr/lib/*-linux-gnu"));
  const options = { env: { PATH: process.env.PATH, LD_LIBRARY_PATH: libraries } };
  return run(debianPath("kcat", "usr/bin/kcat"), ["-q", "-b", `${host}:${port}`, ...args], options);
}
