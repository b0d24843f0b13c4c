/**
 * Metrics of the cron pipelines, pushed to a Pushgateway: job="etl", pipeline="NAME", and nothing that changes per run. And what the
 * rules over them expect.
 */

const help = {
  etl_last_success_timestamp_seconds: "When the pipeline last succeeded.",
  etl_last_failure_timestamp_seconds: "When the pipeline last failed.",
  etl_last_run_timestamp_seconds: "When the pipeline last ended, well or not.",
  etl_rows: "Rows upserted by the last successful run.",
  etl_bytes: "Bytes of JSON lines loaded by the last successful run.",
  etl_duration_seconds: "Duration of the last successful run.",
  etl_watermark_timestamp_seconds: "The watermark: every row that changed before it is at the destination.",
  etl_watermark_hold_seconds: "For how long an open transaction has kept the watermark from advancing; 0 if none does.",
  etl_unknown_source_columns: "Columns of the source table that the contract does not know.",
  // Of one model of views/. Names of their own: the alerts compare those above by pipeline, of which each has one.
  etl_model_last_success_timestamp_seconds: "When the model was last published.",
  etl_model_last_failure_timestamp_seconds: "When the model last failed, or what it needs did.",
  etl_model_rows: "Rows of the model when it was last published.",
  etl_model_bytes: "Bytes that the model, its checks and its publishing were billed then.",
  etl_model_duration_seconds: "How long the model and its checks took then.",
  // Of a pipeline's verification.
  etl_verify_differences: "Rows that differed between source and destination when they were last compared.",
  etl_verify_last_success_timestamp_seconds: "When source and destination were last proven to agree.",
};

export type Metrics = { [name in keyof typeof help]?: number };

/**
 * Adds the values to the pipeline's group (POST): what is not named stays as it was. The registry is a new one each time,
 * because prom-client starts every gauge of a registry at 0, and pushing that would erase the last success.
 * @param within a group of its own, such as one model's: a push replaces only what is in its own group.
 * @throws Error where the Pushgateway refuses them, or has not answered within 5 s.
 */
export async function pushMetrics(
  url: string,
  pipeline: string,
  values: Metrics,
  within: Record<string, string> = {},
): Promise<void> {
  const { Gauge, Pushgateway, Registry } = await import("prom-client"); // a tenth of a command's start, and most push nothing
  const registry = new Registry();
  for (const [name, value] of Object.entries(values))
    new Gauge({ name, help: help[name as keyof Metrics], registers: [registry] }).set(value);
  const gateway = new Pushgateway(url, { signal: AbortSignal.timeout(5000) } as object, registry);
  await gateway.pushAdd({ jobName: "etl", groupings: { pipeline, ...within } });
}

/** A timestamp in UTC as Postgres writes it, in seconds since 1970. */
export const epochSeconds = (timestamp: string): number => Date.parse(timestamp.replace(/\+00$/, "Z")) / 1000;
