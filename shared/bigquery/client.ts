/**
 * BigQuery: the client, and which of its errors are worth another attempt.
 */
import { BigQuery } from "@google-cloud/bigquery";
import { OAuth2Client } from "google-auth-library";
import { SourceError } from "../copy.ts";
import type { Env } from "../env.ts";

export type BigQueryEnv = Env<"BIGQUERY_PROJECT" | "BIGQUERY_DATASET" | "BIGQUERY_LOCATION" | "BIGQUERY_ENDPOINT">;

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

/** For what has a name of its own: it is there because the client asked again when the first answer got lost. */
export function ignoreAlreadyThere(error: { code?: number }): void {
  if (error.code !== 409) throw error;
}

/** Begins the message of a load whose counts differ. */
export const SHORT_LOAD = "the counts differ";

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
    message?.startsWith(SHORT_LOAD) ||
    /ECONNRESET|ECONNREFUSED|EPIPE|ETIMEDOUT|EAI_AGAIN|socket hang up|could not serialize access|premature close|other side closed/i.test(
      `${code} ${message}`,
    )
  );
}
