#!/usr/bin/env -S npx tsx
/**
 * dead-letters: the messages of the sensors' topic that are not valid changes: where they were, when, why, and how they begin.
 *
 *   make dead-letters                 the latest twenty (LIMIT=), and how many there are for each reason; JSON=1 for programs
 *   safe to re-run   yes: it only reads
 */
import { flag, number, optional, readEnv } from "../../shared/env.ts";
import { main } from "../../shared/main.ts";
import { kafkaVariables } from "../../shared/sensors/broker.ts";
import { clickhouseVariables, connectClickHouse, select } from "../../shared/sensors/clickhouse.ts";
import { table } from "../../shared/table.ts";

await main(import.meta, async () => {
  const own = { SENSORS_TOPIC: kafkaVariables.SENSORS_TOPIC, LIMIT: optional(number(1, 100_000), 20), JSON: optional(flag, false) };
  const env = readEnv({ ...clickhouseVariables, ...own });
  const { SENSORS_TOPIC: topic, LIMIT: limit } = env;
  await using client = connectClickHouse(env);
  const ask = (query: string) => select<Record<string, string>>(client, query, { topic, limit });
  const reasons = await ask(`
    SELECT reason, epoch, count() AS messages, min(parked_at) AS first, max(parked_at) AS last
    FROM sensor_dead_letters FINAL WHERE topic = {topic: String} GROUP BY reason, epoch ORDER BY messages DESC, reason`);
  const letters = await ask(`
    SELECT epoch, partition, offset, parked_at, reason, ifNull(left(key, 40), 'NULL') AS key, length(value) AS bytes,
      replaceRegexpAll(toValidUTF8(left(value, 60)), '[[:cntrl:]]', '?') AS begins
    FROM sensor_dead_letters FINAL WHERE topic = {topic: String}
    ORDER BY parked_at DESC, epoch DESC, partition, offset LIMIT {limit: UInt32}`);
  const next = "fix the source, or the views by a new file in schemas/clickhouse (make migrate), then: make replay-dead-letters";
  if (env.JSON) process.stdout.write(`${JSON.stringify({ reasons, letters })}\n`);
  else if (!reasons.length) process.stdout.write(`no dead letters of ${topic}\n`);
  else process.stdout.write(`${table(letters)}\n\n${table(reasons)}\n\nNext: ${next}\n`);
});
