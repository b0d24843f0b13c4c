/** BigQuery: the client, and which of its errors are worth another attempt. */
import { BigQuery } from "@google-cloud/bigquery";
import { OAuth2Client } from "google-auth-library";
import { SourceError } from "../copy.ts";
import { type Env, name, optional, required, serverUrl } from "../env.ts";
import type { Run } from "../run.ts";

export const bigqueryVariables = {
  BIGQUERY_PROJECT: required(name),
  BIGQUERY_DATASET: required(name),
  BIGQUERY_LOCATION: required(name),
  BIGQUERY_ENDPOINT: optional(serverUrl),
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

/** Adds what a finished query job was billed to the run's total. Loads and copies are free. */
export function addBilled(run: Run, statistics: { query?: { totalBytesBilled?: string } } | undefined): number {
  const billed = Number(statistics?.query?.totalBytesBilled ?? 0);
  run.totals.bytes_billed += billed;
  return billed;
}

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
