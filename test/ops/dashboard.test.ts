// ops/dashboard.json: each of its queries, and each metric of ops/alerts.yml, has an answer in a Prometheus that scraped real runs and a
// real consumer.
import assert from "node:assert/strict";
import { mkdirSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { test } from "node:test";
import { watermarked } from "../../shared/pipelines.ts";
import { read } from "../lib/documents.ts";
import { startPrometheus } from "../lib/prometheus.ts";
import { scratchCopy } from "../lib/scratch.ts";
import { createSensors } from "../lib/sensors.ts";
import { freePort, until } from "../lib/shop.ts";

interface Panel {
  title: string;
  type: string;
  repeat?: string;
  targets?: { expr: string }[];
}
const { panels } = JSON.parse(read("ops/dashboard.json")) as { panels: Panel[] };
const queries = panels.flatMap(({ targets = [] }) => targets.map(({ expr }) => expr));
const metrics = read("ops/alerts.yml").match(/(?<![\w:])(etl|push|process)_\w+(?![\w:])/g) ?? [];

test("the dashboard has a row for each pipeline, one for sensors and one for the models; every query of it, and every metric of an alert, has an answer", async () => {
  const rows = panels.filter(({ type }) => type === "row").map(({ title, repeat }) => [title, repeat]);
  assert.deepEqual(rows, [
    ["$pipeline", "pipeline"],
    ["sensors", undefined],
    ["models", undefined],
  ]);
  using scratch = scratchCopy();
  mkdirSync(join(scratch.folder, "views/checks"), { recursive: true });
  const model = "CREATE OR REPLACE TABLE order_count\nAS\nSELECT COUNT(*) AS order_count FROM orders;\n";
  writeFileSync(join(scratch.folder, "views/order_count.sql"), model);
  writeFileSync(join(scratch.folder, "views/checks/order_count__some.sql"), "SELECT order_count FROM order_count WHERE order_count < 1;\n");
  await using sensors = await createSensors({ folder: scratch.folder, pushgateway: true });
  const { shop } = sensors;
  const METRICS_PORT = String(await freePort());
  const pushgateway = new URL(shop.env.PUSHGATEWAY_URL ?? "").host;
  await using prometheus = await startPrometheus({ pushgateway, sensors: `127.0.0.1:${METRICS_PORT}` }, 1);
  await shop.insertRows(1, 10);
  await Promise.all(watermarked().map((name) => shop.succeed(`scripts/${name}.ts`)));
  assert.equal((await shop.run("scripts/users.ts", { BIGQUERY_DATASET: "nowhere" })).code, 2);
  await Promise.all(["scripts/views.ts", "scripts/ops/verify.ts"].map((script) => shop.succeed(script, { PIPELINE: "orders" })));
  await sensors.consumer({ METRICS_PORT });
  await sensors.drained();

  const fill = (expr: string): string => expr.replaceAll("$pipeline", ".*").replaceAll("$__rate_interval", "1m");
  assert.ok(queries.length > 15 && metrics.length > 15);
  let id = 0;
  for (const expr of new Set([...queries, ...metrics])) {
    const answer = await until(
      `${expr} has an answer`,
      async () => {
        // A rate needs a change between two scrapes: one insert alone may come before the first.
        await shop.admin`insert into sensor_readings (id, metric, value, recorded_at) values (${++id}, 'temp', 1, now())`;
        const samples = (await prometheus.query(fill(expr))).filter(({ value }) => !Number.isNaN(value));
        return samples.length ? samples : undefined;
      },
      90,
    );
    // One row for each pipeline that is expected: those that have what the query asks for.
    if (expr.startsWith("pipeline:etl_success_age"))
      assert.deepEqual(answer.map(({ metric }) => metric.pipeline).sort(), [...watermarked(), "views"].sort());
  }
});
