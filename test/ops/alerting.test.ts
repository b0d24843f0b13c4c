// Faults that are really made, and the alerts that Prometheus shows for them: the real rules on the real Pushgateway and consumer,
// with time passing 600 times (the consumer: 60 times) as fast.
import assert from "node:assert/strict";
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { json } from "node:stream/consumers";
import { after, before, describe, test } from "node:test";
import { setTimeout as delay } from "node:timers/promises";
import { createProxy, steps } from "../lib/faults.ts";
import { type Prometheus, type Sample, scaleDurations, startPrometheus } from "../lib/prometheus.ts";
import { type Consumer, createSensors, type Sensors } from "../lib/sensors.ts";
import { startServer } from "../lib/servers.ts";
import { createShop, freePort, type Shop, until } from "../lib/shop.ts";
import { debianPackage, debianPath } from "../stack/debian.ts";
import { root } from "../stack/env.ts";
import { ensureInstalled, run } from "../stack/install.ts";
import { answers } from "../stack/process.ts";

const hostOf = (url: string | undefined): string => new URL(url ?? "").host;

describe("the cron pipelines", () => {
  let shop: Shop;
  let prometheus: Prometheus;
  before(async () => {
    shop = await createShop({ pushgateway: true });
    await shop.insertRows(1, 3);
    prometheus = await startPrometheus({ pushgateway: hostOf(shop.env.PUSHGATEWAY_URL) }, 600);
  });
  after(async () => {
    await prometheus?.[Symbol.asyncDispose]();
    await shop?.[Symbol.asyncDispose]();
  });

  test("every pipeline that never ran fires EtlNeverRan and EtlStale; its first success resolves its own, and only those", async () => {
    const expected = (): Promise<Sample[]> => prometheus.query("etl_expected_interval_seconds");
    await until("the intervals are there", async () => (await expected()).length > 0);
    const pipelines = (await expected()).map(({ metric }) => metric.pipeline ?? "");
    for (const pipeline of ["orders", "users", "events", "views"]) assert.ok(pipelines.includes(pipeline), pipeline);
    for (const pipeline of pipelines) {
      await prometheus.fires("EtlNeverRan", pipeline);
      assert.equal((await prometheus.fires("EtlStale", pipeline)).severity, "page");
    }
    for (const pipeline of ["orders", "users"]) {
      await shop.succeed(`scripts/${pipeline}.ts`);
      await prometheus.resolves("EtlNeverRan", pipeline);
      await prometheus.resolves("EtlStale", pipeline);
    }
    await prometheus.fires("EtlNeverRan", "events");
    await prometheus.fires("EtlStale", "events");
  });

  test("a pipeline whose runs stop fires EtlStale after two of its intervals, another one's stays quiet; the next success resolves it", async () => {
    await shop.succeed("scripts/users.ts");
    await shop.succeed(shop.script);
    await prometheus.resolves("EtlStale", "orders");
    await prometheus.fires("EtlStale", "orders");
    for (const alert of ["EtlStale", "EtlNeverRan"])
      assert.ok(!(await prometheus.firing(alert)).some(({ pipeline }) => pipeline === "users"), alert);
    assert.ok(!(await prometheus.firing("EtlNeverRan")).some(({ pipeline }) => pipeline === "orders"));
    await shop.succeed(shop.script);
    await prometheus.resolves("EtlStale", "orders");
  });

  test("a wiped Pushgateway fires EtlStale and EtlNeverRan; the next push resolves them", async () => {
    await shop.succeed("scripts/users.ts");
    await prometheus.resolves("EtlStale", "users");
    const group = `${shop.env.PUSHGATEWAY_URL}/metrics/job/etl/pipeline/users`;
    assert.ok((await fetch(group, { method: "DELETE" })).ok);
    // Two intervals of users have not passed: its state is gone, and that is what fires.
    await prometheus.fires("EtlStale", "users");
    await prometheus.fires("EtlNeverRan", "users");
    await shop.succeed("scripts/users.ts");
    await prometheus.resolves("EtlStale", "users");
    await prometheus.resolves("EtlNeverRan", "users");
  });

  test("a run that fails fires EtlFailed; the next success resolves it", async () => {
    await shop.succeed(shop.script);
    await prometheus.resolves("EtlFailed", "orders");
    await shop.admin`alter table orders rename status to other`;
    assert.equal((await shop.run(shop.script)).code, 2);
    assert.equal((await prometheus.fires("EtlFailed", "orders")).severity, "ticket");
    assert.ok(!(await prometheus.firing("EtlFailed")).some(({ pipeline }) => pipeline === "users"));
    await shop.admin`alter table orders rename other to status`;
    await shop.succeed(shop.script);
    await prometheus.resolves("EtlFailed", "orders");
  });

  test("a transaction that stays open fires EtlWatermarkHeld; its end and the next run resolve it", async () => {
    await shop.connect("late").begin(async (late) => {
      await late`update orders set status = 'late' where id = 1`;
      const fired = prometheus.fires("EtlWatermarkHeld", "orders").then(() => true);
      const running = async () => await shop.succeed(shop.script).then(() => false);
      while (!(await Promise.race([fired, running()])));
    });
    assert.ok(((await shop.metrics()).etl_watermark_hold_seconds ?? 0) > 1800 / 600);
    await shop.succeed(shop.script);
    await prometheus.resolves("EtlWatermarkHeld", "orders");
    assert.deepEqual(await shop.destinationRows(), await shop.sourceRows());
  });

  test("a push that the Pushgateway rejects fires EtlPushRejected; the next one that it takes resolves it", async () => {
    const other = `${shop.env.PUSHGATEWAY_URL}/metrics/job/another`;
    const push = { method: "POST", body: "# TYPE etl_rows counter\netl_rows 1\n" };
    // What the Pushgateway holds wins over what comes: so the pipeline's own metrics have to go first.
    assert.ok((await fetch(`${shop.env.PUSHGATEWAY_URL}/metrics/job/etl/pipeline/orders`, { method: "DELETE" })).ok);
    assert.ok((await fetch(`${shop.env.PUSHGATEWAY_URL}/metrics/job/etl/pipeline/users`, { method: "DELETE" })).ok);
    assert.ok((await fetch(other, push)).ok);
    assert.match((await shop.succeed(shop.script)).stderr, /step=warning warning="the metrics were not pushed/);
    await prometheus.fires("EtlPushRejected", "orders");
    assert.ok((await fetch(other, { method: "DELETE" })).ok);
    await shop.succeed(shop.script);
    await prometheus.resolves("EtlPushRejected", "orders");
  });

  test("a column that is not synced fires EtlUnknownSourceColumns; once it is gone, the next run resolves it", async () => {
    await shop.admin`alter table orders add column channel text`;
    await shop.succeed(shop.script);
    await prometheus.fires("EtlUnknownSourceColumns", "orders");
    await shop.admin`alter table orders drop column channel`;
    await shop.succeed(shop.script);
    await prometheus.resolves("EtlUnknownSourceColumns", "orders");
  });
});

describe("the consumer of sensors", () => {
  let sensors: Sensors;
  let prometheus: Prometheus;
  let consumer: Consumer;
  let METRICS_PORT: string;
  before(async () => {
    sensors = await createSensors({ connector: false });
    METRICS_PORT = String(await freePort());
    prometheus = await startPrometheus({ sensors: `127.0.0.1:${METRICS_PORT}` }, 60);
  });
  after(async () => {
    await prometheus?.[Symbol.asyncDispose]();
    await sensors?.[Symbol.asyncDispose]();
  });

  test("no consumer fires EtlSensorsDown; one that runs resolves it", async () => {
    await prometheus.fires("EtlSensorsDown");
    consumer = await sensors.consumer({ METRICS_PORT });
    await prometheus.resolves("EtlSensorsDown");
  });

  test("a dead letter fires EtlSensorsDeadLetters", async () => {
    await prometheus.resolves("EtlSensorsDeadLetters");
    await sensors.produce([{ key: "rubbish", value: "rubbish" }]);
    await prometheus.fires("EtlSensorsDeadLetters");
    assert.equal((await sensors.deadLetters()).length, 1);
    assert.equal((await consumer.metrics()).etl_sensors_dead_letters_total, 1);
  });

  test("a connector that is not there fires EtlSensorsConnectorFailed; make connector resolves it", async () => {
    await prometheus.fires("EtlSensorsConnectorFailed");
    await sensors.connector();
    await prometheus.resolves("EtlSensorsConnectorFailed");
  });

  test("messages that pile up while ClickHouse is away fire EtlSensorsLag; a consumer that catches up resolves it", async () => {
    consumer.child.kill("SIGTERM");
    await consumer.ended;
    await sensors.produce(Array.from({ length: 50_001 }, (_, n) => ({ key: String(n), value: null })));
    const CLICKHOUSE_URL = `http://127.0.0.1:${await freePort()}`;
    const waiting = sensors.shop.start("scripts/sensors.ts", { METRICS_PORT, CLICKHOUSE_URL });
    await prometheus.fires("EtlSensorsLag");
    waiting.child.kill("SIGTERM");
    await waiting.ended;
    consumer = await sensors.consumer({ METRICS_PORT });
    await prometheus.resolves("EtlSensorsLag");
  });
});

test("the alerts reach who is meant: a page the pager, a ticket the tickets, with the runbook's section, and their end too; the heartbeat goes on", async () => {
  const packaged = debianPackage("prometheus-alertmanager");
  await ensureInstalled(packaged);
  const example = readFileSync(join(root, "ops/alertmanager.yml"), "utf8");
  const amtool = debianPath("prometheus-alertmanager", "usr/bin/amtool");
  assert.match(await run(amtool, ["check-config", join(root, "ops/alertmanager.yml")]), /SUCCESS/);

  interface Message {
    status: string;
    alerts: { status: string; labels: Record<string, string>; annotations: Record<string, string> }[];
  }
  const received: { at: string; message: Message }[] = [];
  await using hooks = await createProxy("http://127.0.0.1");
  hooks.fault(steps.anything, async ({ request, response }) => {
    received.push({ at: request.url ?? "", message: (await json(request)) as Message });
    response.end();
  });
  /** The end of an alert is told only to whom its beginning was: the same pipeline's. */
  const told = (at: string, status: string, alertname: string, pipeline = "orders"): Promise<Message["alerts"][0]> =>
    until(
      `${at} is told that ${alertname} of ${pipeline} is ${status}`,
      () =>
        received
          .filter((one) => one.at === at)
          .flatMap(({ message }) => message.alerts)
          .find((alert) => alert.status === status && alert.labels.alertname === alertname && alert.labels.pipeline === pipeline),
      60,
    );

  const folder = mkdtempSync(join(tmpdir(), "etl-alertmanager-"));
  const local = example.replaceAll(/https:\/\/(\w+)\.example\.com\/etl/g, `${hooks.url}/$1`);
  assert.doesNotMatch(local, /example\.com\//);
  writeFileSync(join(folder, "alertmanager.yml"), scaleDurations(local, 60));
  const at = `127.0.0.1:${await freePort()}`;
  // Debian's build knows its templates by an absolute path only, below which nothing can be put without root.
  const [unpacked, program] = [debianPath("prometheus-alertmanager", "usr"), join(folder, "alertmanager")];
  const templates = "/usr/share/prometheus/alertmanager";
  const built = readFileSync(join(unpacked, "bin/prometheus-alertmanager"), "latin1");
  writeFileSync(program, built.replaceAll(templates, ".".padEnd(templates.length, "/")), {
    encoding: "latin1",
    mode: 0o755,
  });
  const where = [`--config.file=${join(folder, "alertmanager.yml")}`, `--storage.path=${join(folder, "data")}`];
  const args = ["-C", join(unpacked, "share/prometheus/alertmanager"), program, ...where, `--web.listen-address=${at}`];
  const alertmanager = { command: "env", args: [...args, "--cluster.listen-address="] };
  try {
    await using _alertmanager = await startServer("alertmanager", alertmanager, () => answers(`http://${at}/-/ready`));
    await using shop = await createShop({ pushgateway: true });
    await shop.insertRows(1, 3);
    await shop.admin`alter table orders rename status to other`;
    assert.equal((await shop.run(shop.script)).code, 2);
    const pushgateway = hostOf(shop.env.PUSHGATEWAY_URL);
    await using _ = await startPrometheus({ pushgateway, alertmanager: at }, 600);

    const page = await told("/pager", "firing", "EtlStale");
    assert.equal(page.annotations.runbook, "ops/runbook.md#etlstale");
    await told("/pager", "firing", "EtlNeverRan", "events");
    const ticket = await told("/tickets", "firing", "EtlFailed");
    assert.match(ticket.annotations.summary ?? "", /^the last run of orders failed$/);
    await shop.admin`alter table orders rename other to status`;
    // Again and again, as cron does: a success is stale after twelve seconds here, which may pass before anybody is told.
    const resolved = Promise.all([told("/tickets", "resolved", "EtlFailed"), told("/pager", "resolved", "EtlStale")]);
    let waiting = true;
    const over = resolved
      .catch(() => {})
      .finally(() => {
        waiting = false;
      });
    while (waiting) {
      await shop.succeed(shop.script);
      await Promise.race([over, delay(2000)]);
    }
    await resolved;
    const beats = () => received.filter((one) => one.at === "/heartbeat").length;
    const before = beats();
    await until("another heartbeat", () => beats() > before, 60);
    for (const { at, message } of received)
      for (const { labels } of message.alerts)
        assert.equal(at, { page: "/pager", ticket: "/tickets", none: "/heartbeat" }[labels.severity ?? ""]);
  } finally {
    rmSync(folder, { recursive: true, force: true });
  }
});
