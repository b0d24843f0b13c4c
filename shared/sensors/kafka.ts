/**
 * Kafka: a consumer group that reads one topic batch by batch and commits after the insert, and what is asked of the broker. kafkajs,
 * which is unmaintained, is used here only.
 */
import { addAbortListener } from "node:events";
import { setTimeout as delay } from "node:timers/promises";
import kafkajs, { type Admin, type Batch, type EachBatchPayload, type ITopicConfig, type Kafka } from "kafkajs";
import { UsageError } from "../env.ts";
import { log } from "../log.ts";
import { brokerConfig, isCertificate, type KafkaEnv, namedFault } from "./broker.ts";

export type { Admin, Batch, Kafka };

type TopicEnv = KafkaEnv & { SENSORS_TOPIC: string };

// kafkajs sets a timer of a negative time, which Node has warned of since version 24. Nothing comes of it.
const { emitWarning } = process;
process.emitWarning = ((warning: string | Error, ...rest: never[]) => {
  if ((rest[0] as unknown) !== "TimeoutNegativeWarning") emitWarning.call(process, warning, ...rest);
}) as typeof emitWarning;

/** @param application names the client in the broker's logs. */
export function connectKafka(env: KafkaEnv, application: string): Kafka {
  return new kafkajs.Kafka({
    ...(brokerConfig(env) as { brokers: string[] }), // its type of a login is one for each mechanism
    clientId: application,
    connectionTimeout: 5000,
    retry: { initialRetryTime: 200, maxRetryTime: 5000, retries: 7 }, // some 20 s
    logLevel: kafkajs.logLevel.WARN,
    // It logs rebalances and leader elections as errors; both are normal.
    logCreator: () => (entry) => {
      const { message, error } = entry.log;
      const normal = /rebalanc|ListOffsets.* not the leader|KafkaJSPartialMessage/i.test(`${message} ${error}`);
      if (!normal) log({ step: "kafka", message, error });
    },
  });
}

/** Runs `ask` with an admin client. @throws Error that names the brokers where none of them answers, UsageError without the topic. */
export async function withAdmin<T>(kafka: Kafka, env: TopicEnv, ask: (admin: Admin) => Promise<T>): Promise<T> {
  const admin = kafka.admin();
  try {
    await admin.connect();
    return await ask(admin);
  } catch (error) {
    throw explained(error as Error, env);
  } finally {
    await admin.disconnect();
  }
}

/** The offsets of each partition's first message, and after its last. */
export const topicOffsets = (admin: Admin, topic: string) => settled(() => admin.fetchTopicOffsets(topic));

/** By partition; negative where the group has none: -1, or -2 for kafkajs's "from the beginning" after an offset out of range. */
export async function committedOffsets(admin: Admin, topic: string, groupId: string): Promise<Map<number, bigint>> {
  const [group] = await settled(() => admin.fetchOffsets({ groupId, topics: [topic] }));
  return new Map(group?.partitions.map(({ partition, offset }) => [partition, BigInt(offset)]));
}

/**
 * Creates a topic, and waits until its leaders know that they lead it, a moment after the controller has made it: kafkajs's waitForLeaders
 * takes that moment for an error, and its producer sends again what some leaders took. @returns false where it exists already.
 */
export async function createTopic(admin: Admin, config: ITopicConfig): Promise<boolean> {
  const created = await admin.createTopics({ topics: [config], waitForLeaders: false });
  await settled(() => admin.fetchTopicOffsets(config.topic), /LEADER|UNKNOWN_TOPIC/);
  return created;
}

/** Asks again, for 20 s, a broker that does not know yet what it leads, or still loads a group (kafkajs does not: its pull request 1779). */
async function settled<T>(ask: () => Promise<T>, types = /LEADER|COORDINATOR|GROUP_LOAD_IN_PROGRESS/): Promise<T> {
  for (let tries = 0; ; tries++)
    try {
      return await ask();
    } catch (error) {
      if (tries === 40 || !types.test(typeOf(error as Error))) throw error;
      await delay(500);
    }
}

const typeOf = (error: Error): string => (error as { type?: string }).type ?? "";

/** The group is given out again, or no broker answers, or none coordinates the group for the moment. kafkajs wraps errors in others. */
function isTransient(error: Error): boolean {
  if (isCertificate(error)) return false;
  const lost = /KafkaJS(Connection|NumberOfRetries|BrokerNot|GroupCoordinatorNot|RequestTimeout)|Broker not connected/;
  const types = /REBALANCE_IN_PROGRESS|UNKNOWN_MEMBER_ID|ILLEGAL_GENERATION|COORDINATOR|GROUP_LOAD_IN_PROGRESS/;
  if (lost.test(`${error.name} ${error.message}`) || types.test(typeOf(error))) return true;
  return error.cause instanceof Error && isTransient(error.cause);
}

function explained(error: Error, env: TopicEnv): Error {
  if (/UNKNOWN_TOPIC/.test(typeOf(error)))
    return new UsageError(`Kafka has no topic ${env.SENSORS_TOPIC}. Run: make connector`);
  if (!isTransient(error)) return namedFault(error);
  const away = `no broker of KAFKA_BROKERS (${env.KAFKA_BROKERS}) answers: ${error.message}. For the local stack: make up`;
  return Object.assign(new Error(away), { name: error.name });
}

