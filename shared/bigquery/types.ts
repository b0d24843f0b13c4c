/**
 * From Postgres to BigQuery: which type goes to which, how a value is written into a JSON line, and which values have no place there. In
 * the SQL here ? is the value: a column, or an array's element. An array's elements go as its type does, into a REPEATED field.
 */
import type { TableField } from "@google-cloud/bigquery";
import { quote } from "../session.ts";
import type { Column } from "../source.ts";

/** A field of a contract. */
export type Field = TableField & Record<"name" | "type" | "mode", string>;

/**
 * BigQuery stores a JSON number as an INT64, a UINT64 or a FLOAT64, and rounds any other (PARSE_JSON, wide_number_mode); one beyond
 * FLOAT64 fails at the cast. A number of up to 15 digits is always exact, and jsonb writes no exponents, so only a text with a longer run
 * of digits is looked into.
 */
const wideNumber = `case when ?::jsonb::text ~ '${"[0-9.]".repeat(16)}' then exists (
  select from (select n::numeric as n from jsonb_path_query(?::jsonb, 'strict $.**') p(n) where jsonb_typeof(n) = 'number') p
  where (scale(n) > 0 or n not between -9223372036854775808 and 18446744073709551615) and n <> n::float8::text::numeric) else false end`;
const special = "? in ('NaN', 'Infinity', '-Infinity')";

/**
 * Postgres types | the BigQuery types that hold their values | how a value is written into a JSON line | which values BigQuery would
 * round or change: a row with one is refused, as one is that BigQuery refuses itself (a year 10000, 24:00:00, 500 levels of JSON). INT64
 * and NUMERIC go as text, since a JSON number is exact only to 2^53; json goes through jsonb, since a json value may hold raw newlines;
 * jsonb's null becomes NULL in a JSON field, and stays 'null' in a STRING field.
 */
const types: [from: string, to: string, write: string, refuse?: string][] = [
  ["int2 int4 int8", "INTEGER", "?::text"],
  ["numeric", "NUMERIC BIGNUMERIC", "?::text", "? <> round(?, {decimals})"],
  ["numeric", "STRING", "?::text"],
  ["float4 float8", "FLOAT", "?", special],
  ["bool", "BOOLEAN", "?"],
  ["text varchar bpchar", "STRING", "?"],
  ["uuid enum inet cidr interval", "STRING", "?::text"],
  ["date", "DATE", "?::text"],
  ["time", "TIME", "?::text"],
  ["timestamp", "DATETIME", "?"],
  ["timestamptz", "TIMESTAMP", "?"],
  ["json jsonb", "JSON", "?::jsonb", wideNumber],
  ["json jsonb", "STRING", "?::text"],
  ["bytea", "BYTES", "translate(encode(?, 'base64'), E'\\n', '')"],
];

/** The rows of `types` of a Postgres type, and of a field's. */
export const mapped = (type: string, into?: string) =>
  types.filter(([from, to]) => from.split(" ").includes(type) && (!into || to.split(" ").includes(apiType(into))));

/** BigQuery's API answers with the legacy names; a contract may use the SQL ones. */
const apiNames: Record<string, string> = { INT64: "INTEGER", FLOAT64: "FLOAT", BOOL: "BOOLEAN" };
export const apiType = (type: string): string => apiNames[type.toUpperCase()] ?? type.toUpperCase();

/** Digits before and after the point that a NUMERIC or BIGNUMERIC field holds. */
function numericSize({ type, precision, scale = "0" }: Field): [whole: number, decimals: number] {
  if (precision) return [Number(precision) - Number(scale), Number(scale)];
  return apiType(type) === "NUMERIC" ? [29, 9] : [38, 38];
}

/** Why the field cannot hold the column, in words; single values that it cannot hold are found row by row. */
export function unmappable({ type, declared, array, notnull, of }: Column, field: Field): string | undefined {
  if (!mapped(type).length)
    return `${declared}, which has no safe mapping. Select it as a type that has one, for example ${quote(field.name)}::text`;
  const [whole, decimals] = numericSize(field);
  const [, digits, scale] = /^numeric\((\d+),(-?\d+)\)/.exec(declared) ?? []; // without a size: row by row
  const tooLarge = digits && (Number(scale) > decimals || Number(digits) - Number(scale) > whole);
  const text = apiType(field.type) === "STRING";
  if (!mapped(type, field.type).length || array !== (field.mode === "REPEATED") || (tooLarge && !text))
    return `${declared}, which it cannot hold`;
  return field.mode === "REQUIRED" && of && !notnull ? "a nullable column" : undefined;
}

/** The condition under which a row is refused because of the column, if there is one. */
function refusedWhere({ type, array, declared }: Column, field: Field, refuse = ""): string {
  const name = quote(field.name);
  const sized = type === "numeric" && declared.includes("("); // then the field has as many decimals
  const missing = (array || field.mode === "REQUIRED") && "? is null"; // no NULL among an array's elements either
  const nothing = array && apiType(field.type) === "JSON" && "?::jsonb = 'null'";
  const decimals = String(numericSize(field)[1]);
  const any = [missing, !sized && refuse.replace("{decimals}", decimals), nothing].filter(Boolean).join(" or ");
  return array ? `array_ndims(${name}) > 1 or exists (select from unnest(${name}) e where ${filled(any, "e")})` : filled(any, name);
}

const filled = (template: string, value: string): string => template.replaceAll("?", () => value);

/**
 * The SELECT around `select` of JSON lines, in which each field's column is written as its BigQuery type reads it. A value that has no
 * place there raises an error. Aliases begin with etl__, and no field's name does: Postgres and BigQuery would take the one for the other.
 */
export function jsonLines(fields: Field[], select: string, columns: Column[]): string {
  const written = fields.map((field) => {
    const column = columns.find(({ name }) => name === field.name) as Column;
    const name = quote(field.name);
    const [, , write = "?", refuse] = mapped(column.type, field.type)[0] ?? [];
    const refused = refusedWhere(column, field, refuse);
    // A cast that must fail is the only way for a plain SELECT of a read-only role to raise an error.
    const raised = `('column ${field.name} cannot hold ' || coalesce(left(${name}::text, 200), 'NULL'))::int::text::${column.sql}`;
    const value = refused ? `(case when ${refused} then ${raised} else ${name} end)` : name;
    if (!column.array) return `${filled(write, value)} as ${name}`;
    // BigQuery has no NULL arrays: it reads one as an empty one.
    return `(select coalesce(json_agg(${filled(write, "e")} order by n), '[]') from unnest(${value}) with ordinality a(e, n)) as ${name}`;
  });
  return `select row_to_json(etl__line) from (select ${written.join(", ")} from (${select}) source) etl__line`;
}
