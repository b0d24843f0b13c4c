/**
 * The epoch of a topic: the high bits of every version that its messages write. Kafka's offsets order the changes only while
 * the topic and its partitions stay what they were; what comes in a new epoch wins over all that came before.
 */
import type { Sql, TransactionSql } from "postgres";
import { UsageError } from "../env.ts";
import { queryFile } from "../session.ts";
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
 * @param where asks Kafka for the partitions' ends and the group's offsets. @param table the UUID of sensor_readings, where it is known.
 * @throws UsageError where the epoch's rows belong to another database or table, or the topic is not what the epoch began with: other
 * partitions, offsets that went back, or messages that expired unread.
 */
export async function takeEpoch(etl: Sql, topic: string, database: string, where: Where, table = ""): Promise<number> {
  const before = await etl`select partition, next_offset as next from etl.topic_offsets where topic = ${topic}`;
  const partitions = await where();
  const first = partitions.map(({ partition }) => ({ partition, next: 0n }));
  if (!(await readEpoch(etl, topic))) await beginEpoch(etl, topic, 0, database, first);
  const epoch = (await readEpoch(etl, topic, database)) as Epoch;
  const json = (value: unknown) => JSON.stringify(value, (_, part) => (typeof part === "bigint" ? String(part) : part));
  const settings = { "etl.topic": topic, "etl.readings": table, "etl.before": json(before), "etl.partitions": json(partitions) };
  const [faulty] = await queryFile<{ fault: string }>(etl, "epoch_faults", settings);
  if (!faulty) return epoch.number;
  throw new UsageError(
    `${faulty.fault}. Nothing was inserted: rows could be missing, or lose to older ones. Stop all consumers, then run: make ` +
      `resnapshot (a new epoch, and the table from a fresh snapshot; scripts/README.md, "Rebuilding the table")`,
  );
}

/** How far a partition is inserted. Never back: another consumer may have reached more by now. */
export async function writeOffset(etl: Sql | TransactionSql, topic: string, partition: number, next: bigint): Promise<void> {
  await etl`
    insert into etl.topic_offsets as o (topic, partition, next_offset) values (${topic}, ${partition}, ${String(next)})
    on conflict (topic, partition) do update set next_offset = greatest(o.next_offset, excluded.next_offset), updated_at = now()`;
}
