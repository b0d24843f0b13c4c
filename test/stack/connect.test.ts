// Postgres to Kafka through Debezium, as the local stack runs them: what is written to a table is in its topic.
import assert from "node:assert/strict";
import { after, before, test } from "node:test";
import { setTimeout as sleep } from "node:timers/promises";
import { Kafka, logLevel } from "kafkajs";
import postgres from "postgres";
import { endpoint, localEnv } from "./env.ts";
import { kcat } from "./kcat.ts";

const env = localEnv();
const name = `stack_${process.pid}`;
const topic = `${name}.public.readings`;
const url = new URL(env.STACK_ADMIN_DATABASE_URL ?? "");
const root = postgres(url.href, { max: 1, onnotice: () => {} });
const sql = postgres(url.href, { database: name, max: 1, onnotice: () => {} });

async function connect(method: string, path: string, body?: object): Promise<Response> {
  const headers = { "content-type": "application/json" };
  const init = body ? { method, headers, body: JSON.stringify(body) } : { method };
  const answer = await fetch(new URL(path, env.CONNECT_URL), init);
  assert.ok(answer.ok, `${method} ${path}: ${answer.status} ${answer.ok || (await answer.text())}`);
  return answer;
}

type Envelope = { op: string; after: { id: number; value: unknown } | null };

/** The topic's messages, once there are `count`. */
async function messages(count: number): Promise<(Envelope | null)[]> {
  for (const deadline = Date.now() + 30_000; ; await sleep(100)) {
    // %s of a tombstone is empty; -e ends it at the end of the topic.
    const out = await kcat(env, "-C", "-e", "-t", topic, "-o", "beginning", "-f", "%s\n").catch(() => "");
    const found = out.split("\n").slice(0, -1);
    if (found.length >= count || Date.now() > deadline) return found.map((line) => (line ? JSON.parse(line) : null));
  }
}

before(async () => {
  await root.unsafe(`create database ${name}`);
  await sql`create table readings (id bigint primary key, value double precision, padding text)`;
  await sql`insert into readings values (1, 1.5)`;
  await sql`create publication readings for table readings`;
});

after(async () => {
  await connect("DELETE", `/connectors/${name}`);
  await sql.end();
  // The server holds the slot until the stopped task's connection has ended.
  for (let tries = 0; tries < 100; tries++) {
    const [slot] = await root`select active from pg_replication_slots where slot_name = ${name}`;
    if (slot?.active === false) await root`select pg_drop_replication_slot(${name})`;
    if (!slot) break;
    await sleep(100);
  }
  await root.unsafe(`drop database ${name}`);
  await root.end();
  const kafka = new Kafka({ brokers: [env.KAFKA_BROKERS ?? ""], logLevel: logLevel.NOTHING });
  const admin = kafka.admin();
  await admin.connect();
  await admin.deleteTopics({ topics: [topic] });
  await admin.disconnect();
});

test("rows that were there, changes, and a row of 5 MB arrive in order", async () => {
  const { host, port } = endpoint(url.href);
  await connect("PUT", `/connectors/${name}/config`, {
    "connector.class": "io.debezium.connector.postgresql.PostgresConnector",
    "database.hostname": host,
    "database.port": port,
    "database.user": decodeURIComponent(url.username),
    "database.password": decodeURIComponent(url.password),
    "database.dbname": name,
    "topic.prefix": name,
    "table.include.list": "public.readings",
    "plugin.name": "pgoutput",
    "publication.name": "readings",
    "publication.autocreate.mode": "disabled",
    "slot.name": name,
    "topic.creation.default.partitions": 1,
    "topic.creation.default.replication.factor": 1,
  });
  assert.deepEqual(
    (await messages(1)).map((message) => [message?.op, message?.after?.id]),
    [["r", 1]],
  );
  await sql`insert into readings values (2, 'NaN')`;
  await sql`update readings set value = 3 where id = 1`;
  await sql`delete from readings where id = 2`;
  await sql`insert into readings values (3, 0, repeat('x', 5000000))`;
  assert.deepEqual(
    (await messages(6)).map((message) => message && [message.op, message.after?.id ?? null, message.after?.value ?? null]),
    [
      ["r", 1, 1.5],
      ["c", 2, "NaN"],
      ["u", 1, 3],
      ["d", null, null],
      null, // the tombstone of what was deleted
      ["c", 3, 0],
    ],
  );
});

test("a topic that nobody created is an error, not a new topic", async () => {
  await assert.rejects(kcat(env, "-C", "-e", "-t", `${name}.no_such_topic`), /Unknown topic/);
});
