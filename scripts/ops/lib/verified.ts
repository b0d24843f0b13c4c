/** What becomes of a proof: a row in etl.verifications, which make report shows, and metrics. */
import type { Sql } from "postgres";
import { redact } from "../../../shared/env.ts";
import { log } from "../../../shared/log.ts";
import { type Metrics, pushMetrics } from "../../../shared/metrics.ts";

interface Proof {
  pipeline: string;
  rows: number;
  /** Rows, of events days, that differ. */
  differences: number;
  /** The same in words. */
  found: string | null;
  bytes_billed: number;
}

/** Pushes how much differs, and where nothing does the time; a Pushgateway that is away costs a warning. Then records the proof. */
export async function recordVerified(url: string, etl: Sql, proof: Proof): Promise<void> {
  const { pipeline, rows, differences, found, bytes_billed } = proof;
  const values: Metrics = { etl_verify_differences: differences };
  if (!differences) values.etl_verify_last_success_timestamp_seconds = Date.now() / 1000;
  await pushMetrics(url, pipeline, values, { command: "verify" }).catch((error: Error) =>
    log({ pipeline, step: "warning", warning: "the metrics were not pushed", error: redact(error.message) }),
  );
  await etl`
    insert into etl.verifications (pipeline, rows, differences, found, bytes_billed)
    values (${pipeline}, ${rows}, ${differences}, ${found}, ${bytes_billed})`;
}
