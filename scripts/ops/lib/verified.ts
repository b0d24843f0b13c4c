/** The metrics of a verification. */
import { redact } from "../../../shared/env.ts";
import { log } from "../../../shared/log.ts";
import { type Metrics, pushMetrics } from "../../../shared/metrics.ts";

/** Pushes how much differs, and where nothing does the time. The Pushgateway's absence is a warning. */
export async function pushVerified(url: string, pipeline: string, differences: number): Promise<void> {
  const values: Metrics = { etl_verify_differences: differences };
  if (!differences) values.etl_verify_last_success_timestamp_seconds = Date.now() / 1000;
  await pushMetrics(url, pipeline, values, { command: "verify" }).catch((error: Error) =>
    log({ pipeline, step: "warning", warning: "the metrics were not pushed", error: redact(error.message) }),
  );
}
