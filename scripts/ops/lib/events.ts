/** What the operations on the archive of events share: the days of FROM and TO, and reading a day back. */
import { createHash } from "node:crypto";
import { createGunzip } from "node:zlib";
import { type Env, UsageError } from "../../../shared/env.ts";
import {
  addDays,
  bytesOf,
  daysBetween,
  type Manifest,
  type Part,
  readManifest,
} from "../../../shared/events/archive.ts";
import { type Bucket, bucketVariables, checkBucket, connectS3, get } from "../../../shared/events/s3.ts";
import { type Fields, log, progress, thousands } from "../../../shared/log.ts";
import { newRunId, pipelineVariables } from "../../../shared/run.ts";
import type { SessionOptions } from "../../../shared/session.ts";

export const dayVariables = { ...pipelineVariables, ...bucketVariables };

/** FROM and TO as the days they are. @throws UsageError where they are no dates, or no day lies between them. */
export function readDays({ FROM, TO }: Pick<Env<typeof dayVariables>, "FROM" | "TO">, command: string): string[] {
  const example = `Example: make ${command} FROM=2017-01-01 TO=2018-01-01`;
  if (!FROM || !TO || FROM === TO)
    throw new UsageError(`make ${command} needs FROM and TO: the first day, and the day after the last. ${example}`);
  for (const [name, value] of Object.entries({ FROM, TO }))
    if (!value.endsWith("T00:00:00.000000+00"))
      throw new UsageError(`${name} ${value} must be a date: the archive is by days of UTC. ${example}`);
  return daysBetween(FROM.slice(0, 10), TO.slice(0, 10));
}

/** What the days of a command are read with. */
export interface Reading {
  command: string;
  bucket: Bucket;
  session: SessionOptions;
  log(step: string, fields?: Fields): void;
}

/** @throws UsageError where the bucket may not be used. */
export async function openReading(command: string, env: Env<typeof dayVariables>): Promise<Reading> {
  const [run, bucket] = [newRunId(), connectS3(env)];
  await checkBucket(bucket);
  const session = { application: `etl:${command} run=${run}`, timeoutSeconds: env.RUN_TIMEOUT_SECONDS };
  return { command, bucket, session, log: (step, fields) => log({ step, run, ...fields }) };
}

/**
 * Reads each day back, and continues past one that fails.
 * @param read returns the day's manifest, or throws what is wrong with the day.
 * @param ended is called with the rows that were read and the number of days that failed.
 * @throws Error at the end that lists the days that failed, each with the next command.
 */
export async function eachDay(
  { command, log }: Reading,
  days: string[],
  read: (day: string) => Promise<Manifest>,
  ended: (rows: number, failed: number) => Promise<void> = async () => {},
): Promise<void> {
  const started = performance.now();
  const totals = { days: 0, rows: 0, bytes: 0 };
  const faults: string[] = [];
  for (const day of days) {
    try {
      const { rows, parts } = await read(day);
      totals.rows += rows;
      totals.bytes += bytesOf(parts);
    } catch (error) {
      const { message } = error as Error;
      const next = /\bmake /.test(message) ? "" : `. Next: make ${command} FROM=${day} TO=${addDays(day)}`;
      faults.push(`  ${day}: ${message}${next}`);
    }
    totals.days += 1;
    progress(`${totals.days}/${days.length} days, ${thousands(totals.rows)} rows`);
  }
  progress("");
  const seconds = Math.round(performance.now() - started) / 1000;
  log(faults.length ? "failed" : "done", { ...totals, failed: faults.length, seconds });
  await ended(totals.rows, faults.length);
  if (faults.length) throw new Error(`${faults.length} of ${days.length} days failed:\n${faults.join("\n")}`);
}

/** Reads a day by its manifest. Where that is replaced meanwhile, and its parts deleted, reads the new one. */
export async function readDay(
  bucket: Bucket,
  day: string,
  read: (manifest: Manifest) => Promise<void>,
): Promise<Manifest | undefined> {
  for (let etag = ""; ; ) {
    const found = await readManifest(bucket, day);
    if (!found) return undefined;
    try {
      await read(found.manifest);
      return found.manifest;
    } catch (error) {
      if ((error as Error).name !== "Damaged" || found.etag === etag) throw error;
      etag = found.etag;
    }
  }
}

/** Names the object: the day's manifest and its parts do not agree. */
export const damaged = ({ name }: Bucket, key: string, how: string): Error =>
  Object.assign(new Error(`s3://${name}/${key}: ${how}`), { name: "Damaged" });

/**
 * The raw lines of a part, in pieces that may end inside one.
 * @throws Error named Damaged where the part does not exist, or is not what its manifest says.
 */
export async function* readPart(bucket: Bucket, part: Part): AsyncGenerator<Buffer> {
  const object = await get(bucket, part.key, part.bytes);
  if (!object) throw damaged(bucket, part.key, "it does not exist");
  const check = <F extends keyof Part>(field: F, found: Part[F]): void => {
    if (found !== part[field])
      throw damaged(bucket, part.key, `expected ${field} ${part[field]} (its manifest), found ${found}`);
  };
  check("bytes", object.body.length);
  check("sha256", createHash("sha256").update(object.body).digest("hex"));
  const [raw, gunzip] = [createHash("sha256"), createGunzip({ chunkSize: 2 ** 16 })];
  let rows = 0;
  gunzip.end(object.body);
  try {
    for await (const piece of gunzip as AsyncIterable<Buffer>) {
      raw.update(piece);
      for (let at = piece.indexOf(10); at >= 0; at = piece.indexOf(10, at + 1)) rows += 1;
      progress(`${part.key}: ${thousands(rows)} of ${thousands(part.rows)} rows`);
      yield piece;
    }
  } catch (error) {
    const { code, message } = error as Error & { code?: string };
    throw code?.startsWith("Z_") ? damaged(bucket, part.key, `it does not decompress (${message})`) : error;
  }
  check("rows", rows);
  check("sha256_raw", raw.digest("hex"));
}
