/**
 * What a pipeline reads at the source, and whether it may: the table, its cursor column, and the columns that the SELECT returns. A row
 * that is refused, for whatever reason, is named by its key.
 */
import { readFileSync } from "node:fs";
import { join } from "node:path";
import type { Sql } from "postgres";
import { SourceError } from "./copy.ts";
import { root, UsageError } from "./env.ts";
import type { Run } from "./run.ts";
import { ident, queryFile, queryWith, quote, type Settings } from "./session.ts";

/**
 * What a pipeline reads: a table with its schema, as public.orders; its cursor, the timestamptz of a row's last change, which the database
 * sets; the SELECT of sql/NAME.sql, whose settings etl.from (inclusive) and etl.to (exclusive) bound it; and what that calls the columns of
 * a unique key.
 */
export type Source = Record<"table" | "cursor" | "select", string> & { key: string[] };

/** The SELECT of sql/NAME.sql, such that it can stand in parentheses: psql needs the semicolon at its end. */
export const readSelect = (name: string): string =>
  `${readFileSync(join(root, `sql/${name}.sql`), "utf8").replace(/;(\s|--.*(\n|$))*$/, "")}\n`;

/** A column of the table, or one that a SELECT returns; sql/source_checks.sql says what each is. */
export type Column = Record<"name" | "type" | "sql" | "declared", string> & { array: boolean; notnull: boolean; of: string | null };

/** What is needed of a run to check its source. */
export type SchemaCheck = Pick<Run, "pipeline" | "source" | "log" | "metrics">;

/** What a SELECT has to return: a column, what is expected of it, and in what one that exists differs. */
type Expected = { name: string; expected: string; differs(column: Column): string | undefined };

/** What sql/source_checks.sql returns. `found`: what the SELECT returns; `unknown`: the table's columns neither expected nor read. */
type Checked = { faults: string[]; found: Column[]; unknown: string[]; key_columns: string[] };

/**
 * Compares the table and its cursor column, and what the SELECT returns, with what `file` expects. A column of the table that is not
 * expected, and rows that no run reads, are a warning and a metric.
 * @returns the columns that the SELECT returns.
 * @throws UsageError naming column, expected and found, all of them at once.
 */
export async function checkColumns(run: SchemaCheck, file: string, of: Source, wanted: Expected[]): Promise<Column[]> {
  const { source, pipeline } = run;
  const { table, cursor, select, key } = of;
  let refused = "";
  const described = await source
    .unsafe(select)
    .describe()
    .catch((error: Error & { code?: string }) => {
      if (!error.code?.startsWith("42")) throw error; // a name that does not exist, or may not be used
      refused = `sql/${pipeline}.sql: ${error.message}`;
    });
  const settings = {
    ...{ "etl.source": table, "etl.source_cursor": cursor, "etl.source_key": key.join(), "etl.source_file": file },
    "etl.source_fields": JSON.stringify(wanted),
    "etl.source_select": described ? JSON.stringify(described.columns) : "",
  };
  const [{ faults, found, unknown, key_columns }] = (await queryFile(source, "source_checks", settings)) as [Checked];
  for (const { name, expected, differs } of wanted) {
    const column = found.find((one) => one.name === name);
    const is = column && differs(column);
    if (is) faults.push(`column ${table}.${name}: expected ${expected} (${file}), found ${is}`);
  }
  if (!faults.length && refused) faults.push(refused);
  if (faults.length) {
    if (unknown.length) faults.push(`not in the contract: ${unknown.join(", ")} (was a column renamed?)`);
    throw driftError("source", faults, `Bring the source, sql/${pipeline}.sql and ${file} together`);
  }
  const { infinite, future, first } = await findUnreachable(source, of, key_columns);
  const correct = `update ${table} set ${ident(cursor)} = now() where ${ident(cursor)}`; // a time that a run reaches
  const finite = `column ${table}.${cursor}: expected finite times, since it is the cursor, found infinity. Run: ${correct}`;
  if (infinite) throw new UsageError(`${finite} in ('infinity', '-infinity');`);
  Object.assign(run.metrics, { etl_unknown_source_columns: unknown.length, etl_future_rows: future });
  const warning = `${table} has columns that are not in ${file}, and are not synced`;
  if (unknown.length) run.log("warning", { warning, columns: unknown.join() });
  const unread = `${future} rows of ${table} lie in the future, and no run reads them before. Run: ${correct} > now();`;
  if (future) run.log("warning", { warning: unread, rows: future, first });
  return found;
}

/** Rows whose cursor is infinite or lies in the future: how many, and the first one's key. No window ends after them. */
export async function findUnreachable(sql: Sql, { table, cursor }: Source, key: string[]) {
  const column = quote(cursor);
  // The clock in a sub-select: read once, so that the index is used, not for each row of the table.
  const [found] = (await sql.unsafe(`
    select count(*) filter (where not isfinite(${column}))::int as infinite, count(*) filter (where isfinite(${column}))::int as future,
      min(${rowName(key.length ? key : [cursor])}) as first
    from ${table} where ${column} > (select clock_timestamp()) or ${column} = '-infinity'`)) as [
    { infinite: number; future: number; first: string | null },
  ];
  return found;
}

/** SQL: a row's key as text, for example id=17. */
const rowName = (key: string[]): string => key.map((name) => `'${name}=' || coalesce(${quote(name)}::text, 'NULL')`).join(" || ', ' || ");

/** Whether the source or BigQuery refuses a value: reading it again does not help, and naming the row does. */
function isRefusal(error: unknown): boolean {
  const { cause, errors } = error as { cause?: Error & { code?: string }; errors?: { reason?: string }[] };
  // Postgres's data exceptions and program limits.
  if (error instanceof SourceError) return /^(22|54)/.test(cause?.code ?? "");
  return errors?.some(({ reason }) => reason === "invalid") ?? false;
}

type Load = (select: string) => Promise<undefined>;

/**
 * Where `error` says that a row was refused, loads them again in halves, in the order of their keys, until one is left: log2(n) steps.
 * @param settings that the SELECT reads. @param load loads the rows of a SELECT.
 * @returns the error that names the row by its key, where reading it again would not help; or another one.
 */
export async function nameRefused(error: Error, run: Run, { key, select }: Source, settings: Settings, load: Load): Promise<Error> {
  if (!isRefusal(error)) return error;
  const ask = async (value: string, rows: string): Promise<string | undefined> =>
    (await queryWith<{ value: string }>(run.source, settings, `select ${value} as value from (${rows}) q`))[0]?.value;
  let [first, count] = [0, Number(await ask("count(*)", select))];
  run.log("refused", { rows: count, because: "a row is refused; reading them again in halves to name it" });
  while (count > 0) {
    const half = Math.ceil(count / 2);
    const part = `select * from (${select}) q order by ${key.map(quote).join(", ")} offset ${first} limit ${half}`;
    const refusal = await load(part).catch((error: Error) => error);
    if (refusal && !isRefusal(refusal)) return refusal;
    if (refusal && count === 1) {
      const why = `is refused: ${refusal.message}. Correct it at the source, then: make ${run.pipeline}`;
      return new SourceError(`row ${await ask(rowName(key), part)} of ${run.pipeline} ${why}`);
    }
    [first, count] = refusal ? [first, half] : [first + half, count - half];
  }
  return error; // no row is refused any longer
}

/** All differences of one side, in one error. */
export function driftError(side: string, faults: string[], next: string): UsageError {
  const help = `${next}; schemas/README.md, "When the schema changes".`;
  return new UsageError(`the ${side} differs from the contract, nothing was moved:\n  ${faults.join("\n  ")}\n${help}`);
}
