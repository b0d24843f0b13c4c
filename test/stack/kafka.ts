// Kafka: one broker that is its own controller (KRaft). The jars of this part and of connect.ts are those of kafka/pom.xml.
import { createHash, randomBytes } from "node:crypto";
import {
  accessSync,
  constants,
  existsSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  realpathSync,
  renameSync,
  rmSync,
  writeFileSync,
} from "node:fs";
import { connect } from "node:net";
import { homedir } from "node:os";
import { join } from "node:path";
import { type Env, endpoint } from "./env.ts";
import { type Install, run } from "./install.ts";
import { type Command, checkPort } from "./process.ts";
import { digest, type Part, stackPath } from "./stack.ts";

const pom = join(import.meta.dirname, "kafka/pom.xml");
/**
 * SHA-256 of all jars: of a line "SUM  NAME" for each, by name. Maven itself checks only what the same repository says. After a change of
 * the pom `make up` fails with the new one, and leaves the jars in .stack/kafka/libs.new.
 */
const jars = "62cf5a040781081ad4af0fdfe9b3e81b07c96d7ca2ec30ae79102672ebc5dad2";
const libs = stackPath("kafka", "libs");
const archives = stackPath("kafka", "archives");
const needsJava = "Install Java 17 or later (Debian: openjdk-17-jre-headless)";
const needsMaven = "Install Maven 3.8 or later (Debian: maven)";

const sha256 = (content: string | Buffer): string => createHash("sha256").update(content).digest("hex");

function verifyJars(folder: string): void {
  const names = readdirSync(folder).sort();
  const found = sha256(names.map((name) => `${sha256(readFileSync(join(folder, name)))}  ${name}`).join("\n"));
  if (found !== jars) throw new Error(`kafka: the jars in ${folder} are not those that ${import.meta.filename} names, but ${found}`);
}

/** Maven's folder of downloads: the user's own, or one in .stack/ where that cannot be written. */
function repository(): string[] {
  try {
    const folder = join(homedir(), ".m2");
    accessSync(existsSync(folder) ? folder : homedir(), constants.W_OK);
    return [];
  } catch {
    return [`-Dmaven.repo.local=${stackPath("kafka", "m2")}`];
  }
}

export const kafkaInstall: Install = {
  name: "kafka",
  definition: () => readFileSync(pom, "utf8") + jars,
  run: async () => {
    const version = await run("java", ["--version"], { needs: needsJava });
    if (Number(version.match(/^\S+ (\d+)/)?.[1]) < 17) throw new Error(`java: ${version.split("\n")[0]}. ${needsJava}`);
    // Under another name until they are verified.
    const fresh = `${libs}.new`;
    rmSync(fresh, { recursive: true, force: true });
    const copy = [
      "org.apache.maven.plugins:maven-dependency-plugin:3.8.1:copy-dependencies",
      "-DincludeScope=runtime",
      `-DoutputDirectory=${fresh}`,
    ];
    // Settings and mirrors are the user's own. Strict: a jar that is not what its repository says ends it.
    await run("mvn", ["-B", "-q", "--strict-checksums", ...repository(), "-f", pom, ...copy], { needs: needsMaven });
    verifyJars(fresh);
    rmSync(libs, { recursive: true, force: true });
    rmSync(archives, { recursive: true, force: true });
    renameSync(fresh, libs);
  },
};

/** As the text of a .properties file. */
export const properties = (settings: Record<string, string | number>): string =>
  Object.entries(settings)
    .map(([name, value]) => `${name}=${String(value).replaceAll("\\", "\\\\")}\n`)
    .join("");

/**
 * A start takes half as long with the classes in an archive. The first program that is stopped writes it; where it was killed meanwhile,
 * or has other jars or another Java, Java starts without. The file of options is there because arguments that change restart a part.
 */
function classArchive(main: string): string {
  mkdirSync(archives, { recursive: true });
  const [archive = "", options = ""] = ["jsa", "options"].map((ending) => join(realpathSync(archives), `${main}.${ending}`));
  writeFileSync(options, `-XX:${existsSync(archive) ? "SharedArchiveFile" : "ArchiveClassesAtExit"}="${archive}"\n`);
  return `-XX:VMOptionsFile=${options}`;
}

/** A Java program of these jars. `settings` is the text of the file among `args`: a change of it restarts the program. */
export const java = (main: string, args: string[], settings: string, options: string[] = []): Command => ({
  command: "java",
  args: [
    classArchive(main),
    // Its default is a quarter of the machine's memory, and as many threads for garbage as there are processors; and to compile what it
    // runs for hours takes a quarter of the processor time of what runs for minutes.
    ...["-Xmx512m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-XX:-UsePerfData", `-Dsettings=${digest(settings)}`],
    ...["-Dorg.slf4j.simpleLogger.defaultLogLevel=warn", "-Dorg.slf4j.simpleLogger.showDateTime=true"],
    "-Dorg.slf4j.simpleLogger.dateTimeFormat=yyyy-MM-dd'T'HH:mm:ss.SSS'Z'",
    ...[...options, "-cp", `${realpathSync(libs)}/*`, main, ...args],
  ],
  grace: 30,
});

