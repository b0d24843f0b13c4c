/**
 * The weekly models. views/NAME.sql is one CREATE OR REPLACE TABLE NAME … AS SELECT with unqualified names, run as it stands (paste it
 * into the console). views/checks/*.sql return the rows that are wrong. Which tables a file reads is found behind its FROM and JOIN. `make
 * check` compares that with Google's analyser, and build.ts with BigQuery's own list of the finished job.
 */
import { globSync, readFileSync } from "node:fs";
import { basename, join } from "node:path";
import { root, UsageError } from "../env.ts";

export interface Statement {
  /** From the project's root, for messages. */
  file: string;
  name: string;
  sql: string;
  /** Models and raw tables that it reads. */
  reads: string[];
}

export interface Model extends Statement {
  checks: Statement[];
  /** The models that have to be published before it: those that it or its checks read. */
  needs: string[];
}

/** Removes comments and strings; a name in backticks stays. */
function code(sql: string): string {
  const noise = /--.*|#.*|\/\*[\s\S]*?\*\/|"""[\s\S]*?"""|'''[\s\S]*?'''|"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*'|(`[^`]*`)/g;
  return sql.replaceAll(noise, "$1 ");
}

/** One statement each, without comments and strings. */
const modelForm = /^\s*CREATE OR REPLACE TABLE\s+`?(\w+)`?[\s(][^;]*\bAS[\s(]+(?:SELECT|WITH)\b[^;]*;?\s*$/i;
const checkForm = /^\s*(?:SELECT|WITH)\b[^;]*;?\s*$/i;

/** The known tables that the SQL names behind FROM or JOIN, without a dataset. One behind a comma is not found. */
export function tablesRead(sql: string, known: string[]): string[] {
  const names = code(sql).matchAll(/\b(?:FROM|JOIN)\b[\s(`]*(\w+)(?!\w|`?\s*\.)/gi);
  const found = new Set(Array.from(names, ([, name]) => name));
  return known.filter((name) => found.has(name)).sort();
}

/**
 * The models with their checks, in an order in which each comes after those that it needs.
 * @param raw the raw tables. @param only this model and what it needs.
 * @throws UsageError with everything that is wrong in the files, and with models that read one another.
 */
export function readModels(raw: string[], only?: string): Model[] {
  const list = (folder: string): string[] => globSync(`${folder}/*.sql`, { cwd: root }).sort();
  const names = list("views").map((file) => basename(file, ".sql"));
  const readFile = (file: string): Statement => {
    const sql = readFileSync(join(root, file), "utf8");
    return { file, name: basename(file, ".sql"), sql, reads: tablesRead(sql, [...names, ...raw]) };
  };
  const modelsIn = (reads: string[]): string[] => reads.filter((name) => names.includes(name));
  const faults = names.length ? [] : ["views/ holds no model"];
  const ordered: Model[] = [];
  for (let left = list("views").map(readFile); left.length; ) {
    const ready = left.filter(({ reads }) => !left.some(({ name }) => reads.includes(name)));
    if (!ready.length) throw new UsageError(`models read one another in a circle: ${left.map(({ file }) => file).join(", ")}`);
    ordered.push(...ready.map((file) => ({ ...file, checks: [], needs: modelsIn(file.reads) })));
    left = left.filter((file) => !ready.includes(file));
  }
  for (const { file, name, sql } of ordered) {
    if (modelForm.exec(code(sql))?.[1] !== name)
      faults.push(`${file} must hold one statement: CREATE OR REPLACE TABLE ${name} … AS SELECT …, without a dataset`);
    if (raw.includes(name)) faults.push(`${file}: ${name} is the name of a raw table`);
  }
  for (const check of list("views/checks").map(readFile)) {
    if (!checkForm.test(code(check.sql))) faults.push(`${check.file} must hold one statement: a SELECT of the rows that are wrong`);
    // It runs with the last of the models that it reads, once all of them are built.
    const owner = ordered.findLast(({ name }) => check.reads.includes(name));
    if (!owner) faults.push(`${check.file} reads no model: nothing would run it`);
    owner?.checks.push(check);
    owner?.needs.push(...modelsIn(check.reads).filter((name) => name !== owner.name));
  }
  if (only && !names.includes(only)) faults.push(`ONLY=${only}: there is no views/${only}.sql. There are: ${names.join(", ")}`);
  if (faults.length) throw new UsageError(`nothing was built:\n${faults.map((fault) => `  ${fault}`).join("\n")}`);
  const wanted = new Set(only ? [only] : names);
  for (const { name, needs } of ordered.toReversed()) if (wanted.has(name)) for (const needed of needs) wanted.add(needed);
  return ordered.filter(({ name }) => wanted.has(name));
}
