/**
 * Kafka: a consumer group that reads one topic batch by batch and commits after the insert, and what is asked of the broker.
 * kafkajs is used here only.
 */
import { addAbortListener } from "node:events";
import { setTimeout as delay } from "node:timers/promises";
import kafkajs, { type Admin, type Batch, type ITopicConfig, type Kafka, type SASLOptions } from "kafkajs";
import { type Env, flag, like, name, optional, required, secret, text, UsageError } from "../env.ts";
import { log } from "../log.ts";

export type { Batch, Kafka };

// kafkajs sets a timer of a negative time, which Node has warned of since version 24. Nothing comes of it.
const { emitWarning } = process;
process.emitWarning = ((warning: string | Error, ...rest: never[]) => {
  if ((rest[0] as unknown) !== "TimeoutNegativeWarning") emitWarning.call(process, warning, ...rest);
}) as typeof emitWarning;

function brokers(value: string): string[] {
  const list = value.split(",").map((broker) => broker.trim());
  if (!list.every((broker) => /^([\w.-]+|\[[\da-fA-F:]+\]):\d+$/.test(broker)))
    throw new Error("must be host:port, with commas between several");
  return list;
}

const brokerVariables = {
  KAFKA_BROKERS: required(brokers),
  KAFKA_TLS: optional(flag, false),
  KAFKA_SASL_MECHANISM: optional(
    like(/^(plain|scram-sha-(256|512))$/, "must be plain, scram-sha-256 or scram-sha-512"),
  ),
  KAFKA_USERNAME: optional(text),
  KAFKA_PASSWORD: optional(secret),
};
/** What is needed to reach a broker. */
export type KafkaEnv = Env<typeof brokerVariables>;

export const kafkaVariables = {
  ...brokerVariables,
  SENSORS_TOPIC: required(like(/^[\w-]+(\.[\w-]+)+$/, "must look like PREFIX.SCHEMA.TABLE")),
  SENSORS_GROUP: required(name),
};

/** @param application names the client in the broker's logs. */
export function connectKafka(env: KafkaEnv, application: string): Kafka {
  const { KAFKA_SASL_MECHANISM: mechanism, KAFKA_USERNAME: username, KAFKA_PASSWORD: password } = env;
  if (mechanism && !(username && password))
    throw new UsageError(`KAFKA_SASL_MECHANISM ${mechanism} needs KAFKA_USERNAME and KAFKA_PASSWORD.`);
  return new kafkajs.Kafka({
    clientId: application,
    brokers: env.KAFKA_BROKERS,
    ssl: env.KAFKA_TLS,
    ...(mechanism ? { sasl: { mechanism, username, password } as SASLOptions } : {}),
    connectionTimeout: 5000,
    // Some 20 s of attempts; what to do after them is the caller's.
    retry: { initialRetryTime: 200, maxRetryTime: 5000, retries: 7 },
    logLevel: kafkajs.logLevel.WARN,
    logCreator: () => logKafka,
  });
}

/** Rebalances are the group's daily life, and a topic's leaders take a moment: kafkajs calls both errors. */
function logKafka({ log: { message, error } }: { log: { message: string; error?: string } }): void {
  if (/rebalanc|ListOffsets.* not the leader/i.test(`${message} ${error}`) || /KafkaJSPartialMessage/.test(message))
    return;
  log({ step: "kafka", message, error });
}

/** Whether the error is about the server's certificate (https://nodejs.org/api/tls.html#x509-certificate-error-codes). */
const isCertificate = ({ code, cause }: { code?: string; cause?: unknown }): boolean =>
  /^(CERT_|ERR_TLS_CERT|UNABLE_TO_|SELF_SIGNED|DEPTH_ZERO|HOSTNAME_MISMATCH|INVALID_(CA|PURPOSE)|PATH_LENGTH)/.test(
    code ?? "",
  ) ||
  (cause instanceof Error && isCertificate(cause));

