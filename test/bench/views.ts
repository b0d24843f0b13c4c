/**
 * make bench: what the weekly models cost, against the same twelve statements one after another by curl, without copies of the raw
 * tables, dry runs, checks and publishing. ROWS= (default all, 155,848) orders of the real data, RUNS= (default 3) of each,
 * interleaved. Absolute times are this machine's.
 */
import { pipelines } from "../../shared/pipelines.ts";
import { readModels } from "../../shared/views/models.ts";
import { loadData } from "../data/load.ts";
import { createShop } from "../lib/shop.ts";
import { compare, measure, script } from "./measure.ts";

const rows = Number(process.env.ROWS ?? 155_848);
await using shop = await createShop();
await loadData(shop.env.STACK_ADMIN_DATABASE_URL ?? "", { only: ["orders", "users"], maxRows: rows });
for (const pipeline of ["orders", "users"]) await shop.succeed(`scripts/${pipeline}.ts`);

const defaultDataset = { projectId: shop.env.BIGQUERY_PROJECT, datasetId: shop.dataset };
const bodies = readModels(pipelines()).map(({ sql }) =>
  JSON.stringify({ query: sql, useLegacySql: false, timeoutMs: 600_000, defaultDataset }),
);
const url = `${shop.env.BIGQUERY_ENDPOINT}/bigquery/v2/projects/${shop.env.BIGQUERY_PROJECT}/queries`;
const floor = `for body in "$@"; do curl -sSf -o /dev/null ${url} -H 'content-type: application/json' -d "$body" || exit; done`;
const env = { ...shop.env, ALLOW_SHRINK: "1" }; // few orders are few weeks, for which some models have no row
await compare("views", rows, [
  { by: "the twelve statements by curl", run: () => measure({ command: "bash", args: ["-c", floor, "bash", ...bodies] }) },
  { by: "ours", run: () => measure(script("scripts/views.ts", env)) },
]);
