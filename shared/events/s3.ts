/**
 * S3: objects and conditional writes. Every error names the bucket and the object.
 */
import type { Readable } from "node:stream";
import {
  AbortMultipartUploadCommand,
  type BucketLocationConstraint,
  CreateBucketCommand,
  DeleteObjectsCommand,
  GetObjectCommand,
  ListMultipartUploadsCommand,
  type ListMultipartUploadsCommandOutput,
  ListObjectsV2Command,
  PutObjectCommand,
  paginateListObjectsV2,
  S3Client,
} from "@aws-sdk/client-s3";
import { type Env, httpUrl, like, name, optional, required, secret, text, UsageError } from "../env.ts";

const bucketName = like(
  /^[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]$/,
  "may hold 3 to 63 lower-case letters, digits, . and - only",
);
/** Without slashes before it, and with one behind it unless it is empty. */
const prefix = (value: string): string => value.replace(/^\/+|\/*$/g, "").replace(/.$/u, "$&/");

export const bucketVariables = {
  S3_ENDPOINT: optional(httpUrl),
  S3_BUCKET: required(bucketName),
  S3_PREFIX: optional(prefix, ""),
  AWS_REGION: required(name),
  AWS_ACCESS_KEY_ID: optional(text),
  AWS_SECRET_ACCESS_KEY: optional(secret),
  AWS_SESSION_TOKEN: optional(secret),
};
type S3Env = Omit<Env<typeof bucketVariables>, "AWS_SESSION_TOKEN"> & { AWS_SESSION_TOKEN?: string | undefined };

export interface Bucket {
  client: S3Client;
  name: string;
  /** Stands before every key: empty, or ends with a slash. */
  prefix: string;
}

/** What the S3 client's errors carry. */
interface S3Error extends Error {
  code?: string;
  $metadata?: { httpStatusCode?: number };
}

/** Time for a request and its answer, to which a body adds 1 ms for each 100 bytes: a link of 100 KB/s is enough. */
const REQUEST_MS = 60_000;

/** The bucket, with the credentials of the environment or, where it has none, those that the SDK finds. */
export function connectS3(env: S3Env): Bucket {
  const { AWS_ACCESS_KEY_ID: accessKeyId, AWS_SECRET_ACCESS_KEY: secretAccessKey, AWS_SESSION_TOKEN: token } = env;
  const keys = accessKeyId &&
    secretAccessKey && { credentials: { accessKeyId, secretAccessKey, ...(token && { sessionToken: token }) } };
  const client = new S3Client({
    region: env.AWS_REGION,
    ...(env.S3_ENDPOINT && { endpoint: env.S3_ENDPOINT, forcePathStyle: true }),
    ...keys,
    responseChecksumValidation: "WHEN_REQUIRED", // the manifest has the SHA-256, and says what differs
    requestHandler: { connectionTimeout: 5000, requestTimeout: REQUEST_MS, throwOnRequestTimeout: true },
  });
  return { client, name: env.S3_BUCKET, prefix: env.S3_PREFIX };
}

/** Names the bucket and the object in the error's text; what else it carries stays. */
async function naming<T>({ name }: Bucket, key: string, work: Promise<T>): Promise<T> {
  return await work.catch((error: S3Error) => {
    const status = error.$metadata?.httpStatusCode;
    error.message = `s3://${name}/${key}: ${[error.name, status, error.message || error.code].filter(Boolean).join(" ")}`;
    throw error;
  });
}

/** @throws UsageError where the bucket does not exist or may not be used, with what to do. */
export async function checkBucket(bucket: Bucket): Promise<void> {
  if (!(await bucketExists(bucket)))
    throw new UsageError(`bucket ${bucket.name} (S3_BUCKET) does not exist. Run: make migrate`);
}

/** @throws UsageError where the bucket may not be used. */
export async function bucketExists(bucket: Bucket): Promise<boolean> {
  // Not HeadBucket: its errors have no text.
  const list = new ListObjectsV2Command({ Bucket: bucket.name, Prefix: `${bucket.prefix}events/`, MaxKeys: 1 });
  return await bucket.client.send(list).then(
    () => true,
    (error: S3Error) => {
      const { name, message, $metadata } = error;
      if (name === "NoSuchBucket") return false;
      if (($metadata?.httpStatusCode ?? 500) < 500 || name === "CredentialsProviderError")
        throw new UsageError(
          `bucket ${bucket.name} (S3_BUCKET) may not be used: ${name} ${message}. Check AWS_ACCESS_KEY_ID, ` +
            `AWS_SECRET_ACCESS_KEY, AWS_REGION and the bucket's policy`,
        );
      return naming(bucket, "", Promise.reject(error));
    },
  );
}

