/**
 * The epoch of a topic: the high bits of every version that its messages write. Kafka's offsets order the changes only while
 * the topic and its partitions stay what they were; what comes in a new epoch wins over all that came before.
 */
import type { Sql, TransactionSql } from "postgres";
import { UsageError } from "../env.ts";
import { type Admin, committedOffsets, topicOffsets } from "./kafka.ts";

export interface PartitionState {
  partition: number;
  /** The offset after the last message, and the group's committed one; -1 where it has none. */
  end: bigint;
  committed: bigint;
  /** Messages that the group has not committed yet. */
  lag: number;
}

/** Where a topic and a group's reading of it are, by partition. */
export async function topicState(admin: Admin, topic: string, groupId: string): Promise<PartitionState[]> {
  const [ends, offsets] = await Promise.all([topicOffsets(admin, topic), committedOffsets(admin, topic, groupId)]);
  const states = ends.map(({ partition, high, low }) => {
    const [end, committed] = [BigInt(high), offsets.get(partition) ?? -1n];
    const from = committed > BigInt(low) ? committed : BigInt(low);
    return { partition, end, committed, lag: end > from ? Number(end - from) : 0 };
  });
  return states.sort((a, b) => a.partition - b.partition);
}

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
  const remedy =
    "Its offsets no longer order the changes, and rows could lose to older ones. Nothing was inserted. Stop all " +
    `consumers, then: make resnapshot (a new epoch, and the table from a fresh snapshot; README, "Rebuilding the ` +
    `table")`;
  if (known.length !== partitions.length)
    throw new UsageError(
      `topic ${topic} has ${partitions.length} partitions, and had ${known.length} when epoch ${epoch?.number} began. ${remedy}`,
    );
  for (const { partition, next } of known) {
    const { end = 0n, committed = -1n } = partitions.find((one) => one.partition === partition) ?? {};
    if (end < BigInt(next))
      throw new UsageError(
        `partition ${partition} of topic ${topic} ends at offset ${end}, and ${next} was reached before: the ` +
          `topic was created again. ${remedy}`,
      );
    if (committed < 0n && BigInt(next) > 0n)
      throw new UsageError(
        `the group has no offset in partition ${partition} of topic ${topic}, and ${next} was reached before: the ` +
          `topic was created again, or the group's offsets expired. ${remedy}`,
      );
  }
  return epoch as Epoch;
}

/** How far partitions are inserted. Never back: another consumer may have reached more by now. */
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
