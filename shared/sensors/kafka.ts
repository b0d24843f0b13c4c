/**
 * Kafka: a consumer group that reads one topic batch by batch and commits after the insert, and what is asked of the broker. kafkajs,
 * which is unmaintained, is used here only.
 */
import { addAbortListener } from "node:events";
import { setTimeout as delay } from "node:timers/promises";
import type { Admin, Batch, Consumer, EachBatchPayload, ITopicConfig, Kafka } from "kafkajs";
import { UsageError } from "../env.ts";
import { log } from "../log.ts";
import { brokerConfig, type KafkaEnv } from "./broker.ts";
import kafkajs from "./kafkajs.ts";

export type { Admin, Kafka };
export const { ConfigResourceTypes } = kafkajs;

type TopicEnv = KafkaEnv & { SENSORS_TOPIC: string };
type GroupEnv = TopicEnv & { SENSORS_GROUP: string };

type Logged = { log: { message: string; error?: string } };
/** It logs rebalances and leader elections as errors; both are normal. */
const normal = /rebalanc|ListOffsets.* not the leader|KafkaJSPartialMessage/i;
const logEntry = ({ log: { message, error } }: Logged) => normal.test(`${message} ${error}`) || log({ step: "kafka", message, error });

export function connectKafka(env: KafkaEnv, application: string): Kafka {
  return new kafkajs.Kafka({
    ...(brokerConfig(env) as { brokers: string[] }), // its type of a login is one for each mechanism
    clientId: application, // in the broker's logs
    connectionTimeout: 5000,
    retry: { initialRetryTime: 200, maxRetryTime: 5000, retries: 7 }, // some 20 s
    logLevel: kafkajs.logLevel.WARN,
    logCreator: () => logEntry,
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

/** The offsets of each partition's first message that is left, and after its last. */
export const topicOffsets = (admin: Admin, topic: string) => settled(() => admin.fetchTopicOffsets(topic));

/** By partition; negative where the group has none: -1, or -2, which kafkajs commits in place of an offset that is out of range. */
export async function committedOffsets(admin: Admin, topic: string, groupId: string): Promise<Map<number, bigint>> {
  const [group] = await settled(() => admin.fetchOffsets({ groupId, topics: [topic] }));
  return new Map(group?.partitions.map(({ partition, offset }) => [partition, BigInt(offset)]));
}

/**
 * Creates a topic, and waits until its leaders know that they lead it, a moment later: kafkajs's waitForLeaders takes that moment for an
 * error, and its producer sends again what some leaders took. @returns false where it exists already.
 */
export async function createTopic(admin: Admin, config: ITopicConfig): Promise<boolean> {
  const created = await admin.createTopics({ topics: [config], waitForLeaders: false });
  await settled(() => admin.fetchTopicOffsets(config.topic), /LEADER|UNKNOWN_TOPIC/);
  return created;
}

/** Asks again, for 20 s, a broker that does not know yet what it leads or still loads a group (not in kafkajs: its pull request 1779). */
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
  const { name, message, cause } = error;
  if (message.includes("certificate")) return false;
  const lost = /KafkaJS(Connection|NumberOfRetries|BrokerNot|NoBroker|GroupCoordinatorNot|RequestTimeout)|Broker not connected/;
  const moved = /REBALANCE_IN_PROGRESS|UNKNOWN_MEMBER_ID|ILLEGAL_GENERATION|COORDINATOR|GROUP_LOAD_IN_PROGRESS/;
  return lost.test(`${name} ${message}`) || moved.test(typeOf(error)) || (cause instanceof Error && isTransient(cause));
}

/** An error that a variable or a missing topic causes names it; any other stays as it is. */
function explained(error: Error, env: TopicEnv): Error {
  const { name, message } = error;
  if (/UNKNOWN_TOPIC/.test(typeOf(error))) return new UsageError(`Kafka has no topic ${env.SENSORS_TOPIC}. Run: make connector`);
  const login = "Check KAFKA_SASL_MECHANISM, KAFKA_USERNAME and KAFKA_PASSWORD";
  if (name.includes("SASL")) return new Error(`KAFKA_BROKERS refused the login: ${message}. ${login}`);
  const trust = "Use a host name that the certificate holds; name the file of your own authority in NODE_EXTRA_CA_CERTS";
  if (message.includes("certificate")) return new Error(`cannot connect to KAFKA_BROKERS with KAFKA_TLS: ${message}. ${trust}`);
  if (!isTransient(error)) return error;
  const away = `no broker of KAFKA_BROKERS (${env.KAFKA_BROKERS}) answers: ${message}. For the local stack: make up`;
  return Object.assign(new Error(away), { name });
}

type Messages = Pick<Batch, "partition" | "messages" | "firstOffset" | "lastOffset">;

interface Work {
  /** Before a partition's first batch after the group gave it out, or where a batch does not begin at the offset committed here. */
  join(): Promise<void>;
  /** One without messages is what a transaction leaves. */
  batch(batch: Messages): Promise<void>;
  /** Every second, as long as this is a member of the group. */
  tick(): Promise<void>;
}

const away = "Kafka (KAFKA_BROKERS) has not answered for 60 s. The next start resumes at what was committed. Next: make doctor";

/**
 * Reads the topic as a member of the group, from the beginning where the group has no offset, until `signal` aborts: the batch under
 * way is then finished and committed. One batch of a partition at a time, as the broker filled it; an offset is committed after
 * `batch` has resolved. Where it throws, reading ends without a commit.
 * @throws what ended the reading, if that was an error: also Kafka's absence for a minute.
 */
export async function consume(kafka: Kafka, env: GroupEnv, signal: AbortSignal, work: Work): Promise<void> {
  const [consumer, admin] = [kafka.consumer({ groupId: env.SENSORS_GROUP, ...settings }), kafka.admin()];
  const { promise: over, resolve, reject } = Promise.withResolvers<void>();
  let leaving = false;
  /** The first call counts: what fails while this leaves is not an error any more. */
  const leave = (error?: Error): void => {
    leaving = true;
    error ? reject(explained(error, env)) : resolve();
  };
  using _leave = addAbortListener(signal, () => leave());
  const watch = setTimeout(() => leave(new Error(away)), 60_000);
  consumer.on("consumer.heartbeat", () => {
    watch.refresh();
    work.tick().catch((error: Error) => isTransient(error) || leave(error));
  });
  consumer.on("consumer.group_join", ({ payload: { memberAssignment } }) => {
    watch.refresh();
    const [topic, partitions] = [env.SENSORS_TOPIC, memberAssignment[env.SENSORS_TOPIC]?.join()];
    log({ step: "assigned", topic, partitions: partitions || "none: there are more consumers than partitions" });
  });
  const eachBatch = createMover(consumer, admin, env, work, leave);
  const read = async (): Promise<void> => {
    await Promise.all([consumer.connect(), admin.connect()]);
    await consumer.subscribe({ topics: [env.SENSORS_TOPIC], fromBeginning: true });
    if (leaving) return;
    const partitionsConsumedConcurrently = 3; // while one batch is inserted, another is made ready
    await consumer.run({ autoCommit: false, eachBatchAutoResolve: false, partitionsConsumedConcurrently, eachBatch });
  };
  // By itself kafkajs would resume while this leaves, and not where a group's coordinator does not answer (its issue 1630).
  const again = (error: Error): unknown => (leaving || !isTransient(error) ? leave(error) : delay(1000).then(read).catch(again));
  consumer.on("consumer.crash", ({ payload: { error } }) => again(error));
  read().catch(again);
  await over.finally(async () => {
    clearTimeout(watch);
    // Waits for the batch under way, but not for a server that is away: the group then finds out by itself.
    const left = consumer.disconnect().then(() => admin.disconnect());
    await Promise.race([left, delay(9000, undefined, { ref: false })]);
  });
}

const settings = {
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
  retry: { restartOnFailure: async () => false },
};

/** What kafkajs calls with each batch. @param fail gets what is to end the reading. */
function createMover(consumer: Consumer, admin: Admin, env: GroupEnv, work: Work, fail: (error: Error) => void) {
  const { SENSORS_TOPIC: topic, SENSORS_GROUP: groupId } = env;
  /** By partition: the offset that was committed here, since the group gave it out. */
  const reached = new Map<number, bigint>();
  consumer.on("consumer.group_join", () => reached.clear());

  const move = async (batch: Messages, commit: (offset: string) => Promise<void>, heartbeat = async () => {}): Promise<void> => {
    const [partition, first] = [batch.partition, batch.firstOffset() ?? "0"];
    // Kafka deletes a group's offsets with their topic: without them this is another topic, which may be as long as the old one was.
    const committed = (await committedOffsets(admin, topic, groupId)).get(partition) ?? -1n;
    if (committed !== reached.get(partition) || committed !== BigInt(first)) await work.join();
    if (committed < 0n) await commit(first); // so that from the first insert on there is one
    const heartbeats = setInterval(() => heartbeat().catch(() => {}), 1000); // where the group has gone on, the commit fails
    await work.batch(batch).finally(() => clearInterval(heartbeats));
    const next = BigInt(batch.lastOffset()) + 1n;
    await commit(String(next));
    reached.set(partition, next);
  };

  // What is left of an aborted transaction, and the end of each, comes as no batch: its offset is passed and committed all the same.
  let passed = Promise.resolve();
  consumer.on("consumer.end_batch_process", ({ payload: { batchSize, partition, firstOffset, lastOffset } }) => {
    if (batchSize) return;
    const empty = { partition, messages: [], firstOffset: () => firstOffset, lastOffset: () => lastOffset };
    const commit = (offset: string) => consumer.commitOffsets([{ topic, partition, offset }]);
    passed = passed.then(() => move(empty, commit)).catch((error: Error) => void (isTransient(error) || fail(error)));
  });

  return async ({ batch, heartbeat, commitOffsetsIfNecessary, resolveOffset, isRunning, isStale }: EachBatchPayload): Promise<void> => {
    await passed;
    if (!isRunning() || isStale()) return;
    // consumer.commitOffsets would silently do nothing once the consumer is being stopped.
    const commit = (offset: string) =>
      commitOffsetsIfNecessary({ topics: [{ topic, partitions: [{ partition: batch.partition, offset }] }] });
    try {
      await move(batch, commit, heartbeat);
      resolveOffset(batch.lastOffset());
    } catch (error) {
      if (isTransient(error as Error)) throw error; // the batch comes again, to whoever has the partition then
      fail(error as Error);
    }
  };
}
