/**
 * From Postgres to BigQuery: which type goes to which, how a value is written into a JSON line, and which values have no
 * place there. An array's elements go as its type does, into a REPEATED field.
 */
import type { TableField } from "@google-cloud/bigquery";
import { raise } from "../copy.ts";
import { quote } from "../session.ts";
import type { Column } from "../source.ts";

/** A field of a contract. */
export interface Field extends TableField {
  name: string;
  type: string;
  mode: string;
}

/** SQL about one value, a column or an array's element. */
type Write = (value: string) => string;

const asText: Write = (value) => `${value}::text`;
const asIs: Write = (value) => value;
const asBase64: Write = (value) => `translate(encode(${value}, 'base64'), E'\n', '')`;
/**
 * Postgres type → the BigQuery types that hold every value of it → how the value is written into a JSON line.
 * INT64 and NUMERIC go as text, since a JSON number is exact only to 2^53; json goes through jsonb, since a json value may
 * hold raw newlines; jsonb's null becomes NULL in a JSON field, and stays 'null' in a STRING field.
 */
const types: Record<string, Record<string, Write>> = {
  int2: { INTEGER: asText },
  int4: { INTEGER: asText },
  int8: { INTEGER: asText },
  numeric: { NUMERIC: asText, BIGNUMERIC: asText, STRING: asText },
  float4: { FLOAT: asIs },
  float8: { FLOAT: asIs },
  bool: { BOOLEAN: asIs },
  text: { STRING: asIs },
  varchar: { STRING: asIs },
  bpchar: { STRING: asIs },
  uuid: { STRING: asText },
  enum: { STRING: asText },
  inet: { STRING: asText },
  cidr: { STRING: asText },
  interval: { STRING: asText },
  date: { DATE: asText },
  time: { TIME: asText },
  timestamp: { DATETIME: asIs },
  timestamptz: { TIMESTAMP: asIs },
  json: { JSON: (value) => `${value}::jsonb`, STRING: asText },
  jsonb: { JSON: asIs, STRING: asText },
  bytea: { BYTES: asBase64 },
};

const special: Write = (value) => `${value} in ('NaN', 'Infinity', '-Infinity')`;
const outside: Write = (value) => `not ${value} >= '0001-01-01' or not ${value} < '10000-01-01'`;
/**
 * BigQuery stores a JSON number as an INT64, a UINT64 or a FLOAT64, and rounds any other (PARSE_JSON, wide_number_mode). A number of
 * up to 15 digits is always exact, and jsonb writes no exponents, so only a text with a longer run of digits is looked into.
 * @param value of type jsonb.
 */
const wideNumber = (value: string): string => `case when ${value}::text ~ '${"[0-9.]".repeat(16)}' then exists (
  select from (select n::numeric as n from jsonb_path_query(${value}, 'strict $.**') p(n) where jsonb_typeof(n) = 'number') p
  where case when scale(n) = 0 and n between -9223372036854775808 and 18446744073709551615 then false
    when n = 0 then false
    when abs(n) not between 5e-324 and 1.7976931348623157e308 then true
    else n <> n::float8::text::numeric end) else false end`;
/**
 * Postgres type → the condition under which a value has no place in the field's type, where BigQuery would round it, or
 * refuse it without naming the row. A row that holds one is refused by name.
 */
const outOfRange: Record<string, (value: string, field: Field, declared: string) => string> = {
  numeric: (value, field, declared) => {
    if (declared.includes("(")) return `${value} = 'NaN'`; // fits() has compared what it is declared as
    const [digits, decimals] = numericSize(field);
    return `not abs(${value}) < 1e${digits - decimals} or ${value} <> round(${value}, ${decimals})`; // NaN is above every number
  },
  float4: special,
  float8: special,
  date: outside,
  time: (value) => `${value} = '24:00:00'`,
  timestamp: outside,
  timestamptz: outside,
  json: (value) => wideNumber(`${value}::jsonb`),
  jsonb: wideNumber,
};

/** Digits in all and after the point that a NUMERIC or BIGNUMERIC field holds. */
function numericSize({ type, precision, scale }: Field): [number, number] {
  if (precision) return [Number(precision), Number(scale ?? 0)];
  return apiType(type) === "NUMERIC" ? [38, 9] : [76, 38];
}

