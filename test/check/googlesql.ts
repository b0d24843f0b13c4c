/**
 * make check: every BigQuery statement that the project issues, parsed and type-checked by Google's own analyser with a
 * catalogue built from schemas/bigquery/. Prints all faults as file:line:column: message (of
 * a generated statement as file: STATEMENT:line:column: message, and its line); exit code 1 where there are any.
 * The analyser stops at a statement's first fault.
 */
import { globSync, readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { basename, dirname, join } from "node:path";
import { type AnalyzeRequest, ZetaSQLClient } from "@fivetrandevelopers/zetasql";
import { verifyStatements } from "../../scripts/ops/lib/verify.ts";
import { type Contract, readContract } from "../../shared/bigquery/contract.ts";
import { mergeStatement } from "../../shared/bigquery/load.ts";
import { root, UsageError } from "../../shared/env.ts";
import { pipelines } from "../../shared/pipelines.ts";
import { readModels, tablesRead } from "../../shared/views/models.ts";
import { startServer } from "../lib/servers.ts";
import { freePort } from "../lib/shop.ts";
import { listens } from "../stack/process.ts";
import { say } from "../stack/stack.ts";

type Catalog = NonNullable<AnalyzeRequest["simpleCatalog"]>;
type Column = NonNullable<NonNullable<Catalog["table"]>[number]["column"]>[number];
type Type = NonNullable<Column["type"]>;
interface Statement {
  file: string;
  sql: string;
  generated?: string;
}

const read = (file: string): string => readFileSync(join(root, file), "utf8");
const list = (pattern: string): string[] => globSync(pattern, { cwd: root }).sort();
const files = (pattern: string): Statement[] => list(pattern).map((file) => ({ file, sql: read(file) }));
const faults: string[] = [];

/** The API's names of the types that differ from the analyser's TYPE_ names. */
const kinds: Record<string, string> = { INTEGER: "INT64", FLOAT: "DOUBLE", FLOAT64: "DOUBLE", BOOLEAN: "BOOL" };
const simple = /^(INT64|DOUBLE|BOOL|STRING|BYTES|NUMERIC|BIGNUMERIC|DATE|TIME|DATETIME|TIMESTAMP|JSON|GEOGRAPHY|INTERVAL)$/;

function columnType({ name, type, mode }: Contract["fields"][number], file: string): Type {
  const kind = kinds[type] ?? type;
  const typeKind = (simple.test(kind) ? `TYPE_${kind}` : "TYPE_STRING") as Type["typeKind"];
  if (!simple.test(kind)) {
    const [before = ""] = read(file).split(`"name": "${name}"`);
    faults.push(`${file}:${before.split("\n").length}:1: field ${name}: BigQuery has no type ${type}`);
  }
  return (mode === "REPEATED" ? { typeKind: "TYPE_ARRAY", arrayType: { elementType: { typeKind } } } : { typeKind }) as Type;
}

/** The pipeline's statements: the MERGE, and what make verify and make sweep ask and write. */
function generated(contract: Contract, staging: string): Statement[] {
  const tables = { table: `\`${path(contract.pipeline)}\``, staging: `\`${path(staging)}\`` };
  const time = "2017-01-01T00:00:00.000001+00";
  const statements = {
    MERGE: mergeStatement(contract, tables.table, tables.staging),
    ...verifyStatements(contract, { ...tables, watermark: time, seconds: 1800, shown: 20, written: ["extra"] }),
  };
  return Object.entries(statements).map(([generated, sql]) => ({ file: contract.file, sql, generated }));
}

/** BigQuery takes a path in one pair of backticks for one name, and so does the analyser. */
const path = (table: string): string => `my-project.raw.${table}`;

const { resolve } = createRequire(import.meta.url);
const folder = join(dirname(resolve("@fivetrandevelopers/zetasql")), "zetasql");
const binary = `remote_server${process.arch.startsWith("arm") ? "_arm" : ""}${process.platform === "darwin" ? "" : ".so"}`;
const port = await freePort();
const command = { command: join(folder, binary), args: ["127.0.0.1", String(port)] };
const server = await startServer("googlesql", command, () => listens(port));
ZetaSQLClient.init(port);
const client = ZetaSQLClient.getInstance();
const options = await client.getLanguageOptions({ maximumFeatures: true });
const languageOptions = {
  ...options,
  productMode: "PRODUCT_EXTERNAL", // BigQuery's: FLOAT64 but no DOUBLE, no INT32
  supportedStatementKinds: [], // all of them
  enabledLanguageFeatures: [
    ...(options?.enabledLanguageFeatures ?? []),
    // BigQuery has them; this release of the analyser counts them as not finished.
    "FEATURE_INTERVAL_TYPE",
    "FEATURE_TIME_BUCKET_FUNCTIONS",
    "FEATURE_V_1_3_COLLATION_SUPPORT",
    "FEATURE_V_1_4_GROUPING_BUILTIN",
    "FEATURE_V_1_4_GROUPING_SETS",
  ],
} as NonNullable<NonNullable<AnalyzeRequest["options"]>["languageOptions"]>;
const tables: NonNullable<Catalog["table"]> = [];
const catalog = { name: "bigquery", table: tables, builtinFunctionOptions: { languageOptions } };

/** A table under its plain name, which the views use, and under its path. */
const addTable = (name: string, column: Column[]) => tables.push({ name, column }, { name: path(name), column });

/** The statement's fault, if it has one; a table that it creates is in the catalogue from then on. */
async function analyse({ file, sql, generated }: Statement): Promise<string | undefined> {
  const options = { languageOptions, allowUndeclaredParameters: true, errorMessageMode: "ERROR_MESSAGE_ONE_LINE" } as const;
  try {
    const answer = await client.analyze({ sqlStatement: sql, simpleCatalog: catalog, options });
    const node = answer?.resolvedStatement?.resolvedCreateStatementNode?.resolvedCreateTableStmtBaseNode;
    const columns = node?.resolvedCreateTableAsSelectStmtNode?.outputColumnList;
    const made = columns?.map(({ name, column }) => ({ name, type: column?.type }) as Column);
    if (made) addTable(basename(file, ".sql"), made);
    return undefined;
  } catch (error) {
    const { code, details } = error as { code?: number; details?: string };
    if (code === undefined || code === 14) throw error; // 14: the server is gone; all others are about the statement
    const [, message = details, line = "1", column = "1"] = /^(.*) \[at (\d+):(\d+)\]$/s.exec(details ?? "") ?? [];
    if (!generated) return `${file}:${line}:${column}: ${message}`;
    return `${file}: ${generated}:${line}:${column}: ${message}\n    ${sql.split("\n")[Number(line) - 1]}`;
  }
}

const statements: Statement[] = [];
for (const pipeline of pipelines()) {
  try {
    const contract = readContract(pipeline);
    const columns = contract.fields.map((field) => ({ name: field.name, type: columnType(field, contract.file) }));
    const staging = `${pipeline}_staging`;
    for (const table of [pipeline, staging]) addTable(table, columns);
    statements.push(...generated(contract, staging));
  } catch (error) {
    faults.push(`schemas/bigquery/${pipeline}.json:1:1: ${(error as Error).message}`); // not JSON, or no Table resource
  }
}

/** What make views finds that a statement reads is what the analyser finds. */
async function compareReads({ file, sql }: Statement): Promise<void> {
  const request = { sqlStatement: sql, options: languageOptions };
  const answer = await client.extractTableNamesFromStatement(request).catch(() => undefined); // its fault is told elsewhere
  if (!answer) return;
  const known = [...list("views/*.sql").map((view) => basename(view, ".sql")), ...pipelines()];
  const read = new Set(answer.tableName?.map(({ tableNameSegment }) => tableNameSegment?.join(".") ?? ""));
  const found = tablesRead(sql, known);
  for (const name of known.filter((one) => read.has(one) && !found.includes(one)))
    faults.push(`${file}:1:1: reads ${name}, which make views does not find behind FROM or JOIN: write JOIN, not a comma`);
  for (const name of found)
    if (!read.has(name)) faults.push(`${file}:1:1: make views takes ${name} for a table that it reads: give what is named so another name`);
}

// The views in the order of make views, so that each finds the tables of those that it reads; or what make views refuses.
const views = files("views/*.sql");
try {
  if (views.length) views.splice(0, views.length, ...readModels(pipelines()).map(({ file }) => ({ file, sql: read(file) })));
} catch (error) {
  if (!(error instanceof UsageError)) throw error;
  const [, ...lines] = error.message.split("\n");
  faults.push(...lines.map((fault) => fault.trim()));
}
const checks = files("views/checks/*.sql");
for (const statement of [...views, ...checks]) await compareReads(statement);
const broken: string[] = [];
for (const view of views) {
  // What only misses a view's table that another fault explains is not said again.
  const fault = await analyse(view);
  if (!fault) continue;
  if (!broken.some((name) => fault.includes(`Table not found: ${name}`))) faults.push(fault);
  broken.push(basename(view.file, ".sql"));
}

for (const statement of [...statements, ...checks]) {
  const fault = await analyse(statement);
  if (fault) faults.push(fault);
}
for (const fault of faults) say(fault);
await server[Symbol.asyncDispose]();
process.exit(faults.length ? 1 : 0);
