/**
 * The epoch of a topic: the high bits of every version that its messages write. Kafka's offsets order the changes only while
 * the topic and its partitions stay what they were; what comes in a new epoch wins over all that came before.
 */
import type { Sql, TransactionSql } from "postgres";
import { UsageError } from "../env.ts";
import { type Admin, committedOffsets, topicOffsets } from "./kafka.ts";

export interface PartitionState {
  partition: number;
  /** The offset of the first message that is left, and the one after the last. */
  low: bigint;
  end: bigint;
  /** The group's; negative where it has none. */
  committed: bigint;
  /** Messages that the group has not committed, with those that expired unread. */
  lag: number;
}

/** Where a topic and a group's reading of it are, by partition. */
export async function topicState(admin: Admin, topic: string, groupId: string): Promise<PartitionState[]> {
  const [ends, offsets] = await Promise.all([topicOffsets(admin, topic), committedOffsets(admin, topic, groupId)]);
  const states = ends.map(({ partition, high, low }) => {
    const state = { partition, low: BigInt(low), end: BigInt(high), committed: offsets.get(partition) ?? -1n };
    return { ...state, lag: Math.max(0, Number(state.end - (state.committed < 0n ? state.low : state.committed))) };
  });
  return states.sort((a, b) => a.partition - b.partition);
}

export interface Epoch {
  number: number;
  /** Where in ClickHouse its rows belong. */
  database: string;
}

/** The topic's epoch, or undefined where no consumer has begun one. @throws UsageError where its rows do not belong to `database`. */
export async function readEpoch(etl: Sql, topic: string, database?: string): Promise<Epoch | undefined> {
  const [epoch] = await etl<Epoch[]>`select epoch as number, database from etl.topics where topic = ${topic}`;
  if (epoch && database && epoch.database !== database)
    throw new UsageError(
      `epoch ${epoch.number} of ${topic} belongs to database ${epoch.database}, not ${database}: the table is ` +
        `being rebuilt there. Next: make swap-readings`,
    );
  return epoch;
}

type Start = { partition: number; next: bigint };
type Where = () => Promise<PartitionState[]>;

/**
 * Begins the epoch after that one: its messages are those from `from` on, and its rows belong to `database`.
 * @returns false where somebody else has begun one meanwhile.
 */
export async function beginEpoch(etl: Sql, topic: string, after: number, database: string, from: Start[]): Promise<boolean> {
  return await etl.begin(async (sql) => {
    const begun = await sql`
      insert into etl.topics as t (topic, epoch, database) values (${topic}, ${after + 1}, ${database})
      on conflict (topic) do update set epoch = excluded.epoch, database = excluded.database, started_at = now(),
        canary_at = null, canary_seen = null, canary_gap = null, snapshot_lsn = null, readings = null
      where t.epoch = ${after}`;
    if (!begun.count) return false;
    await sql`delete from etl.topic_offsets where topic = ${topic}`;
    for (const { partition, next } of from) await writeOffset(sql, topic, partition, next);
    await sql`update etl.topic_offsets set began = next_offset where topic = ${topic}`;
    return true;
  });
}

/**
 * The number of the topic's epoch; its first one where there is none yet.
 * @param where asks Kafka for the partitions' ends and the group's offsets. @param table the UUID of sensor_readings.
 * @throws UsageError where the epoch's rows belong to another database or table, or the topic is not what the epoch began with: other
 * partitions, offsets that went back, or messages that expired unread.
 */
export async function takeEpoch(etl: Sql, topic: string, database: string, where: Where, table?: string): Promise<number> {
  const began = async () => (await where()).map(({ partition }) => ({ partition, next: 0n }));
  if (!(await readEpoch(etl, topic))) await beginEpoch(etl, topic, 0, database, await began());
  const epoch = (await readEpoch(etl, topic, database)) as Epoch;
  // Both change meanwhile: the topic must reach as far as what was inserted before it was asked, the group no further than after.
  const before = await inserted(etl, topic);
  const partitions = await where();
  const after = await inserted(etl, topic);
  const others = `topic ${topic} has ${partitions.length} partitions, and had ${before.size} when epoch ${epoch.number} began`;
  const faults = partitions.map((one) => faultOf(topic, one, before.get(one.partition), after.get(one.partition)?.next ?? 0n));
  const [filled] =
    await etl`update etl.topics set readings = coalesce(readings, ${table ?? null}) where topic = ${topic} returning readings`;
  const lacks = `ClickHouse's sensor_readings was made again, and lacks what epoch ${epoch.number} of ${topic} had inserted`;
  const fault = table && filled?.readings !== table ? lacks : before.size === partitions.length ? faults.find(Boolean) : others;
  if (fault)
    throw new UsageError(
      `${fault}. Nothing was inserted: rows could be missing, or lose to older ones. Stop all consumers, then run: ` +
        `make resnapshot (a new epoch, and the table from a fresh snapshot; scripts/README.md, "Rebuilding the table")`,
    );
  return epoch.number;
}

async function inserted(etl: Sql, topic: string) {
  const known = await etl<{ partition: number; next: string; began: string }[]>`
    select partition, next_offset as next, coalesce(began, 0) as began from etl.topic_offsets where topic = ${topic}`;
  return new Map(known.map(({ partition, next, began }) => [partition, { next: BigInt(next), began: BigInt(began) }]));
}

/** Why a partition that was inserted up to `next`, and by now up to `latest`, cannot be read on. */
function faultOf(topic: string, state: PartitionState, { next, began } = { next: 0n, began: 0n }, latest: bigint): string | undefined {
  const { partition, low, end, committed } = state;
  const [of, was] = [`partition ${partition} of topic ${topic}`, "was inserted up to offset"];
  if (end < next) return `${of} ends at offset ${end}, but ${was} ${next}: the topic was created again`;
  if (low > next) return `${of} begins at offset ${low}, but ${was} ${next}: messages expired unread (retention.ms)`;
  if (committed < 0n && next > 0n)
    return `${of} ${was} ${next}, but the group has none: the topic was created again, or the group's offset expired`;
  if (committed > latest) return `${of} ${was} ${latest}, but the group's offset is ${committed}: somebody set it ahead`;
  if (committed >= 0n && committed < began)
    return `${of} has this epoch from ${began} on, but the group's offset is ${committed}: somebody set it back`;
  return undefined;
}

/** How far a partition is inserted. Never back: another consumer may have reached more by now. */
export async function writeOffset(etl: Sql | TransactionSql, topic: string, partition: number, next: bigint): Promise<void> {
  await etl`
    insert into etl.topic_offsets as o (topic, partition, next_offset) values (${topic}, ${partition}, ${String(next)})
    on conflict (topic, partition) do update set next_offset = greatest(o.next_offset, excluded.next_offset), updated_at = now()`;
}
