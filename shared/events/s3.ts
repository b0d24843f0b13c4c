/**
 * S3: objects and conditional writes. Every error names the bucket and the object.
 */
import { addAbortSignal, type Readable } from "node:stream";
import { buffer } from "node:stream/consumers";
import { setTimeout as delay } from "node:timers/promises";
import * as s3 from "@aws-sdk/client-s3";
import { type Env, like, name, optional, required, secret, serverUrl, text, UsageError } from "../env.ts";

const bucketName = like(/^[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]$/, "may hold 3 to 63 lower-case letters, digits, . and - only");
/** Without slashes before it, and with one behind it unless it is empty. */
const prefix = (value: string): string => value.replace(/^\/+|\/*$/g, "").replace(/.$/u, "$&/");

/** The client reads the credentials itself: from these variables or, without them, from a profile or the machine's role. */
export const bucketVariables = {
  S3_ENDPOINT: optional(serverUrl),
  S3_BUCKET: required(bucketName),
  S3_PREFIX: optional(prefix, ""),
  AWS_REGION: required(name),
  AWS_ACCESS_KEY_ID: optional(text),
  AWS_SECRET_ACCESS_KEY: optional(secret),
  AWS_SESSION_TOKEN: optional(secret),
};

export interface Bucket {
  client: s3.S3Client;
  name: string;
  /** Stands before every key: empty, or ends with a slash. */
  prefix: string;
}

/** What the S3 client's errors carry. */
interface S3Error extends Error {
  code?: string;
  $metadata?: { httpStatusCode?: number };
}

/** Milliseconds for a request and its answer. A body of so many bytes adds to it what a link of 100 KB/s needs. */
const deadline = (bytes: number): number => 20_000 + Math.round(bytes / 100);

export function connectS3(env: Pick<Env<typeof bucketVariables>, "S3_ENDPOINT" | "S3_BUCKET" | "S3_PREFIX" | "AWS_REGION">): Bucket {
  const client = new s3.S3Client({
    region: env.AWS_REGION,
    ...(env.S3_ENDPOINT && { endpoint: env.S3_ENDPOINT, forcePathStyle: true }),
    responseChecksumValidation: "WHEN_REQUIRED", // the manifest has the SHA-256, and says what differs
    maxAttempts: 7, // the last one some 6 s after the first; where S3 asks for less, some 30 s
    requestHandler: { connectionTimeout: 5000, requestTimeout: deadline(0), throwOnRequestTimeout: true },
  });
  return { client, name: env.S3_BUCKET, prefix: env.S3_PREFIX };
}

/** Names the bucket and the object in the error's text; what else it carries stays. */
async function naming<T>({ name }: Bucket, key: string, work: Promise<T>): Promise<T> {
  return await work.catch((error: S3Error) => {
    const what = [error.name, error.$metadata?.httpStatusCode, error.message || error.code];
    error.message = `s3://${name}/${key}: ${what.filter((word) => word && word !== "Error").join(" ")}`;
    throw error;
  });
}

/** @returns false where the bucket does not exist. @throws UsageError where it may not be used, with what to do. */
export async function bucketExists(bucket: Bucket): Promise<boolean> {
  // Not HeadBucket: its errors have no text.
  const list = new s3.ListObjectsV2Command({ Bucket: bucket.name, Prefix: `${bucket.prefix}events/`, MaxKeys: 1 });
  return await bucket.client.send(list).then(
    () => true,
    (error: S3Error) => {
      const { name, message, $metadata } = error;
      if (name === "NoSuchBucket") return false;
      if (($metadata?.httpStatusCode ?? 500) >= 500 && name !== "CredentialsProviderError")
        return naming(bucket, "", Promise.reject(error));
      const check = "Check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION and the bucket's policy";
      throw new UsageError(`bucket ${bucket.name} (S3_BUCKET) may not be used: ${name} ${message}. ${check}`);
    },
  );
}

/** @throws UsageError where the bucket does not exist or may not be used, with what to do. */
export async function checkBucket(bucket: Bucket): Promise<void> {
  if (!(await bucketExists(bucket))) throw new UsageError(`bucket ${bucket.name} (S3_BUCKET) does not exist. Run: make migrate`);
}

/** In the client's region. */
export async function createBucket(bucket: Bucket): Promise<void> {
  await naming(bucket, "", bucket.client.send(new s3.CreateBucketCommand({ Bucket: bucket.name })));
}

/**
 * The object with its ETag, or undefined where it does not exist. The client repeats a request that fails; a body that is cut or stalls is
 * read again here. @param bytes how large it is, if that is known.
 */
export async function get(bucket: Bucket, key: string, bytes = 0): Promise<{ body: Buffer; etag: string } | undefined> {
  const read = async (attempt: number): Promise<{ body: Buffer; etag: string }> => {
    const { Body, ETag = "" } = await bucket.client.send(new s3.GetObjectCommand({ Bucket: bucket.name, Key: key }));
    const signal = AbortSignal.timeout(deadline(bytes));
    try {
      return { body: await buffer(addAbortSignal(signal, Body as Readable)), etag: ETag };
    } catch (error) {
      if (attempt < 4) return await read(attempt + 1);
      const how = signal.aborted ? `was not complete after ${deadline(bytes) / 1000} s` : "was cut off";
      throw new Error(`its body ${how}, four times (${(error as Error).message})`);
    }
  };
  return await naming(bucket, key, read(1)).catch((error: S3Error) => {
    if (error.name === "NoSuchKey") return undefined;
    throw error;
  });
}

/**
 * Puts an object, whole or not at all, where it replaces what the caller has seen: the object with this ETag, or, without one, none.
 * @param metadata the object's own, in S3.
 * @returns false where another was there first. That may be the same one: the client repeats a request whose answer was lost.
 */
export async function put(
  bucket: Bucket,
  key: string,
  body: Buffer | string,
  seen: string | undefined,
  metadata: Record<string, string>,
): Promise<boolean> {
  const condition = seen === undefined ? { IfNoneMatch: "*" } : { IfMatch: seen };
  const ContentType = typeof body === "string" ? "application/json" : "application/gzip";
  const object = { Bucket: bucket.name, Key: key, Body: body, Metadata: metadata, ContentType };
  const sent = bucket.client.send(new s3.PutObjectCommand({ ...object, ...condition }), { requestTimeout: deadline(body.length) });
  return await naming(bucket, key, sent).then(
    () => true,
    async (error: S3Error) => {
      const { name, $metadata } = error;
      // NoSuchKey: the object with that ETag no longer exists.
      if ($metadata?.httpStatusCode === 412 || (name === "NoSuchKey" && seen !== undefined)) return false;
      if (name !== "ConditionalRequestConflict") throw error;
      await delay(500); // another PUT of the key is under way
      return await put(bucket, key, body, seen, metadata);
    },
  );
}

/** Deletes objects; one that does not exist is no error. */
export async function removeObjects(bucket: Bucket, keys: string[]): Promise<void> {
  for (let first = 0; first < keys.length; first += 1000) {
    const Objects = keys.slice(first, first + 1000).map((Key) => ({ Key }));
    const request = new s3.DeleteObjectsCommand({ Bucket: bucket.name, Delete: { Objects, Quiet: true } });
    const { Errors: [fault] = [] } = await naming(bucket, keys[first] ?? "", bucket.client.send(request));
    if (fault) throw new Error(`s3://${bucket.name}/${fault.Key}: not deleted: ${fault.Code} ${fault.Message}`);
  }
}

/** The objects whose keys start with `prefix`, in the order of their keys. */
export async function* listObjects(bucket: Bucket, prefix: string): AsyncGenerator<{ key: string; modified: Date }> {
  const pages = s3.paginateListObjectsV2({ client: bucket.client }, { Bucket: bucket.name, Prefix: prefix });
  for await (const { Contents = [] } of pages)
    for (const { Key, LastModified } of Contents) if (Key && LastModified) yield { key: Key, modified: LastModified };
}
