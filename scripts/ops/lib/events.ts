/** What the operations on the archive of events share: the days of FROM and TO, and reading a day back. */
import { createHash } from "node:crypto";
import { pipeline } from "node:stream/promises";
import { createGunzip } from "node:zlib";
import type { Sql } from "postgres";
import { type Env, UsageError } from "../../../shared/env.ts";
import {
  addDays,
  bytesOf,
  daysBetween,
  type Manifest,
  type Part,
  readManifest,
} from "../../../shared/events/archive.ts";
import { type Bucket, bucketVariables, checkBucket, connectS3, getStream } from "../../../shared/events/s3.ts";
import { log, progress, thousands } from "../../../shared/log.ts";
import { newRunId, pipelineVariables } from "../../../shared/run.ts";
import { checkSession, connect } from "../../../shared/session.ts";

export const dayVariables = { ...pipelineVariables, ...bucketVariables };

/** FROM and TO as the days they are. @throws UsageError where they are no dates, or no day lies between them. */
export function readDays(
  { FROM, TO }: { FROM?: string | undefined; TO?: string | undefined },
  command: string,
): string[] {
  const example = `Example: make ${command} FROM=2017-01-01 TO=2018-01-01`;
  if (!FROM || !TO)
    throw new UsageError(`make ${command} needs FROM and TO: the first day, and the day after the last. ${example}`);
  for (const [name, value] of Object.entries({ FROM, TO }))
    if (!value.endsWith("T00:00:00.000000+00"))
      throw new UsageError(`${name} ${value} must be a date: the archive is by days of UTC. ${example}`);
  const [from, to] = [FROM.slice(0, 10), TO.slice(0, 10)];
  if (from === to)
    throw new UsageError(
      `FROM and TO are both ${from}, and TO is exclusive: there is no day between them. For that day: TO=${addDays(from)}`,
    );
  return daysBetween(from, to);
}

/** A day, and what to read it with. */
export interface Day {
  day: string;
  bucket: Bucket;
  sql: Sql;
  say(step: string, fields?: object): void;
}

/**
 * Reads each day of FROM and TO back. @param read returns the day's manifest, if there is one, and what is wrong with it, if anything.
 * @throws Error at the end that lists the days with a fault.
 */
export async function eachDay(
  command: string,
  variable: "SOURCE_DATABASE_URL" | "ETL_DATABASE_URL",
  env: Env<typeof dayVariables>,
  read: (day: Day) => Promise<{ manifest: Manifest | undefined; fault: string | undefined }>,
): Promise<void> {
  const [days, run, bucket, started] = [readDays(env, command), newRunId(), connectS3(env), performance.now()];
  await checkBucket(bucket);
  const session = { application: `etl:${command} run=${run}`, timeoutSeconds: env.RUN_TIMEOUT_SECONDS };
  await using sql = connect(env[variable], session);
  await checkSession(variable, sql);
  const say = (step: string, fields = {}): void => log({ step, run, ...fields });
  const totals = { days: 0, rows: 0, bytes: 0 };
  const faults: string[] = [];
  for (const day of days) {
    const { manifest, fault } = await read({ day, bucket, sql, say });
    if (fault) faults.push(`  ${day}: ${fault}`);
    totals.days += 1;
    totals.rows += manifest?.rows ?? 0;
    totals.bytes += manifest ? bytesOf(manifest) : 0;
    progress(`${command}: ${day}, ${totals.days}/${days.length} days, ${thousands(totals.rows)} rows`);
  }
  progress("");
  const seconds = Math.round(performance.now() - started) / 1000;
  say(faults.length ? "failed" : "done", { ...totals, differ: faults.length, seconds });
  if (faults.length) throw new Error(`${faults.length} of ${days.length} days differ:\n${faults.join("\n")}`);
}

/** Reads a day by its manifest. Where that is replaced meanwhile, and its parts deleted, reads the new one. */
export async function readDay(
  { bucket, day }: Day,
  read: (manifest: Manifest) => Promise<void>,
): Promise<Manifest | undefined> {
  for (let etag = ""; ; ) {
    const found = await readManifest(bucket, day);
    if (!found) return undefined;
    try {
      await read(found.manifest);
      return found.manifest;
    } catch (error) {
      if ((error as Error).name !== "NoSuchKey" || found.etag === etag) throw error;
      etag = found.etag;
    }
  }
}

/** Names the object; the day's manifest and its parts do not agree. */
export const damaged = (key: string, how: string): Error =>
  Object.assign(new Error(`${key}: ${how}`), { name: "Damaged" });

/**
 * Reads a part; `use` gets its raw lines, in pieces that may end inside one.
 * @throws Error named NoSuchKey where it does not exist, or Damaged where it is not what its manifest says.
 */
export async function readPart(
  bucket: Bucket,
  part: Part,
  use: (lines: AsyncIterable<Buffer>) => Promise<void>,
): Promise<void> {
  const [raw, packed] = [createHash("sha256"), createHash("sha256")];
  let [rows, bytes] = [0, 0];
  async function* count(pieces: AsyncIterable<Buffer>): AsyncGenerator<Buffer> {
    for await (const piece of pieces) {
      packed.update(piece);
      bytes += piece.length;
      yield piece;
    }
  }
  async function* lines(pieces: AsyncIterable<Buffer>): AsyncGenerator<Buffer> {
    for await (const piece of pieces) {
      raw.update(piece);
      for (let at = piece.indexOf(10); at >= 0; at = piece.indexOf(10, at + 1)) rows += 1;
      yield piece;
    }
  }
  const read = pipeline(await getStream(bucket, part.key), count, createGunzip(), lines, use);
  await read.catch((error: Error & { code?: string }) => {
    throw error.code?.startsWith("Z_") ? damaged(part.key, `it does not decompress (${error.message})`) : error;
  });
  const is = { rows, bytes, sha256: packed.digest("hex"), sha256_raw: raw.digest("hex") };
  const differs = (["rows", "bytes", "sha256", "sha256_raw"] as const).find((field) => is[field] !== part[field]);
  if (differs) throw damaged(part.key, `expected ${differs} ${part[differs]} (its manifest), found ${is[differs]}`);
}
