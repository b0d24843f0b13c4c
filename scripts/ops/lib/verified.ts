/** What becomes of a proof: a row in etl.verifications, which make report shows, and metrics. */
import { type Metrics, pushMetrics } from "../../../shared/metrics.ts";
import type { Run } from "../../../shared/run.ts";

/**
 * Pushes how much differs, and where nothing does the time; a Pushgateway that is away costs a warning. Then records the proof.
 * @param rows that were compared. @param differences rows, of events days, that differ. @param found the same in words.
 */
export async function recordVerified(run: Run, url: string, rows: number, differences: number, found: string | null): Promise<void> {
  const { pipeline, etl, totals } = run;
  const values: Metrics = { etl_verify_differences: differences };
  if (!differences) values.etl_verify_last_success_timestamp_seconds = Date.now() / 1000;
  await pushMetrics(url, pipeline, values, { command: "verify" }).catch(({ message }: Error) =>
    run.log("warning", { warning: "the metrics were not pushed", error: message }),
  );
  await etl`
    insert into etl.verifications (pipeline, rows, differences, found, bytes_billed)
    values (${pipeline}, ${rows}, ${differences}, ${found}, ${totals.bytes_billed})`;
}