/** In the client's region; us-east-1 is the one that S3 does not want to be told. */
export async function createBucket(bucket: Bucket, region: string): Promise<void> {
  const where = region !== "us-east-1" && {
    CreateBucketConfiguration: { LocationConstraint: region as BucketLocationConstraint },
  };
  const created = bucket.client.send(new CreateBucketCommand({ Bucket: bucket.name, ...where }));
  await naming(bucket, "", created).catch((error: S3Error) => {
    if (error.name !== "BucketAlreadyOwnedByYou") throw error;
  });
}

/** The object as text, with its ETag, or undefined where there is none. */
export async function getText(bucket: Bucket, key: string): Promise<{ text: string; etag: string } | undefined> {
  const got = bucket.client.send(new GetObjectCommand({ Bucket: bucket.name, Key: key }));
  const read = got.then(async ({ Body, ETag = "" }) => ({ text: (await Body?.transformToString()) ?? "", etag: ETag }));
  return await naming(bucket, key, read).catch((error: S3Error) => {
    if (error.name === "NoSuchKey") return undefined;
    throw error;
  });
}

/** The object's bytes as a stream. @throws Error named NoSuchKey where there is no such object. */
export async function getStream(bucket: Bucket, key: string): Promise<Readable> {
  const answer = bucket.client.send(new GetObjectCommand({ Bucket: bucket.name, Key: key }));
  return (await naming(bucket, key, answer)).Body as Readable;
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
  const type = { ContentType: typeof body === "string" ? "application/json" : "application/gzip" };
  const object = { Bucket: bucket.name, Key: key, Body: body, Metadata: metadata, ...type };
  const requestTimeout = REQUEST_MS + body.length / 100;
  const sent = bucket.client.send(new PutObjectCommand({ ...object, ...condition }), { requestTimeout });
  return await naming(bucket, key, sent).then(
    () => true,
    (error: S3Error) => {
      // NoSuchKey: the object with that ETag no longer exists.
      if (error.$metadata?.httpStatusCode === 412 || (error.name === "NoSuchKey" && seen !== undefined)) return false;
      throw error;
    },
  );
}

/** Deletes objects; one that is not there is no error. */
export async function removeObjects(bucket: Bucket, keys: string[]): Promise<void> {
  for (let first = 0; first < keys.length; first += 1000) {
    const Objects = keys.slice(first, first + 1000).map((Key) => ({ Key }));
    const request = new DeleteObjectsCommand({ Bucket: bucket.name, Delete: { Objects, Quiet: true } });
    const { Errors: [fault] = [] } = await naming(bucket, keys[first] ?? "", bucket.client.send(request));
    if (fault) throw new Error(`s3://${bucket.name}/${fault.Key}: not deleted: ${fault.Code} ${fault.Message}`);
  }
}

/** The objects whose keys start with `prefix`, in the order of their keys. */
export async function* listObjects(bucket: Bucket, prefix: string): AsyncGenerator<{ key: string; modified: Date }> {
  const pages = paginateListObjectsV2({ client: bucket.client }, { Bucket: bucket.name, Prefix: prefix });
  for await (const { Contents = [] } of pages)
    for (const { Key, LastModified } of Contents) if (Key && LastModified) yield { key: Key, modified: LastModified };
}

/** Multipart uploads below `prefix` that were begun and never ended. S3 keeps their parts, and charges for them. */
export async function* listUploads(
  bucket: Bucket,
  prefix: string,
): AsyncGenerator<{ key: string; modified: Date; abort: () => Promise<unknown> }> {
  for (let page: ListMultipartUploadsCommandOutput | undefined; !page || page.IsTruncated; ) {
    const after = { KeyMarker: page?.NextKeyMarker, UploadIdMarker: page?.NextUploadIdMarker };
    const request = new ListMultipartUploadsCommand({ Bucket: bucket.name, Prefix: prefix, ...after });
    page = await naming(bucket, prefix, bucket.client.send(request));
    for (const { Key = "", UploadId, Initiated = new Date(0) } of page.Uploads ?? []) {
      const abort = new AbortMultipartUploadCommand({ Bucket: bucket.name, Key, UploadId });
      yield { key: Key, modified: Initiated, abort: () => naming(bucket, Key, bucket.client.send(abort)) };
    }
  }
}

/** Whether trying again may help: S3 was overloaded, or the connection to it broke. */
export function isTransientS3(error: unknown): boolean {
  const { name, code, message, $metadata } = error as S3Error;
  const status = $metadata?.httpStatusCode;
  if (status !== undefined) return status >= 500 || [408, 409, 429].includes(status);
  return /TimeoutError|ECONNRESET|ECONNREFUSED|EPIPE|ETIMEDOUT|EAI_AGAIN|socket hang up|the counts differ/.test(
    `${name} ${code} ${message}`,
  );
}