/** `join`: before a partition's first batch after the group gave it out, or where its offset is not the one that was committed here. */
interface Work {
  join(): Promise<void>;
  batch(batch: Batch, heartbeat: () => Promise<void>): Promise<void>;
  /** next: the partition's next offset. */
  commit(partition: number, next: bigint): Promise<void>;
  /** After each answer of the broker, an empty one too. */
  fetch(): Promise<void>;
}

const away =
  "Kafka (KAFKA_BROKERS) has not answered for 60 s. What was not committed is read again by the next start. Next: make doctor";

/**
 * Reads the topic as a member of the group, from the beginning where the group has no offset, until `signal` aborts: the batch under
 * way is then finished and committed. One batch of a partition at a time, as the broker filled it; an offset is committed after
 * `batch` has resolved. Where it throws, reading ends without a commit.
 * @throws what ended the reading, if that was an error: also Kafka's absence for a minute.
 */
export async function consume(
  kafka: Kafka,
  env: TopicEnv & { SENSORS_GROUP: string },
  signal: AbortSignal,
  work: Work,
): Promise<void> {
  const { SENSORS_TOPIC: topic, SENSORS_GROUP: groupId } = env;
  const [consumer, admin] = [createConsumer(kafka, groupId, () => !failure), kafka.admin()];
  const { promise: over, resolve: leave } = Promise.withResolvers<void>();
  let failure: Error | undefined;
  const fail = (error: Error): void => {
    failure ??= explained(error, env);
    leave();
  };
  using _leave = addAbortListener(signal, () => leave());
  const watch = setTimeout(() => fail(new Error(away)), 60_000);
  consumer.on("consumer.heartbeat", () => void watch.refresh());
  /** By partition: the offset that was committed here, since the group gave it out. */
  const reached = new Map<number, bigint>();
  consumer.on("consumer.group_join", ({ payload }) => {
    watch.refresh();
    reached.clear();
    const partitions = payload.memberAssignment[topic]?.join();
    log({ step: "assigned", topic, partitions: partitions || "none: there are more consumers than partitions" });
  });
  consumer.on("consumer.fetch", () => {
    watch.refresh();
    work.fetch().catch((error: Error) => isTransient(error) || fail(error));
  });
  const retryLater = (error: Error): unknown => (failure || !isTransient(error) ? fail(error) : delay(1000).then(read));
  // With restart kafkajs resumes by itself, after a pause. A group's coordinator that does not answer is final to it (its issue 1630).
  consumer.on("consumer.crash", ({ payload: { error, restart } }) => restart || retryLater(error));
  const eachBatch = async (payload: EachBatchPayload): Promise<void> => {
    if (signal.aborted || failure || !payload.isRunning() || payload.isStale()) return;
    const { partition } = payload.batch;
    const committed = async () => (await committedOffsets(admin, topic, groupId)).get(partition) ?? -1n;
    await moveBatch(payload, committed, reached, work).catch((error: Error) => {
      if (isTransient(error)) throw error; // the batch comes again, to whoever has the partition then
      if (!signal.aborted) fail(error);
    });
  };
  const read = async (): Promise<void> => {
    try {
      await Promise.all([consumer.connect(), admin.connect()]);
      await consumer.subscribe({ topics: [topic], fromBeginning: true });
      if (signal.aborted || failure) return;
      // Three at once: while one batch is inserted, another is made ready.
      const options = { autoCommit: false, eachBatchAutoResolve: false, partitionsConsumedConcurrently: 3 };
      await consumer.run({ ...options, eachBatch });
    } catch (error) {
      retryLater(error as Error);
    }
  };
  void read();
  await over;
  clearTimeout(watch);
  // Waits for the batch under way, but not for a broker that is away: the group then finds out by itself.
  const left = consumer.disconnect().then(() => admin.disconnect());
  await Promise.race([left, delay(9000, undefined, { ref: false })]);
  if (failure) throw failure;
}

const createConsumer = (kafka: Kafka, groupId: string, restartOnFailure: () => boolean) =>
  kafka.consumer({
    groupId,
    allowAutoTopicCreation: false,
    sessionTimeout: 15_000,
    rebalanceTimeout: 30_000,
    heartbeatInterval: 1000,
    // The broker gathers: it answers at 1 MB, or after a second with what there is. A batch is one insert.
    minBytes: 1_000_000,
    maxWaitTimeInMs: 1000,
    maxBytesPerPartition: 6_000_000,
    maxBytes: 18_000_000,
    metadataMaxAge: 30_000,
    retry: { restartOnFailure: async () => restartOnFailure() },
  });

async function moveBatch(
  { batch, heartbeat, commitOffsetsIfNecessary, resolveOffset }: EachBatchPayload,
  committedOffset: () => Promise<bigint>,
  reached: Map<number, bigint>,
  work: Work,
): Promise<void> {
  const { topic, partition } = batch;
  // Kafka deletes a group's offsets with their topic: without them this is another topic, which may be as long as the old one was.
  const committed = await committedOffset();
  if (committed !== reached.get(partition) || BigInt(batch.firstOffset() ?? 0) < committed) await work.join();
  await work.batch(batch, heartbeat);
  const next = BigInt(batch.lastOffset()) + 1n;
  // consumer.commitOffsets would silently do nothing once the consumer is being stopped.
  await commitOffsetsIfNecessary({ topics: [{ topic, partitions: [{ partition, offset: String(next) }] }] });
  reached.set(partition, next);
  resolveOffset(batch.lastOffset());
  await work.commit(partition, next);
}