/** A certificate or a login that is refused names its variable; waiting and asking again would not mend it. */
function refusedByBroker(error: unknown): unknown {
  const { name, message } = error as Error;
  if (isCertificate(error as Error))
    return new Error(
      `cannot connect to KAFKA_BROKERS with KAFKA_TLS: ${message}. Use a host name that the certificate holds; name the file of your own authority in NODE_EXTRA_CA_CERTS.`,
    );
  if (!/SASL/.test(name)) return error;
  return new Error(
    `KAFKA_BROKERS refused the login: ${message}. Check KAFKA_SASL_MECHANISM, KAFKA_USERNAME and KAFKA_PASSWORD`,
  );
}

/** Runs `ask` with an admin client. @throws Error that names the brokers where none of them answers. */
export async function withAdmin<T>(kafka: Kafka, env: KafkaEnv, ask: (admin: Admin) => Promise<T>): Promise<T> {
  const admin = kafka.admin();
  try {
    await admin.connect();
    return await ask(admin);
  } catch (error) {
    const { name, message } = error as Error;
    if (!isConnectionError(error)) throw refusedByBroker(error);
    const away = `no broker of KAFKA_BROKERS (${env.KAFKA_BROKERS}) answers: ${message}. For the local stack: make up`;
    throw Object.assign(new Error(away), { name });
  } finally {
    await admin.disconnect();
  }
}

export interface PartitionState {
  partition: number;
  /** The offset after the last message, and the group's committed one; -1 where it has none. */
  end: bigint;
  committed: bigint;
  /** Messages that the group has not committed yet. */
  lag: number;
}

/**
 * Where a topic and a group's reading of it are, by partition.
 * @throws UsageError where there is no such topic.
 */
export async function topicState(admin: Admin, topic: string, groupId: string): Promise<PartitionState[]> {
  try {
    const [ends, offsets] = await Promise.all([
      settled(() => admin.fetchTopicOffsets(topic)),
      committedOffsets(admin, topic, groupId),
    ]);
    return ends
      .map(({ partition, high, low }) => {
        const end = BigInt(high);
        const committed = offsets.get(partition) ?? -1n;
        const from = committed > BigInt(low) ? committed : BigInt(low);
        return { partition, end, committed, lag: end > from ? Number(end - from) : 0 };
      })
      .sort((a, b) => a.partition - b.partition);
  } catch (error) {
    throw withoutTopic(error) ? noTopic(topic) : error;
  }
}

/** By partition; negative where the group has none. */
async function committedOffsets(admin: Admin, topic: string, groupId: string): Promise<Map<number, bigint>> {
  const [group] = await settled(() => admin.fetchOffsets({ groupId, topics: [topic] }));
  return new Map(group?.partitions.map(({ partition, offset }) => [partition, BigInt(offset)]));
}

/**
 * Asks again, for 20 s, while a broker that has just come back does not know that it leads a partition, or still loads the group it
 * coordinates. kafkajs does not (its pull request 1779).
 */
async function settled<T>(ask: () => Promise<T>): Promise<T> {
  for (let tries = 0; ; tries++) {
    try {
      return await ask();
    } catch (error) {
      if (tries === 40 || !(lacksCoordinator(error) || lacksLeader(error))) throw error;
      await delay(500);
    }
  }
}

const typeOf = (error: unknown): string => (error as { type?: string }).type ?? "";
/** The group has no coordinator for the moment: it is found, changes, or loads what it has to know. */
const lacksCoordinator = (error: unknown): boolean => /COORDINATOR|GROUP_LOAD_IN_PROGRESS/.test(typeOf(error));
const lacksLeader = (error: unknown): boolean => /LEADER/.test(typeOf(error));

const withoutTopic = (error: unknown): boolean => typeOf(error) === "UNKNOWN_TOPIC_OR_PARTITION";
const noTopic = (topic: string): UsageError => new UsageError(`Kafka has no topic ${topic}. Run: make connector`);

