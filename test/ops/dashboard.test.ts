// ops/dashboard.json: Grafana's own JSON; every query in it has an answer in a Prometheus that scraped real runs and a real consumer.
import assert from "node:assert/strict";
import { mkdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { test } from "node:test";
import { watermarked } from "../../shared/pipelines.ts";
import { startPrometheus } from "../lib/prometheus.ts";
import { scratchCopy } from "../lib/scratch.ts";
import { createSensors } from "../lib/sensors.ts";
import { freePort, until } from "../lib/shop.ts";
import { root } from "../stack/env.ts";

interface Panel {
  id: number;
  title: string;
  type: string;
  gridPos: Record<"x" | "y" | "w" | "h", number>;
  repeat?: string;
  targets?: { expr: string }[];
}
const dashboard = JSON.parse(readFileSync(join(root, "ops/dashboard.json"), "utf8")) as { panels: Panel[] };
const queries = dashboard.panels.flatMap(({ title, targets = [] }) => targets.map(({ expr }) => ({ title, expr })));

test("the dashboard has a row for each pipeline, one for sensors and one for the models; its panels do not overlap", () => {
  const rows = dashboard.panels.filter(({ type }) => type === "row");
  assert.deepEqual(
    rows.map(({ title, repeat }) => [title, repeat]),
    [
      ["$pipeline", "pipeline"],
      ["sensors", undefined],
      ["models", undefined],
    ],
  );
  assert.equal(new Set(dashboard.panels.map(({ id }) => id)).size, dashboard.panels.length);
  const taken = new Map<string, string>();
  for (const { title, gridPos } of dashboard.panels) {
    for (let x = gridPos.x; x < gridPos.x + gridPos.w; x++)
      for (let y = gridPos.y; y < gridPos.y + gridPos.h; y++) {
        assert.ok(x < 24, title);
        assert.equal(taken.get(`${x},${y}`), undefined, `${title} lies on ${taken.get(`${x},${y}`)}`);
        taken.set(`${x},${y}`, title);
      }
  }
});

test("every query of the dashboard has an answer", async () => {
  using scratch = scratchCopy(["ops"]);
  mkdirSync(join(scratch.folder, "views/checks"), { recursive: true });
  writeFileSync(
    join(scratch.folder, "views/order_count.sql"),
    "CREATE OR REPLACE TABLE order_count\nAS\nSELECT COUNT(*) AS order_count FROM orders;\n",
  );
  for (const name of ["there", "right"])
    writeFileSync(
      join(scratch.folder, `views/checks/order_count__${name}.sql`),
      "SELECT order_count FROM order_count WHERE order_count < 1;\n",
    );
  await using sensors = await createSensors({ folder: scratch.folder, pushgateway: true });
  const { shop } = sensors;
  const METRICS_PORT = String(await freePort());
  await using prometheus = await startPrometheus(
    { pushgateway: new URL(shop.env.PUSHGATEWAY_URL ?? "").host, sensors: `127.0.0.1:${METRICS_PORT}` },
    1,
  );
  await shop.insertRows(1, 10);
  await Promise.all(watermarked().map((name) => shop.succeed(`scripts/${name}.ts`)));
  await Promise.all(["scripts/views.ts", "scripts/ops/verify.ts"].map((script) => shop.succeed(script, { PIPELINE: "orders" })));
  await sensors.consumer({ METRICS_PORT });
  await sensors.drained();

  const fill = (expr: string): string => expr.replaceAll("$pipeline", ".*").replaceAll("$__rate_interval", "1m");
  assert.ok(queries.length > 15);
  let id = 0;
  for (const { title, expr } of queries) {
    const answer = await until(
      `${title}: ${expr} has an answer`,
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
  rmSync(join(scratch.folder, "views"), { recursive: true, force: true });
});