/** BigQuery's API answers with the legacy names; a contract may use the SQL ones. */
const apiNames: Record<string, string> = { INT64: "INTEGER", FLOAT64: "FLOAT", BOOL: "BOOLEAN" };
export const apiType = (type: string): string => apiNames[type.toUpperCase()] ?? type.toUpperCase();

/** Why the field cannot hold the column, in words; single values that it cannot hold are found row by row. */
export function unmappable(column: Column, field: Field): string | undefined {
  const { declared, array, notnull, of } = column;
  const mapped = types[column.type];
  if (!mapped)
    return `${declared}, which has no safe mapping. Select it as a type that has one, for example ${quote(field.name)}::text`;
  if (!mapped[apiType(field.type)] || array !== (field.mode === "REPEATED") || !fits(column, field))
    return `${declared}, which it cannot hold`;
  return field.mode === "REQUIRED" && of && !notnull ? "a nullable column" : undefined;
}

/** Whether a NUMERIC field holds every value of the column, as declared; one declared without a size is looked at row by row. */
function fits({ type, declared }: Column, field: Field): boolean {
  const [, all, after] = /^numeric\((\d+),(-?\d+)\)/.exec(declared) ?? [];
  if (type !== "numeric" || !all || apiType(field.type) === "STRING") return true;
  const [digits, decimals] = numericSize(field);
  return Number(after) <= decimals && Number(all) - Number(after) <= digits - decimals;
}

/**
 * The SELECT around `select` of JSON lines, in which each field's column is written as its BigQuery type reads it. A row with a value that has no
 * place there, or none where the field is REQUIRED, raises an error that names it.
 * @param key columns of the primary key, for the row's name.
 */
export function jsonLines(pipeline: string, fields: Field[], key: string[], select: string, columns: Column[]): string {
  const [row, line] = [rowName(key), freeName(fields, "line")];
  const written = fields.map((field) => {
    const column = columns.find(({ name }) => name === field.name) as Column;
    const name = quote(field.name);
    const refused = refusedWhere(column, field);
    const message =
      `'column ${field.name.replaceAll("'", "''")} of ${pipeline}, row ' || ${row} || ': ' || ` +
      `coalesce(left(${name}::text, 200), 'NULL')`;
    const value = refused ? `(case when ${refused} then ${raise(message, column.sql)} else ${name} end)` : name;
    const write = types[column.type]?.[apiType(field.type)] as Write;
    // BigQuery has no NULL arrays: it reads one as an empty one.
    const elements = `(select coalesce(json_agg(${write("e")} order by n), '[]') from unnest(${value}) with ordinality a(e, n))`;
    return `${column.array ? elements : write(value)} as ${name}`;
  });
  return `select row_to_json(${line}) from (select ${written.join(", ")} from (${select}) source) ${line}`;
}

/** A name like `wanted` that none of the fields has: as an alias, it would be taken for the field. */
export function freeName(fields: Field[], wanted: string): string {
  return fields.some(({ name }) => name.toLowerCase() === wanted) ? freeName(fields, `${wanted}_`) : wanted;
}

/** SQL: a row's key as text, for example id=17. */
export const rowName = (key: string[]): string =>
  key.map((name) => `'${name}=' || coalesce(${quote(name)}::text, 'NULL')`).join(" || ', ' || ");

/** The condition under which a row is refused because of the column, if there is one. */
function refusedWhere(column: Column, field: Field): string | undefined {
  const name = quote(field.name);
  const type = apiType(field.type);
  const check = (value: string): string | undefined =>
    type === "STRING" ? undefined : outOfRange[column.type]?.(value, field, column.declared);
  const conditions = column.array
    ? ["e is null", check("e"), type === "JSON" ? "e::jsonb = 'null'" : undefined] // no NULL among an array's elements either
    : [field.mode === "REQUIRED" ? `${name} is null` : undefined, check(name)];
  const any = conditions.filter((condition) => condition !== undefined).join(" or ");
  return column.array ? `array_ndims(${name}) > 1 or exists (select from unnest(${name}) e where ${any})` : any;
}
