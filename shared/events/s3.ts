/**
 * S3: objects and conditional writes. Every error names the bucket and the object.
 */
import { addAbortListener } from "node:events";
import { Readable } from "node:stream";
import { setTimeout as delay } from "node:timers/promises";
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
import { Upload } from "@aws-sdk/lib-storage";
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

/** The bucket, with the credentials of the environment or, where it has none, those that the SDK finds. */
export function connectS3(env: S3Env): Bucket {
  const { AWS_ACCESS_KEY_ID: accessKeyId, AWS_SECRET_ACCESS_KEY: secretAccessKey, AWS_SESSION_TOKEN: token } = env;
  const client = new S3Client({
    region: env.AWS_REGION,
    ...(env.S3_ENDPOINT && { endpoint: env.S3_ENDPOINT, forcePathStyle: true }),
    ...(accessKeyId &&
      secretAccessKey && {
        credentials: { accessKeyId, secretAccessKey, ...(token && { sessionToken: token }) },
      }),
    responseChecksumValidation: "WHEN_REQUIRED", // the manifest has the SHA-256, and says what differs
    requestHandler: { connectionTimeout: 5000, requestTimeout: 60_000, throwOnRequestTimeout: true },
  });
  return { client, name: env.S3_BUCKET, prefix: env.S3_PREFIX };
}

/** @throws UsageError where the bucket is not there or may not be used, with what to do. */
export async function checkBucket(bucket: Bucket): Promise<void> {
  if (!(await bucketExists(bucket)))
    throw new UsageError(`bucket ${bucket.name} (S3_BUCKET) does not exist. Run: make migrate`);
}

/** @throws UsageError where the bucket may not be used. */
export async function bucketExists(bucket: Bucket): Promise<boolean> {
  try {
    // Not HeadBucket: its errors have no text.
    await bucket.client.send(
      new ListObjectsV2Command({ Bucket: bucket.name, Prefix: `${bucket.prefix}events/`, MaxKeys: 1 }),
    );
    return true;
  } catch (error) {
    const { name, message, $metadata } = error as S3Error;
    if (name === "NoSuchBucket") return false;
    if (($metadata?.httpStatusCode ?? 500) < 500 || name === "CredentialsProviderError")
      throw new UsageError(
        `bucket ${bucket.name} (S3_BUCKET) may not be used: ${name} ${message}. Check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION and the bucket's policy`,
      );
    throw named(error, bucket, "");
  }
}

/** In the region that the client is of; us-east-1 is the one that S3 does not want to be told. */
export async function createBucket(bucket: Bucket, region: string): Promise<void> {
  const where =
    region === "us-east-1"
      ? {}
      : { CreateBucketConfiguration: { LocationConstraint: region as BucketLocationConstraint } };
  const created = bucket.client.send(new CreateBucketCommand({ Bucket: bucket.name, ...where }));
  await created.catch((error: S3Error) => {
    if (error.name !== "BucketAlreadyOwnedByYou") throw named(error, bucket, "");
  });
}

/** Names the bucket and the object in the error's text; what else it carries stays. */
function named(error: unknown, { name }: Bucket, key: string): Error {
  const fault = error as S3Error;
  const status = fault.$metadata?.httpStatusCode;
  fault.message = `s3://${name}/${key}: ${[fault.name, status, fault.message || fault.code].filter(Boolean).join(" ")}`;
  return fault;
}

async function naming<T>(bucket: Bucket, key: string, work: Promise<T>): Promise<T> {
  return await work.catch((error) => {
    throw named(error, bucket, key);
  });
}

/** The object as text, with its ETag, or undefined where there is none. */
export async function getText(bucket: Bucket, key: string): Promise<{ text: string; etag: string } | undefined> {
  try {
    const answer = await bucket.client.send(new GetObjectCommand({ Bucket: bucket.name, Key: key }));
    return { text: (await answer.Body?.transformToString()) ?? "", etag: answer.ETag ?? "" };
  } catch (error) {
    if ((error as Error).name === "NoSuchKey") return undefined;
    throw named(error, bucket, key);
  }
}

/** The object's bytes as a stream. @throws Error named NoSuchKey where there is no such object. */
export async function getStream(bucket: Bucket, key: string): Promise<Readable> {
  const answer = bucket.client.send(new GetObjectCommand({ Bucket: bucket.name, Key: key }));
  return (await naming(bucket, key, answer)).Body as Readable;
}

/**
 * Puts text where it replaces what the caller has seen: the object with this ETag, or, without one, none.
 * @returns false where another was there first.
 */
export async function putText(
  bucket: Bucket,
  key: string,
  text: string,
  seen: string | undefined,
  metadata: Record<string, string>,
): Promise<boolean> {
  const condition = seen === undefined ? { IfNoneMatch: "*" } : { IfMatch: seen };
  const object = { Bucket: bucket.name, Key: key, Body: text, ContentType: "application/json", Metadata: metadata };
  try {
    await bucket.client.send(new PutObjectCommand({ ...object, ...condition }));
    return true;
  } catch (error) {
    const { name, $metadata } = error as S3Error;
    // NoSuchKey: the object with that ETag is no longer there.
    if ($metadata?.httpStatusCode === 412 || (name === "NoSuchKey" && seen !== undefined)) return false;
    throw named(error, bucket, key);
  }
}

/** What S3 takes in one piece, and the least that each piece but the last of an upload in several has. */
export const UPLOAD_PIECE_BYTES = 5 * 2 ** 20;

/**
 * Uploads a buffer or a stream as one object, in parts of at least 5 MB that S3 checks by their CRC32. An object becomes visible whole
 * or not at all; where the stream or the upload fails, nothing of it is left.
 */
export async function putStream(
  bucket: Bucket,
  key: string,
  body: Buffer | Readable,
  metadata: Record<string, string>,
  signal: AbortSignal,
): Promise<void> {
  const object = { Bucket: bucket.name, Key: key, Body: body, ContentType: "application/gzip", Metadata: metadata };
  // Upload.abort() does not wait for requests that are under way; what they make has to be there before it can be removed.
  const sent: Promise<unknown>[] = [];
  const client: S3Client = Object.create(bucket.client, {
    send: {
      value: (...request: Parameters<S3Client["send"]>) => {
        const answer = bucket.client.send(...request) as unknown as Promise<unknown>;
        sent.push(answer);
        return answer;
      },
    },
  });
  const upload = new Upload({
    client,
    params: { ...object, ChecksumAlgorithm: "CRC32" },
    partSize: UPLOAD_PIECE_BYTES,
    queueSize: 2,
  });
  signal.throwIfAborted();
  using _abort = addAbortListener(signal, () => void upload.abort());
  try {
    await upload.done();
  } catch (error) {
    if (body instanceof Readable) body.destroy();
    await Promise.race([Promise.allSettled(sent), delay(2000, undefined, { ref: false })]);
    const { uploadId: UploadId } = upload;
    if (UploadId)
      await bucket.client
        .send(new AbortMultipartUploadCommand({ Bucket: bucket.name, Key: key, UploadId }))
        .catch(() => {});
    throw named(error, bucket, key);
  }
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
  if (status !== undefined) return status >= 500 || status === 408 || status === 409 || status === 429;
  return /TimeoutError|ECONNRESET|ECONNREFUSED|EPIPE|ETIMEDOUT|EAI_AGAIN|socket hang up|the counts differ/.test(
    `${name} ${code} ${message}`,
  );
}
