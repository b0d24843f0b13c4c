// From a real run to the pager: the real rules and receivers, a real Pushgateway, Prometheus and Alertmanager, with time passing 600
// (Alertmanager: 60) times as fast. What each rule does with its values: alerts.test.ts. That its metrics exist: dashboard.test.ts.
import assert from "node:assert/strict";
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { json } from "node:stream/consumers";
import { after, before, test } from "node:test";
import { setTimeout as delay } from "node:timers/promises";
import { createProxy, type HttpProxy, steps } from "../lib/faults.ts";
import { type Prometheus, scaleDurations, startPrometheus } from "../lib/prometheus.ts";
import { startServer } from "../lib/servers.ts";
import { createShop, freePort, type Shop, until } from "../lib/shop.ts";
import { debianPackage, debianPath } from "../stack/debian.ts";
import { root } from "../stack/env.ts";
import { ensureInstalled, run } from "../stack/install.ts";
import { answers } from "../stack/process.ts";

interface Alert {
  status: string;
  labels: Record<string, string>;
  annotations: Record<string, string>;
}
/** What the receivers have heard, and at which of their paths. */
const received: { at: string; alerts: Alert[] }[] = [];
const folder = mkdtempSync(join(tmpdir(), "etl-alertmanager-"));
let hooks: HttpProxy;
let alertmanager: AsyncDisposable;
let shop: Shop;
let prometheus: Prometheus;

/** ops/alertmanager.yml with `hooks` for its receivers, at this address. */
async function startAlertmanager(at: string): Promise<AsyncDisposable> {
  await ensureInstalled(debianPackage("prometheus-alertmanager"));
  const example = join(root, "ops/alertmanager.yml");
  const amtool = debianPath("prometheus-alertmanager", "usr/bin/amtool");
  assert.match(await run(amtool, ["check-config", example]), /SUCCESS/);
  const local = readFileSync(example, "utf8").replaceAll(/https:\/\/(\w+)\.example\.com\/etl/g, `${hooks.url}/$1`);
  assert.doesNotMatch(local, /example\.com\//);
  writeFileSync(join(folder, "alertmanager.yml"), scaleDurations(local, 60));
  // Debian's build knows its templates by an absolute path only, below which nothing can be put without root.
  const [unpacked, program] = [debianPath("prometheus-alertmanager", "usr"), join(folder, "alertmanager")];
  const templates = "/usr/share/prometheus/alertmanager";
  const built = readFileSync(join(unpacked, "bin/prometheus-alertmanager"), "latin1");
  writeFileSync(program, built.replaceAll(templates, ".".padEnd(templates.length, "/")), { encoding: "latin1", mode: 0o755 });
  const files = [`--config.file=${join(folder, "alertmanager.yml")}`, `--storage.path=${join(folder, "data")}`];
  const args = ["-C", join(unpacked, "share/prometheus/alertmanager"), program, ...files, `--web.listen-address=${at}`];
  const command = { command: "env", args: [...args, "--cluster.listen-address="] };
  return await startServer("alertmanager", command, () => answers(`http://${at}/-/ready`));
}

before(async () => {
  hooks = await createProxy("http://127.0.0.1");
  hooks.fault(steps.anything, async ({ request, response }) => {
    const { alerts } = (await json(request)) as { alerts: Alert[] };
    received.push({ at: request.url ?? "", alerts });
    response.end();
  });
  const at = `127.0.0.1:${await freePort()}`;
  alertmanager = await startAlertmanager(at);
  shop = await createShop({ pushgateway: true });
  await shop.insertRows(1, 3);
  prometheus = await startPrometheus({ pushgateway: new URL(shop.env.PUSHGATEWAY_URL ?? "").host, alertmanager: at }, 600);
});
after(async () => {
  await prometheus?.[Symbol.asyncDispose]();
  await shop?.[Symbol.asyncDispose]();
  await alertmanager?.[Symbol.asyncDispose]();
  await hooks?.[Symbol.asyncDispose]();
  rmSync(folder, { recursive: true, force: true });
});

/** Waits until a receiver is told of this, after the first `since` of all messages. */
const told = (at: string, status: string, alertname: string, pipeline: string, since = 0): Promise<Alert> =>
  until(`${at} is told that ${alertname} of ${pipeline} is ${status}`, () =>
    received
      .slice(since)
      .filter((one) => one.at === at)
      .flatMap(({ alerts }) => alerts)
      .find(({ status: is, labels }) => is === status && labels.alertname === alertname && labels.pipeline === pipeline),
  );

test("every pipeline that never ran fires EtlNeverRan and EtlStale; its first success resolves its own, and only those", async () => {
  for (const pipeline of ["orders", "users", "events", "views"])
    for (const alert of ["EtlNeverRan", "EtlStale"]) assert.equal((await prometheus.fires(alert, pipeline)).severity, "page");
  for (const pipeline of ["orders", "users"]) {
    await shop.succeed(`scripts/${pipeline}.ts`);
    await prometheus.resolves("EtlNeverRan", pipeline);
    await prometheus.resolves("EtlStale", pipeline);
  }
  for (const alert of ["EtlNeverRan", "EtlStale"]) await prometheus.fires(alert, "events");
  await told("/pager", "firing", "EtlNeverRan", "events");
});

test("a pipeline whose runs stop, and one that fails: a page and a ticket to who is meant, with the runbook's section, and their end too; another one's stays quiet", async () => {
  await shop.succeed("scripts/users.ts");
  await shop.succeed(shop.script);
  await prometheus.resolves("EtlStale", "orders");
  const since = received.length;
  await shop.admin`alter table orders rename status to other`;
  assert.equal((await shop.run(shop.script)).code, 2);
  const ticket = await told("/tickets", "firing", "EtlFailed", "orders", since);
  assert.match(ticket.annotations.summary ?? "", /^the last run of orders failed$/);
  const page = await told("/pager", "firing", "EtlStale", "orders", since);
  assert.equal(page.annotations.runbook, "ops/runbook.md#etlstale");
  for (const alert of ["EtlStale", "EtlNeverRan", "EtlFailed"])
    assert.ok(!(await prometheus.firing(alert)).some(({ pipeline }) => pipeline === "users"), alert);
  await shop.admin`alter table orders rename other to status`;
  // Again and again, as cron does: a success is stale after twelve seconds here, which may pass before anybody is told.
  let waiting = true;
  const resolved = Promise.all([
    told("/tickets", "resolved", "EtlFailed", "orders", since),
    told("/pager", "resolved", "EtlStale", "orders", since),
  ]).finally(() => {
    waiting = false;
  });
  resolved.catch(() => {}); // awaited below
  while (waiting) {
    await shop.succeed(shop.script);
    await Promise.race([resolved.catch(() => {}), delay(2000)]);
  }
  await resolved;
});

test("the heartbeat goes on, and each alert has come to its severity's receiver only", async () => {
  const beats = (): number => received.filter(({ at }) => at === "/heartbeat").length;
  const before = beats();
  await until("another heartbeat", () => beats() > before);
  for (const { at, alerts } of received)
    for (const { labels } of alerts) assert.equal(at, { page: "/pager", ticket: "/tickets", none: "/heartbeat" }[labels.severity ?? ""]);
});
