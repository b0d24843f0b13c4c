import { writeFileSync } from "node:fs";
import { openPage } from "./lib/browser.ts";
import { createShop } from "./lib/shop.ts";

await using shop = await createShop();
const sql = shop.admin;
await sql.unsafe(`
insert into etl.runs (run_id, pipeline, state, rows, bytes, error, host, pid, started_at, finished_at, by_hand, bytes_billed, hold_seconds)
select 'r' || i, 'orders', case when i in (20, 31) then 'failed' when i = 40 then 'running' else 'succeeded' end, (random()*50000)::int, 1000, case when i in (20,31) then 'the source differs from the contract, nothing was moved: <script>alert(1)</script>' || chr(10) || 'line 2 "x"' end, 'h', 1, now() - (60-i) * interval '1 hour', case when i <> 40 then now() - (60-i) * interval '1 hour' + interval '3.2 s' end, i = 33, 20971520*i, case when i = 50 then 5400 else 0 end from generate_series(1, 59) i;
insert into etl.runs (run_id, pipeline, state, rows, bytes, host, pid, started_at, finished_at) values ('v1','views','succeeded',1000,0,'h',1,now() - interval '7 days', now()- interval '7 days'), ('v2','views','failed',1000,0,'h',1,now() - interval '1 hour', now());
insert into etl.chunks (pipeline, chunk_from, chunk_to, state, rows, run_id, error) select 'events', d, d + interval '1 day', case when d = '2017-03-05' then 'failed' else 'succeeded' end, case when d = '2017-03-05' then 0 else 3000 + (random()*3000)::int end, 'x', case when d = '2017-03-05' then 'S3 answered 503' end from generate_series(timestamptz '2017-01-01', '2017-12-31', '1 day') d where d <> '2017-06-06';
insert into etl.models select 'v1', 'm' || i, i * 100, 4, 10485760, 1.2, null, now() - interval '7 days' from generate_series(1, 5) i;
insert into etl.models select 'v2', 'm' || i, i * 101, 4, 10485760, 1.2, case when i = 3 then 'views/m3.sql: it has 0 rows, and the published warehouse.m3 300. If that is right: make views ONLY=m3 ALLOW_SHRINK=1' end, now() from generate_series(1, 5) i;
insert into etl.verifications (pipeline, verified_at, rows, differences, found) values ('orders', now() - interval '2 days', 155870, 0, null), ('users', now() - interval '9 days', 2469, 2, '2 missing');
`);
const r = await shop.run("scripts/ops/report.ts", { OUT: "/tmp/vw_report.html" });
console.log(r.code, r.stderr);
await using page = await openPage("file:///tmp/vw_report.html");
console.log(page.heard, await page.evaluate("document.body.innerText"));
for (const [name, width, scheme] of [
  ["light", 1000, "light"],
  ["dark", 1000, "dark"],
  ["phone", 390, "light"],
] as const) {
  await page.send("Emulation.setDeviceMetricsOverride", {
    width,
    height: 800,
    deviceScaleFactor: 1,
    mobile: width < 500,
  });
  await page.send("Emulation.setEmulatedMedia", { features: [{ name: "prefers-color-scheme", value: scheme }] });
  console.log(name, await page.evaluate("[document.documentElement.scrollWidth, innerWidth].join()"));
  const { data } = await page.send("Page.captureScreenshot", { format: "png", captureBeyondViewport: true });
  writeFileSync(`/tmp/vw_${name}.png`, Buffer.from(data, "base64"));
}