/**
 * Creates a topic, and waits until the broker that is asked knows its leaders, and they know it. They learn of it a moment after the
 * controller has made it; kafkajs's own waitForLeaders takes that moment for an error, and its producer sends what some leaders took again.
 * @returns false where it is there already.
 * @throws Error where nobody leads it after 30 s.
 */
export async function createTopic(admin: Admin, config: ITopicConfig): Promise<boolean> {
  const { topic } = config;
  const created = await admin.createTopics({ topics: [config], waitForLeaders: false });
  for (const deadline = performance.now() + 30_000; ; await delay(100)) {
    try {
      const [found] = (await admin.fetchTopicMetadata({ topics: [topic] })).topics;
      if (found?.partitions.length && found.partitions.every(({ leader }) => leader >= 0)) {
        await admin.fetchTopicOffsets(topic); // a leader that does not know yet that it is one refuses this
        return created;
      }
    } catch (error) {
      if (!withoutTopic(error) && !lacksLeader(error)) throw error;
    }
    if (performance.now() > deadline) throw new Error(`no broker leads the partitions of topic ${topic} after 30 s`);
  }
}

/** @throws UsageError while the group has members, which a change of its offsets would not reach. */
export async function checkGroupIsEmpty(admin: Admin, groupId: string): Promise<void> {
  for (let tries = 0; ; tries++) {
    const { groups } = await admin.describeGroups([groupId]);
    const members = groups[0]?.members ?? [];
    if (!members.length) return;
    const who = members.map(({ clientId, clientHost }) => `${clientId} at ${clientHost}`).join(", ");
    // kafkajs sets offsets as a member for a moment: a resnapshot that was killed then is one for the 30 s of its session.
    if (tries === 80 || !members.some(({ clientId }) => clientId === "etl-resnapshot"))
      throw new UsageError(
        `the group ${groupId} has ${members.length} consumers (${who}). Stop them first (systemctl stop etl-sensors)`,
      );
    await delay(500);
  }
}

/**
 * Reads the topic as a member of the group, from the beginning where the group has no offset, until `signal` aborts: the batch
 * that is under way is then finished and committed. One batch of a partition at a time, as the broker filled it; an offset is committed after
 * `batch` has resolved. A lost connection to the broker is waited out; where `batch` throws, reading ends without a commit.
 * join is awaited before the first batch after the group gave out its partitions; commit gets a partition's next offset;
 * fetch is called after each answer of the broker, an empty one too.
 * @throws what ended the reading, if that was an error.
 */
