/**
 * BigQuery: the client, and which of its errors are worth another attempt.
 */
import { BigQuery } from "@google-cloud/bigquery";
import { OAuth2Client } from "google-auth-library";
import { SourceError } from "../copy.ts";
import { type Env, httpUrl, name, optional, required } from "../env.ts";
import type { Run } from "../run.ts";

export const bigqueryVariables = {
  BIGQUERY_PROJECT: required(name),
  BIGQUERY_DATASET: required(name),
  BIGQUERY_LOCATION: required(name),
  BIGQUERY_ENDPOINT: optional(httpUrl),
};
export type BigQueryEnv = Env<typeof bigqueryVariables>;

/** The client, with the credentials of the environment; for a local server (BIGQUERY_ENDPOINT), without. */
export function connectBigQuery(env: BigQueryEnv): BigQuery {
  const options = { projectId: env.BIGQUERY_PROJECT, location: env.BIGQUERY_LOCATION };
  if (!env.BIGQUERY_ENDPOINT) return new BigQuery(options);
  // Without a token the client sends no headers at all to a custom endpoint, and its upload then crashes; and it would
  // look for a metadata server for 15 s first.
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

/** Fewer or more rows were loaded than read. */
export class ShortLoad extends Error {
  constructor(sent: number, loaded: number) {
    super(`the counts differ: ${sent} rows were read from the source, and ${loaded} were loaded; nothing was merged`);
  }
}

/** Whether the source or BigQuery refuses a value: reading it again does not help, and naming the row does. */
export function isRefusal(error: unknown): boolean {
  const { cause, errors } = error as { cause?: Error & { code?: string }; errors?: { reason?: string }[] };
  // Postgres's data exceptions and program limits; not those that name the row already.
  if (error instanceof SourceError)
    return /^(22|54)/.test(cause?.code ?? "") && !/etl refuses/.test(cause?.message ?? "");
  return errors?.some(({ reason }) => reason === "invalid") ?? false;
}

/** Whether trying again may help: the service was overloaded, or the connection to it broke. */
export function isTransient(error: unknown): boolean {
  if (error instanceof SourceError) return false;
  const { code, errors, message } = error as {
    code?: number | string;
    errors?: { reason?: string }[];
    message?: string;
  };
  return (
    [408, 429, 500, 502, 503, 504].includes(Number(code)) ||
    errors?.some(({ reason = "" }) => /^(job)?(backendError|internalError|rateLimitExceeded)$/i.test(reason)) ||
    error instanceof ShortLoad ||
    /ECONNRESET|ECONNREFUSED|EPIPE|ETIMEDOUT|EAI_AGAIN|socket hang up|could not serialize access|premature close|other side closed/i.test(
      `${code} ${message}`,
    )
  );
}
