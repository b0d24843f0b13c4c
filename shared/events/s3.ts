/** S3: objects and conditional writes. Every error names the bucket and the object. */
import type { Readable } from "node:stream";
import { buffer } from "node:stream/consumers";
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
type S3Error = Error & { code?: string; $metadata?: { httpStatusCode?: number } };

export function connectS3(env: Pick<Env<typeof bucketVariables>, "S3_ENDPOINT" | "S3_BUCKET" | "S3_PREFIX" | "AWS_REGION">): Bucket {
  const client = new s3.S3Client({
    region: env.AWS_REGION,
    ...(env.S3_ENDPOINT && { endpoint: env.S3_ENDPOINT, forcePathStyle: true }),
    responseChecksumValidation: "WHEN_REQUIRED", // the manifest has the SHA-256, and says what differs
    maxAttempts: 7, // the last one some 6 s after the first; where S3 asks for less, some 30 s
    requestHandler: { connectionTimeout: 5000, socketTimeout: 30_000 }, // ms without a byte, of a body too
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
  try {
    await naming(bucket, "", bucket.client.send(list));
    return true;
  } catch (error) {
    const { name, message, $metadata } = error as S3Error;
    if (name === "NoSuchBucket") return false;
    if (($metadata?.httpStatusCode ?? 500) >= 500 && name !== "CredentialsProviderError") throw error;
    const check = "Check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION and the bucket's policy";
    throw new UsageError(`S3_BUCKET may not be used: ${message}. ${check}`);
  }
}

/** @throws UsageError where the bucket does not exist or may not be used, with what to do. */
export async function checkBucket(bucket: Bucket): Promise<void> {
  if (!(await bucketExists(bucket))) throw new UsageError(`bucket ${bucket.name} (S3_BUCKET) does not exist. Run: make migrate`);
}

/** The object with its ETag, or undefined where it does not exist. */
export async function get(bucket: Bucket, key: string): Promise<{ body: Buffer; etag: string } | undefined> {
  for (let attempt = 1; ; attempt++) {
    try {
      const { Body, ETag = "" } = await naming(bucket, key, bucket.client.send(new s3.GetObjectCommand({ Bucket: bucket.name, Key: key })));
      return { body: await naming(bucket, key, buffer(Body as Readable)), etag: ETag };
    } catch (error) {
      const { name, $metadata } = error as S3Error;
      if (name === "NoSuchKey") return undefined;
      if ($metadata || attempt === 4) throw error; // the client repeats a request that fails, but not one whose body is cut or stalls
    }
  }
}

/**
 * Puts an object, whole or not at all, where it replaces what the caller has seen: the object with this ETag, or, without one, none.
 * @param run in the object's metadata: who put it.
 * @returns false where another was there first. That may be the same one: the client repeats a request whose answer was lost.
 */
export async function put(bucket: Bucket, key: string, body: Buffer | string, run: string, seen?: string): Promise<boolean> {
  const condition = seen === undefined ? { IfNoneMatch: "*" } : { IfMatch: seen };
  const ContentType = typeof body === "string" ? "application/json" : "application/gzip";
  const object = { Bucket: bucket.name, Key: key, Body: body, Metadata: { run }, ContentType };
  try {
    await naming(bucket, key, bucket.client.send(new s3.PutObjectCommand({ ...object, ...condition })));
    return true;
  } catch (error) {
    const { name, $metadata } = error as S3Error;
    if ($metadata?.httpStatusCode === 412 || name === "NoSuchKey") return false; // the object with that ETag no longer exists
    throw error;
  }
}

/** Deletes objects; one that does not exist is no error. */
export async function removeObjects(bucket: Bucket, keys: string[]): Promise<void> {
  const remove = (Key: string) => bucket.client.send(new s3.DeleteObjectCommand({ Bucket: bucket.name, Key }));
  await Promise.all(keys.map((key) => naming(bucket, key, remove(key))));
}

/** The objects whose keys start with `prefix`, in the order of their keys. */
export async function* listObjects(bucket: Bucket, prefix: string): AsyncGenerator<{ key: string; modified: Date }> {
  const pages = s3.paginateListObjectsV2({ client: bucket.client }, { Bucket: bucket.name, Prefix: prefix });
  for await (const { Contents = [] } of pages)
    for (const { Key, LastModified } of Contents) if (Key && LastModified) yield { key: Key, modified: LastModified };
}
