/**
 * The canary, which tells that the flow from the source has stopped or has lost something: public.etl_write_heartbeat() of
 * sql/replication.sql writes a row at the source every ten seconds, called by Debezium and by each consumer, so that neither has to live
 * for the other to be watched. Its changes come through the topic of the readings (schemas/debezium routes them there). Each carries the
 * row's previous state, which has to be the last that came. Where it is not, changes between the two never came.
 */
import type { Sql } from "postgres";
import { postgresUrl, required, UsageError } from "../env.ts";
import { openSession, queryFile } from "../session.ts";

export const canaryVariables = { REPLICATION_DATABASE_URL: required(postgresUrl) };

/** Writes the canary until the process ends. Where that fails, nothing comes, which is what is watched. */
export function startCanary(env: { REPLICATION_DATABASE_URL: string }): void {
  const source = openSession(env.REPLICATION_DATABASE_URL, { application: "etl:canary", timeoutSeconds: 5 });
  setInterval(() => source`select public.etl_write_heartbeat()`.catch(() => {}), 10_000);
}

interface Message {
  value: Buffer | null;
}
// Whatever holds these bytes is parsed: a row can have columns of these names.
const holds = ({ value }: Message, bytes: string): boolean => value?.includes(bytes) ?? false;
export const isCanary = (message: Message): boolean =>
  holds(message, '"table":"etl_heartbeat"') && sourceOf(message).table === "etl_heartbeat";
const isRead = (message: Message): boolean => holds(message, '"op":"r"') && sourceOf(message).op === "r";

/**
 * Compares the snapshot that messages belong to with the epoch's, which is its first; each message of one has the same WAL position.
 * Where a canary came before, the epoch has its position, negative: the snapshot that it came behind lies before it.
 * @throws UsageError for another one: rows that were deleted between the two would stay.
 */
export async function checkSnapshot(etl: Sql, topic: string, messages: Message[]): Promise<void> {
  for (const message of [messages.find(isRead), messages.findLast(isRead)]) {
    const { lsn, snapshot } = message ? sourceOf(message) : {};
    if (!lsn || snapshot === "incremental") continue;
    const [kept] = await etl`
      update etl.topics set snapshot_lsn = case when -snapshot_lsn < ${lsn} then snapshot_lsn else ${lsn} end
      where topic = ${topic} returning epoch, abs(snapshot_lsn) as first`;
    if (Number(kept?.first) !== lsn)
      throw new UsageError(
        `a second snapshot (WAL position ${lsn}, the first: ${kept?.first}) has begun in epoch ${kept?.epoch} of ${topic}: Debezium ` +
          "started again, and rows deleted meanwhile would stay. Stop all consumers, then run: make resnapshot",
      );
  }
}

function sourceOf({ value }: Message): { op?: string; table?: string; lsn?: number; snapshot?: string } {
  try {
    const { op, source } = JSON.parse(String(value));
    return { ...source, op };
  } catch {
    return {}; // a dead letter
  }
}

/** Records canaries in the order in which they came. One that comes again changes nothing. */
export async function recordCanaries(etl: Sql, topic: string, canaries: Message[]): Promise<void> {
  for (const { value } of canaries) await queryFile(etl, "canary", { "etl.topic": topic, "etl.canary": String(value) });
}

export interface CanaryState {
  /** Since the source wrote the last canary that came; since the epoch began, where none did. */
  age_seconds: number;
  /** What never came, in words; null where all did. */
  gap: string | null;
}
/** Undefined without an epoch. */
export async function readCanary(etl: Sql, topic: string): Promise<CanaryState | undefined> {
  const [state] = await etl<CanaryState[]>`
    select extract(epoch from now() - coalesce(canary_seen, started_at))::float8 as age_seconds, canary_gap as gap
    from etl.topics where topic = ${topic}`;
  return state;
}