export async function consume(
  kafka: Kafka,
  { topic, groupId, signal }: { topic: string; groupId: string; signal: AbortSignal },
  on: {
    join: () => Promise<void>;
    batch: (batch: Batch, beat: () => Promise<void>) => Promise<void>;
    commit: (partition: number, next: bigint) => Promise<void>;
    fetch: () => Promise<void>;
  },
): Promise<void> {
  const consumer = kafka.consumer({
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
    retry: { initialRetryTime: 200, maxRetryTime: 5000, retries: 7, restartOnFailure: async () => !failure },
  });
  let failure: Error | undefined;
  let joined: Promise<void> | undefined;
  const reached = new Map<number, bigint>();
  const { promise: over, resolve: leave } = Promise.withResolvers<void>();
  const fail = (error: Error): void => {
    failure ??= withoutTopic(error) ? noTopic(topic) : error;
    leave();
  };
  using _leave = addAbortListener(signal, () => leave());
  consumer.on("consumer.group_join", ({ payload }) => {
    joined = undefined;
    reached.clear();
    const partitions = payload.memberAssignment[topic]?.join();
    log({ step: "assigned", topic, partitions: partitions || "none: there are more consumers than partitions" });
  });
  consumer.on("consumer.fetch", () => {
    on.fetch().catch((error: Error) => isConnectionError(error) || fail(error));
  });
  // With restart: kafkajs goes on by itself, after a pause. A group's coordinator that does not answer is final to it (its issue 1630).
  consumer.on("consumer.crash", ({ payload: { error, restart } }) => {
    if (restart) return;
    if (failure || !isConnectionError(error)) fail(failure ?? error);
    else delay(1000).then(read).catch(fail);
  });

  // Kafka deletes a group's offsets together with their topic: one that has none any more reads a topic that was made anew, which
  // may already be as long as the old one was.
  const admin = kafka.admin();
  const forgotten = async (partition: number): Promise<boolean> => {
    const offset = (await committedOffsets(admin, topic, groupId)).get(partition) ?? -1n;
    return offset < 0n; // -1: none; -2: kafkajs's "from the beginning", where the old offset was out of range
  };

  /** Joins the group and begins to read; a broker that is away is waited for. */
  const read = async (): Promise<void> => {
    for (; !signal.aborted; await delay(1000, undefined, { signal }).catch(() => {}))
      try {
        const ready = Promise.all([consumer.connect(), admin.connect()]);
        const subscribed = ready.then(() => consumer.subscribe({ topics: [topic], fromBeginning: true }));
        await Promise.race([subscribed, over]); // kafkajs tries for longer than whoever stops this waits
        break;
      } catch (error) {
        if (withoutTopic(error)) throw noTopic(topic);
        if (!isConnectionError(error)) throw refusedByBroker(error);
        log({ step: "waiting", for: "Kafka", error: (error as Error).message });
      }
    if (signal.aborted || failure) return;
    await consumer.run({
      autoCommit: false,
      partitionsConsumedConcurrently: 3, // while one batch is inserted, another is made ready
      eachBatchAutoResolve: false,
      eachBatch: async ({ batch, heartbeat, isRunning, isStale, resolveOffset, commitOffsetsIfNecessary }) => {
        if (signal.aborted || failure || !isRunning() || isStale()) return;
        try {
          const behind = BigInt(batch.firstOffset() ?? 0) < (reached.get(batch.partition) ?? 0n);
          if (behind || (await forgotten(batch.partition))) joined = undefined;
          joined ??= on.join();
          await joined;
          await on.batch(batch, heartbeat);
        } catch (error) {
          // The group was given out anew, or this process is to stop: the batch comes again, to whoever has the partition then.
          if (isGroupError(error)) throw error;
          if (!signal.aborted) fail(error as Error);
          return;
        }
        const next = BigInt(batch.lastOffset()) + 1n;
        // consumer.commitOffsets would silently do nothing once the consumer is being stopped.
        await commitOffsetsIfNecessary({
          topics: [{ topic, partitions: [{ partition: batch.partition, offset: String(next) }] }],
        });
        reached.set(batch.partition, next);
        resolveOffset(batch.lastOffset());
        await on.commit(batch.partition, next);
      },
    });
  };
  await read();
  await over;
  // Waits for the batch that is under way, but not for a broker that is away: the group then finds out by itself.
  const left = consumer.disconnect().then(() => admin.disconnect());
  await Promise.race([left, delay(9000, undefined, { ref: false })]);
  if (failure) throw failure;
}

/** kafkajs wraps errors in others. */
function isConnectionError(error: unknown): boolean {
  const { name, cause } = error as Error;
  const lost =
    /KafkaJSConnection|KafkaJSNumberOfRetriesExceeded|KafkaJSBrokerNotFound|KafkaJSGroupCoordinatorNotFound|KafkaJSRequestTimeout/;
  if (isCertificate(error as Error)) return false;
  return lost.test(name) || (cause instanceof Error && isConnectionError(cause));
}

const isGroupError = (error: unknown): boolean =>
  /REBALANCE_IN_PROGRESS|UNKNOWN_MEMBER_ID|ILLEGAL_GENERATION/.test(typeOf(error)) ||
  lacksCoordinator(error) ||
  isConnectionError(error);
