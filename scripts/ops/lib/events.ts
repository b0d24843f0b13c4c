/** What the operations on the archive of events share: the days of FROM and TO, and reading a day back. */
import { createHash, hash } from "node:crypto";
import { createGunzip } from "node:zlib";
import { type Env, UsageError } from "../../../shared/env.ts";
import { addDays, damaged, daysBetween, eachDay, type Manifest, type Part } from "../../../shared/events/archive.ts";
import { type Bucket, bucketVariables, get } from "../../../shared/events/s3.ts";
import { pipelineVariables, type Run } from "../../../shared/run.ts";

export const dayVariables = { ...pipelineVariables, ...bucketVariables };

/** FROM and TO as the days they are. @throws UsageError where they are no dates, or no day lies between them. */
export function readDays({ FROM, TO }: Pick<Env<typeof dayVariables>, "FROM" | "TO">, command: string): string[] {
  const [from, to] = [FROM, TO].map((value = "") => /^(.*)T00:00:00\.000000\+00$/.exec(value)?.[1]);
  if (from && to && from !== to) return daysBetween(from, to);
  const example = `Example: make ${command} FROM=2017-01-01 TO=2018-01-01`;
  throw new UsageError(`make ${command} needs FROM and TO as dates, of UTC: the first day, and the day after the last. ${example}`);
}

type Read = (day: string) => Promise<Manifest>;

/** Reads days back, past one that fails. @returns the days for which `read` has thrown, with what was wrong and the next command. */
export async function readBack(run: Run, command: string, days: string[], read: Read): Promise<Map<string, string>> {
  const failed = new Map<string, string>();
  await eachDay(run, days, failed, read);
  for (const [day, why] of failed)
    if (!/\bmake /.test(why)) failed.set(day, `${why}. Next: make ${command} FROM=${day} TO=${addDays(day)}`);
  const { rows, bytes } = run.totals;
  run.log(failed.size ? "days" : "done", { days: days.length, rows, bytes, failed: failed.size, seconds: run.seconds() });
  return failed;
}

/**
 * The raw lines of a part, in pieces that may end inside one.
 * @throws Error named Damaged, which names the object, where it does not exist, or is not what its manifest says.
 */
export async function* readPart(bucket: Bucket, part: Part): AsyncGenerator<Buffer> {
  const check = (field: "sha256" | "sha256_raw", found: string): void => {
    if (found !== part[field]) throw damaged(bucket, part.key, `expected ${field} ${part[field]} (its manifest), found ${found}`);
  };
  const object = await get(bucket, part.key);
  if (!object) throw damaged(bucket, part.key, "it does not exist");
  check("sha256", hash("sha256", object.body));
  const [raw, gunzip] = [createHash("sha256"), createGunzip({ chunkSize: 2 ** 16 })];
  gunzip.end(object.body);
  try {
    for await (const piece of gunzip as AsyncIterable<Buffer>) {
      raw.update(piece);
      yield piece;
    }
  } catch (error) {
    throw damaged(bucket, part.key, `it does not decompress (${(error as Error).message})`);
  }
  check("sha256_raw", raw.digest("hex"));
}
