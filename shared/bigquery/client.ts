/** BigQuery: the client, and which of its errors are worth another attempt. */
import { setTimeout as delay } from "node:timers/promises";
import { BigQuery, type BigQueryOptions } from "@google-cloud/bigquery";
import { OAuth2Client } from "google-auth-library";
import { SourceError } from "../copy.ts";
import { type Env, like, name, optional, required, serverUrl } from "../env.ts";
import type { Run } from "../run.ts";

export const bigqueryVariables = {
  BIGQUERY_PROJECT: required(
    like(/^[\w-]+$/, "must be a project's id: letters, digits and -. Projects of a domain (example.com:shop) are not supported"),
  ),
  BIGQUERY_DATASET: required(name),
  BIGQUERY_LOCATION: required(name),
  BIGQUERY_ENDPOINT: optional(serverUrl),
};
export type BigQueryEnv = Env<typeof bigqueryVariables>;

/** The client, with the credentials of the environment; for a local server (BIGQUERY_ENDPOINT), without. */
export function connectBigQuery(env: BigQueryEnv, others: BigQueryOptions = {}): BigQuery {
  const options = { projectId: env.BIGQUERY_PROJECT, location: env.BIGQUERY_LOCATION, ...others };
  if (!env.BIGQUERY_ENDPOINT) return new BigQuery(options);
  // Without a token it sends a custom endpoint no headers, on which its upload crashes; and looks for a metadata server for 15 s.
  process.env.METADATA_SERVER_DETECTION = "none";
  const authClient = new OAuth2Client();
  authClient.setCredentials({ access_token: "local", expiry_date: Number.MAX_SAFE_INTEGER });
  return new BigQuery({ ...options, apiEndpoint: env.BIGQUERY_ENDPOINT, authClient });
}

/** A job's labels, by which it is found in the list of jobs. */
export const labels = (run: Run): Record<string, string> => ({ etl_pipeline: run.pipeline, etl_run: run.id });

/** For what has a unique name: it exists because the client asked again when the first answer got lost. */
export function ignoreAlreadyThere(error: { code?: number }): void {
  if (error.code !== 409) throw error;
}

/** An error of the API or of a job: `code` is HTTP's or the socket's, a reason one of Google's list ("Error messages" of BigQuery). */
export type ApiError = Error & { code?: number | string; errors?: { reason?: string }[] };

/** BigQuery is overloaded, another job writes to the table, or a connection broke, the token's too. */
const transient = new RegExp(
  "^(408|429|500|502|503|504) |(backend|internal)Error|RateLimitExceeded|tableUnavailable|due to concurrent update|ECONNRESET" +
    "|ECONNREFUSED|EPIPE|ETIMEDOUT|EAI_AGAIN|socket hang up|premature close|other side closed|network timeout|due to timeout|_TIMEOUT",
  "i",
);

/** Whether trying again may help, by an error's code, reasons and message. */
export function isTransient(error: unknown): boolean {
  const { code, errors = [], message } = error as ApiError;
  return !(error instanceof SourceError) && transient.test([code, ...errors.map(({ reason }) => reason), message].join(" "));
}

/**
 * Calls `attempt` up to seven times, waiting about 1, 2, 4, 8, 16 and 32 s in between (as BigQuery's SLA asks), as long as its errors are
 * transient. Each attempt gets its number, from 1: nothing of an earlier one is used again.
 */
export async function withRetry<T>(run: Run, attempt: (number: number) => Promise<T>): Promise<T> {
  for (let number = 1; ; number++) {
    try {
      return await attempt(number);
    } catch (error) {
      if (number === 7 || run.signal.aborted || !isTransient(error)) throw error;
      const seconds = 2 ** (number - 1) * (0.75 + Math.random() / 2);
      run.log("retry", { attempt: number, in_seconds: Number(seconds.toFixed(1)), error: (error as Error).message });
      await delay(seconds * 1000, undefined, { signal: run.signal });
    }
  }
}

/** What to do about an error that trying again does not help. */
export const remedy = "Check BIGQUERY_PROJECT, its billing account, and your account's roles (bigquery.jobUser, bigquery.dataEditor)";

// biome-ignore lint/suspicious/noExplicitAny: the API's own Job resource
export type JobResource = any;

/**
 * Runs a job to its end, and adds what it was billed to the run's total; it is cancelled where the run is stopped.
 * @param jobId of its attempt: BigQuery runs one id once, however often it is asked.
 * @throws Error with the job's error, and what to do where trying again does not help.
 */
export async function runJob(run: Run, bigquery: BigQuery, jobId: string, configuration: object): Promise<JobResource> {
  run.signal.throwIfAborted();
  const job = Object.assign(bigquery.job(jobId), { pollIntervalMs: 100 });
  using _cancel = run.onStop(() => job.cancel());
  const created = bigquery.createJob({ jobId, configuration: { ...configuration, labels: labels(run) } });
  await created.catch(ignoreAlreadyThere).catch((error: ApiError) => {
    if (error.code === 403 && !isTransient(error)) error.message += `. ${remedy}`;
    throw error;
  });
  const [metadata] = (await job.promise()) as [JobResource];
  run.totals.bytes_billed += Number(metadata.statistics.query?.totalBytesBilled ?? 0); // loads and copies are free
  return metadata;
}