/** The broker's controller listens at the port after the broker's. */
const controller = (env: Env): string => {
  const { host, port } = endpoint(env.KAFKA_BROKERS ?? "");
  return `${host}:${port + 1}`;
};

/** @param env KAFKA_ADVERTISED, where it is set, is where the broker tells its clients to go: a proxy before it. */
function settings(env: Env, data: string): string {
  const { host, port } = endpoint(env.KAFKA_BROKERS ?? "");
  return properties({
    "process.roles": "broker,controller",
    "node.id": 1,
    listeners: `PLAINTEXT://${host}:${port},CONTROLLER://${controller(env)}`,
    "advertised.listeners": `PLAINTEXT://${env.KAFKA_ADVERTISED ?? `${host}:${port}`}`,
    "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT",
    "controller.listener.names": "CONTROLLER",
    "controller.quorum.voters": `1@${controller(env)}`,
    "log.dirs": data,
    // A mistyped topic is an error, not a new topic.
    "auto.create.topics.enable": "false",
    // For messages of 5 MB; Kafka's own limit is 1 MB.
    "message.max.bytes": 10_485_760,
    "replica.fetch.max.bytes": 10_485_760,
    // Nothing vanishes by its age: a test may write old timestamps.
    "log.retention.ms": -1,
    "group.initial.rebalance.delay.ms": 0,
    // After a SIGKILL the broker is let in again only when the session of its former life has ended (the default is 9 s).
    "broker.session.timeout.ms": 2000,
    "broker.heartbeat.interval.ms": 500,
    "metadata.max.idle.interval.ms": 0, // no record twice a second that says that there is none
    // And it reads again what was not yet flushed: small segments, flushed as they fill, keep that short.
    "log.segment.bytes": 67_108_864,
    "log.flush.offset.checkpoint.interval.ms": 5000,
    "log.cleaner.dedupe.buffer.size": 8_388_608, // 128 MB otherwise
    // Its own topics are for three brokers, and in 50 partitions, by default.
    "offsets.topic.replication.factor": 1,
    "offsets.topic.num.partitions": 1,
    "transaction.state.log.replication.factor": 1,
    "transaction.state.log.min.isr": 1,
    "transaction.state.log.num.partitions": 1,
  });
}

const filesOf = (folder: string) => ({ data: join(folder, "data"), file: join(folder, "server.properties") });

/** Under another name until it is whole: a formatting that was killed is done again. */
async function format(env: Env, folder: string): Promise<void> {
  const { data, file } = filesOf(folder);
  if (existsSync(data)) return;
  const fresh = `${data}.new`;
  rmSync(fresh, { recursive: true, force: true });
  mkdirSync(fresh);
  const text = settings(env, fresh);
  writeFileSync(file, text);
  // Kafka's ids are 16 bytes in base64url that do not begin with a dash.
  const id = Buffer.concat([Buffer.of(1), randomBytes(15)]).toString("base64url");
  const { command, args } = java("kafka.tools.StorageTool", ["format", "-t", id, "-c", file], text);
  await run(command, args, { needs: needsJava });
  renameSync(fresh, data);
}

/** Asks for the metadata of no topic (version 1 of Kafka's Metadata request): the answer begins with the brokers. */
async function knownBrokers(env: Env): Promise<number> {
  const { host, port } = endpoint(env.KAFKA_BROKERS ?? "");
  const socket = connect(port, host).setTimeout(5_000, () => socket.destroy(new Error("no answer in 5 s")));
  socket.write(Buffer.from("0000000e0003000100000000ffff00000000", "hex"));
  let answer = Buffer.alloc(0);
  for await (const data of socket) {
    answer = Buffer.concat([answer, data]);
    if (answer.length >= 12) return answer.readInt32BE(8); // after length and correlation id
  }
  throw new Error("the broker hung up");
}

export const kafka: Part = {
  name: "kafka",
  variable: "KAFKA_BROKERS",
  installs: [kafkaInstall],
  prepare: async (env, folder) => {
    const { data, file } = filesOf(folder);
    await checkPort("kafka's controller", controller(env), "Stop that process, or set another port in KAFKA_BROKERS");
    await format(env, folder);
    writeFileSync(file, settings(env, data));
  },
  command: (env, folder) => {
    const { data, file } = filesOf(folder);
    return java("kafka.Kafka", [file], settings(env, data));
  },
  // It listens before its controller has let it in.
  ready: async (env) => {
    if ((await knownBrokers(env)) === 0) throw new Error("the controller has not let the broker in yet");
  },
};
