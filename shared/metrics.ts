/**
 * Metrics of the cron pipelines, pushed to a Pushgateway: job="etl", pipeline="NAME", and nothing that changes per run.
 */

/** Name → value; README, "Metrics", says what they are. */
export type Metrics = Record<string, number>;

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
  for (const [name, value] of Object.entries(values)) new Gauge({ name, help: name, registers: [registry] }).set(value);
  const gateway = new Pushgateway(url, { signal: AbortSignal.timeout(5000) } as object, registry);
  await gateway.pushAdd({ jobName: "etl", groupings: { pipeline, ...within } });
}
