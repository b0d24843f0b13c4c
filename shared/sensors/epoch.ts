/**
 * The epoch of a topic: the high bits of every version that its messages write. Kafka's offsets order the changes only while
 * the topic and its partitions stay what they were; a new epoch makes what comes then win over all that came before.
 */
import type { Sql, TransactionSql } from "postgres";
import { UsageError } from "../env.ts";
import type { PartitionState } from "./kafka.ts";

export interface Epoch {
  number: number;
  /** Where in ClickHouse its rows belong. */
  database: string;
}

/** The topic's epoch, or undefined where no consumer has begun one. */
export async function readEpoch(etl: Sql, topic: string): Promise<Epoch | undefined> {
  const [epoch] = await etl<Epoch[]>`select epoch as number, database from etl.topics where topic = ${topic}`;
  return epoch;
}

/**
 * The topic's epoch; its first one where there is none yet.
 * @param where asks Kafka for the partitions' ends and the group's offsets.
 * @throws UsageError where the topic is not what the epoch began with: other partitions, or offsets that went back.
 */
export async function takeEpoch(
  etl: Sql,
  topic: string,
  database: string,
  where: () => Promise<PartitionState[]>,
): Promise<Epoch> {
  let epoch = await readEpoch(etl, topic);
  if (!epoch) {
    const begun = (await where()).map(({ partition }) => ({ partition, next: 0n }));
    await etl.begin(async (sql) => {
      const [created] = await sql`
        insert into etl.topics (topic, epoch, database) values (${topic}, 1, ${database}) on conflict do nothing returning epoch`;
      if (created) await writeOffsets(sql, topic, begun);
    });
    epoch = await readEpoch(etl, topic);
  }
  const known = await etl<{ partition: number; next: string }[]>`
    select partition, next_offset as next from etl.topic_offsets where topic = ${topic} order by partition`;
  // Kafka is asked after that: another consumer, of another partition, commits there first. Asked before, it could be behind.
  const partitions = await where();
  const remedy = `Its offsets no longer order the changes, and rows could lose to older ones. Nothing was inserted. Stop all consumers, then: make resnapshot (a new epoch, and the table from a fresh snapshot; README, "Rebuilding the table")`;
  if (known.length !== partitions.length)
    throw new UsageError(
      `topic ${topic} has ${partitions.length} partitions, and had ${known.length} when epoch ${epoch?.number} began. ${remedy}`,
    );
  for (const { partition, next } of known) {
    const { end = 0n, committed = -1n } = partitions.find((one) => one.partition === partition) ?? {};
    if (end < BigInt(next))
      throw new UsageError(
        `partition ${partition} of topic ${topic} ends at offset ${end}, and ${next} was reached before: the topic was made anew. ${remedy}`,
      );
    if (committed < 0n && BigInt(next) > 0n)
      throw new UsageError(
        `the group has no offset in partition ${partition} of topic ${topic}, and ${next} was reached before: the topic was made anew, or the group's offsets expired. ${remedy}`,
      );
  }
  return epoch as Epoch;
}

/**
 * Begins the next epoch, whose messages are those from each partition's end on, and whose rows belong into `database`.
 * @param partitions empty where the topic is not there yet.
 */
export async function beginEpoch(
  etl: Sql,
  topic: string,
  database: string,
  partitions: PartitionState[],
): Promise<Epoch> {
  const ends = partitions.map(({ partition, end }) => ({ partition, next: end }));
  return await etl.begin(async (sql) => {
    const [epoch] = await sql<Epoch[]>`
      insert into etl.topics as t (topic, epoch, database) values (${topic}, 1, ${database})
      on conflict (topic) do update set epoch = t.epoch + 1, database = excluded.database, started_at = now()
      returning epoch as number, database`;
    await sql`delete from etl.topic_offsets where topic = ${topic}`;
    await writeOffsets(sql, topic, ends);
    return epoch as Epoch;
  });
}

/** How far partitions are inserted. Never back: another consumer may be further by now. */
export async function writeOffsets(
  etl: Sql | TransactionSql,
  topic: string,
  offsets: { partition: number; next: bigint }[],
): Promise<void> {
  for (const { partition, next } of offsets)
    await etl`
      insert into etl.topic_offsets as o (topic, partition, next_offset) values (${topic}, ${partition}, ${String(next)})
      on conflict (topic, partition) do update set next_offset = greatest(o.next_offset, excluded.next_offset), updated_at = now()`;
}

/** The epoch's rows belong into the database that readers see, from now on. */
export async function settleEpoch(etl: Sql, topic: string, database: string): Promise<void> {
  await etl`update etl.topics set database = ${database} where topic = ${topic}`;
}
