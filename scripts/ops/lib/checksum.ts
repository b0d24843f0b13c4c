/**
 * Counts and checksums of rows, by ranges of the primary key, computed inside Postgres, BigQuery and ClickHouse: nothing but sums
 * crosses the network, and they agree where the rows do, in whatever order.
 *
 * A value is written as text that is the same in each engine: timestamps as integer microseconds, numerics scaled to integers,
 * floats by their bits. A row is its values, each with its length before it, NULL as "-": "1:7" and "0:" and "-" are three
 * things. Its hash is the first 60 bits of the MD5 of that; a range's checksum is the sum of its rows' hashes.
 */
import type { ClickHouseClient } from "@clickhouse/client";
import type { Sql } from "postgres";
import { type AsRead, address, type Destination } from "../../../shared/bigquery/load.ts";
import { apiType, type Field } from "../../../shared/bigquery/types.ts";
import { select } from "../../../shared/sensors/clickhouse.ts";
import { quote } from "../../../shared/session.ts";
import type { Column } from "../../../shared/source.ts";

/** A column, and its value as canonical text in each engine, in SQL. */
interface Compared {
  name: string;
  source: string;
  destination: string;
}

export interface Layout {
  columns: Compared[];
  /** Names of the primary key's columns. */
  key: string[];
  /** By what the ranges are cut: the key's first column, as an integer, else as its canonical text. */
  integer: boolean;
  /** The column that says which of two versions is newer, if there is one: its canonical text is microseconds. */
  version?: string;
  /** Columns of which only is compared whether they are NULL. */
  unread: string[];
}

/** A part of the key's order: [low, high), open where undefined. */
export interface Span {
  low?: string | undefined;
  high?: string | undefined;
}

/** A range's rows: how many, and the sum of their hashes. */
export interface Sum {
  rows: number;
  sum: bigint;
}

/** A row in canonical text, by its key. */
export interface Row {
  key: string;
  values: (string | null)[];
  /** It is not compared: neither here nor there. */
  leftOut: boolean;
}

/** One side of a comparison. Range i of n bounds is [bounds[i - 1], bounds[i]). */
export interface Side {
  sums(bounds: string[], span: Span): Promise<Map<number, Sum>>;
  rows(bounds: string[], span: Span, ranges: number[]): Promise<Row[]>;
}

/** 2^53 and more: a FLOAT64 of 53 bits, shifted by exact powers of two into an integer, is its mantissa. */
const MANTISSA = "4503599627370496"; // 2^52

/**
 * BigQuery has no function for a float's bits. They follow from arithmetic that is exact: x = m * 2^(e - 52), with m in
 * [2^52, 2^53), or below for the smallest, whose e is -1022; then the bits are (e + 1022) * 2^52 + m, and the sign. LOG may be
 * off by one; m tells. -0 is 0: it is loaded as such.
 */
function floatBits(x: string): string {
  const exponent = `GREATEST(CAST(FLOOR(LOG(ABS(x), 2)) AS INT64), -1022)`;
  // In two steps: 2^1074 is no FLOAT64. DIV's parentheses are the local server's need, which takes 52 - e / 2 for it without.
  const half = "DIV((52 - e), 2)";
  const scaled = `ABS(x) * POW(2, ${half}) * POW(2, 52 - e - ${half})`;
  const bits = `CASE WHEN m >= 2 * ${MANTISSA}e0 THEN (e + 1023) * ${MANTISSA} + CAST(m / 2 AS INT64)
    WHEN m < ${MANTISSA}e0 AND e > -1022 THEN (e + 1021) * ${MANTISSA} + CAST(m * 2 AS INT64)
    ELSE (e + 1022) * ${MANTISSA} + CAST(m AS INT64) END`;
  return `(SELECT CASE WHEN x IS NULL THEN NULL WHEN IS_NAN(x) THEN 'NaN'
    WHEN IS_INF(x) THEN IF(x > 0, 'Infinity', '-Infinity')
    WHEN x = 0 THEN '0'
    ELSE CAST(${bits} + IF(x < 0, -9223372036854775807 - 1, 0) AS STRING) END
    FROM (SELECT x, e, ${scaled} AS m FROM (SELECT x, IF(x = 0 OR IS_NAN(x) OR IS_INF(x), 0, ${exponent}) AS e FROM (SELECT ${x} AS x))))`;
}

/**
 * A float's bits in Postgres. A float4 goes as its shortest decimal, as row_to_json and Debezium write it.
 * @param zero "+ 0" makes 0 of -0.
 */
function postgresFloat(x: string, type: string, zero = ""): string {
  const wide = type === "float4" ? `${x}::text::float8` : x;
  const bits = `('x' || encode(float8send(${wide} ${zero}), 'hex'))::bit(64)::bigint::text`;
  return `case when ${x} in ('NaN', 'Infinity', '-Infinity') then ${x}::text else ${bits} end`;
}

/** Infinity has no microseconds. */
const postgresMicros = (x: string): string =>
  `case when isfinite(${x}) then (extract(epoch from ${x}) * 1000000)::bigint::text else ${x}::text end`;

/** A NUMERIC of up to 18 digits as an integer of its smallest unit; one of more as its shortest decimal. */
function numeric(x: string, { precision, scale }: Field): [source: string, destination: string] {
  const factor = `1${"0".repeat(Number(scale ?? 0))}`;
  if (precision && Number(precision) <= 18)
    return [`trim_scale(${x} * ${factor})::text`, `CAST(CAST(${x} * ${factor} AS INT64) AS STRING)`];
  const text = `CAST(${x} AS STRING)`;
  return [
    `trim_scale(${x})::text`,
    `IF(STRPOS(${text}, '.') > 0, RTRIM(RTRIM(${text}, '0'), '.'), ${text})`, // BigQuery trims it, the local server does not
  ];
}

type Write = (value: string, field: Field, type: string) => string;
const bigqueryText: Write = (x) => `CAST(${x} AS STRING)`;
/** A field's type → its value as canonical text, from a Postgres column of any type that it holds (shared/types.ts), and from BigQuery. */
const canonical: Record<string, [source: Write, destination: Write]> = {
  INTEGER: [(x) => `${x}::text`, bigqueryText],
  NUMERIC: [(x, field) => numeric(x, field)[0], (x, field) => numeric(x, field)[1]],
  BIGNUMERIC: [(x, field) => numeric(x, field)[0], (x, field) => numeric(x, field)[1]],
  FLOAT: [(x, _, type) => postgresFloat(x, type, "+ 0"), floatBits],
  BOOLEAN: [(x) => `${x}::text`, bigqueryText],
  // A cast would strip char(n) of its blanks; concat() would make '' of NULL.
  STRING: [
    (x, _, type) => (type === "bpchar" ? `case when ${x} is not null then concat(${x}, '') end` : `${x}::text`),
    (x) => x,
  ],
  DATE: [
    (x) => `case when isfinite(${x}) then (${x} - date '1970-01-01')::text else ${x}::text end`,
    (x) => `CAST(UNIX_DATE(${x}) AS STRING)`,
  ],
  TIME: [
    (x) => `(extract(epoch from ${x}) * 1000000)::bigint::text`,
    (x) => `CAST(TIME_DIFF(${x}, TIME '00:00:00', MICROSECOND) AS STRING)`,
  ],
  DATETIME: [postgresMicros, (x) => `CAST(DATETIME_DIFF(${x}, DATETIME '1970-01-01 00:00:00', MICROSECOND) AS STRING)`],
  TIMESTAMP: [postgresMicros, (x) => `CAST(UNIX_MICROS(${x}) AS STRING)`],
  // The order of keys and the form of numbers are each engine's own.
  JSON: [
    (x) => `case when ${x}::jsonb <> 'null' then 'JSON' end`,
    (x) => `IF(${x} IS NULL OR TO_JSON_STRING(${x}) = 'null', NULL, 'JSON')`,
  ],
  BYTES: [(x) => `encode(${x}, 'hex')`, (x) => `TO_HEX(${x})`],
};

/** Whether there is a canonical text of a type: there is one of every type that a pipeline moves (shared/types.ts). */
export const isCompared = ({ type }: Field): boolean => apiType(type) in canonical;

/** How the rows of a pipeline to BigQuery are compared. @param columns what its SELECT returns. */
export function bigqueryLayout(fields: Field[], key: string[], columns: Column[], version: string): Layout {
  const unread: string[] = [];
  const compared = fields.map((field) => {
    const column = columns.find(({ name }) => name === field.name) as Column;
    const kind = apiType(field.type);
    const [source, destination] = canonical[kind] as [Write, Write];
    if (kind === "JSON") unread.push(field.name);
    const [here, there] = [quote(field.name), `\`${field.name}\``];
    if (!column.array)
      return {
        name: field.name,
        source: source(here, field, column.type),
        destination: destination(there, field, ""),
      };
    return {
      name: field.name,
      source: `coalesce((select string_agg(${postgresLength(source("e", field, column.type))}, '' order by n) from unnest(${here}) with ordinality a(e, n)), '')`,
      destination: `COALESCE((SELECT STRING_AGG(${bigqueryLength("c")}, '' ORDER BY o) FROM (SELECT ${destination("e", field, "")} AS c, o FROM UNNEST(${there}) AS e WITH OFFSET AS o)), '')`,
    };
  });
  const first = fields.find(({ name }) => name === key[0]);
  return { columns: compared, key, integer: apiType(first?.type ?? "") === "INTEGER", version, unread };
}

type Cast = (value: string, type: string) => string;
/** ClickHouse's types of sensor_readings → canonical text in Postgres and in ClickHouse. */
const clickhouseCanonical: Record<string, [source: Cast, destination: Cast]> = {
  Int64: [(x) => `${x}::text`, (x) => `toString(${x})`],
  String: [(x) => `${x}::text`, (x) => `CAST(${x}, 'Nullable(String)')`],
  Float64: [
    postgresFloat,
    (x) =>
      `multiIf(isNaN(${x}), 'NaN', isInfinite(${x}), if(${x} > 0, 'Infinity', '-Infinity'), toString(reinterpretAsInt64(assumeNotNull(${x}))))`,
  ],
  "DateTime64(6, 'UTC')": [postgresMicros, (x) => `toString(toUnixTimestamp64Micro(${x}))`],
};

/** How readings are compared. @param types of the source's columns, by name, as Postgres's catalog names them. */
export function clickhouseLayout(columns: { name: string; type: string }[], types: Record<string, string>): Layout {
  const compared = columns.map(({ name, type }) => {
    const plain = type.replace(/^LowCardinality\((.*)\)$/, "$1").replace(/^Nullable\((.*)\)$/, "$1");
    const [source, destination] = clickhouseCanonical[plain] as [Cast, Cast];
    const there = `r.${name}`;
    const text = destination(there, plain);
    return {
      name,
      source: source(quote(name), types[name] ?? ""),
      destination: plain === type || plain === "String" ? text : `if(isNull(${there}), NULL, ${text})`,
    };
  });
  return { columns: compared, key: ["id"], integer: true, unread: [] };
}

/** The value with its length before it; NULL is "-". */
const postgresLength = (c: string): string => `coalesce(char_length(${c}) || ':' || ${c}, '-')`;
const bigqueryLength = (c: string): string => `COALESCE(CAST(CHAR_LENGTH(${c}) AS STRING) || ':' || ${c}, '-')`;
const clickhouseLength = (c: string): string => `ifNull(concat(toString(lengthUTF8(${c})), ':', ${c}), '-')`;

const aliases = (layout: Layout): string[] => layout.columns.map((_, index) => `c${index}`);
const keyAliases = (layout: Layout): string[] =>
  layout.key.map((name) => `c${layout.columns.findIndex((column) => column.name === name)}`);
const readable = (row: Record<string, unknown>, layout: Layout, leftOut = false): Row => ({
  key: String(row.k),
  values: aliases(layout).map((alias) => (row[alias] ?? null) as string | null),
  leftOut,
});

/** The source. */
export interface Source extends Side {
  /** Bounds that cut the span's rows into ranges of at least `rows` and at most `ranges` of them; none where it is one range. */
  bounds(span: Span, rows: number, ranges: number): Promise<string[]>;
  /** The keys that are left out, at most `limit` of them. */
  leftOut(limit: number): Promise<string[]>;
  /** Which of these keys there are, left out or not. */
  present(keys: { range: string; key: string }[]): Promise<Set<string>>;
  /** Of all rows, the latest version. */
  latest(): Promise<string | null>;
}

/** SQL of a SELECT's keys: what ranges are cut by (r), and all of the key (k). */
function postgresKey(layout: Layout): { r: string; k: string; cast: string } {
  const source = (name: string | undefined): string =>
    layout.columns.find((column) => column.name === name)?.source ?? "";
  const first = layout.key[0] ?? "";
  return {
    r: layout.integer ? `${quote(first)}::bigint` : `(${source(first)}) collate "C"`,
    k: layout.key.map((name) => postgresLength(source(name))).join(" || "),
    cast: layout.integer ? "bigint" : "text",
  };
}

/**
 * Rows of a SELECT whose keys are among those of a JSON array of [r, k]. As a literal, for a COPY takes no parameters: in
 * hexadecimal, so that nothing in a key can end it.
 */
export function rowsOfKeys(layout: Layout, query: string, keys: { range: string; key: string }[]): string {
  const { r, k, cast } = postgresKey(layout);
  const json = Buffer.from(JSON.stringify(keys.map(({ range, key }) => ({ r: range, k: key })))).toString("hex");
  return `select q.* from (${query}) q where (${r}, ${k}) in (
    select e.r::${cast}, e.k from jsonb_to_recordset(convert_from(decode('${json}', 'hex'), 'UTF8')::jsonb) as e (r text, k text))`;
}

/**
 * @param query returns the layout's columns.
 * @param settled the condition on one of its rows under which it is compared.
 * @param settings of the transaction, for what the SELECT reads: etl.from and etl.to.
 */
export function postgresSide(
  source: Sql,
  layout: Layout,
  query: string,
  settled: string,
  settings: Record<string, string> = {},
): Source {
  const { r, k, cast } = postgresKey(layout);
  const inSpan = `($1::text is null or ${r} >= $1::text::${cast}) and ($2::text is null or ${r} < $2::text::${cast})`;
  const limits = ({ low, high }: Span): (string | null)[] => [low ?? null, high ?? null];
  const bucket = `width_bucket(${r}, array(select b::${cast} from jsonb_array_elements_text($3::text::jsonb) with ordinality e(b, n) order by n)${layout.integer ? "" : ` collate "C"`})`;
  const columns = layout.columns.map((column, index) => `${column.source} as c${index}`).join(", ");
  const hash = `('x' || left(md5(convert_to(${aliases(layout).map(postgresLength).join(" || ")}, 'UTF8')), 15))::bit(60)::bigint`;
  const ask = async <T>(sql: string, parameters: (string | null)[] = []): Promise<T[]> => {
    const rows = await source.begin("isolation level repeatable read read only", async (transaction) => {
      for (const [name, value] of Object.entries(settings))
        await transaction`select set_config(${name}, ${value}, true)`;
      return await transaction.unsafe(sql, parameters);
    });
    return [...rows] as unknown[] as T[];
  };
  return {
    bounds: async (span, rows, ranges) => {
      const found = await ask<{ b: string }>(
        `select r::text as b from (
           select r, row_number() over (order by r) as n, greatest($3::text::bigint, ceil(count(*) over () / $4::text::float8)) as size
           from (select ${r} as r from (${query}) q where ${settled} and ${inSpan}) q
         ) numbered where mod(n, size::bigint) = 0 order by r`,
        [...limits(span), String(rows), String(ranges)],
      );
      return [...new Set(found.map(({ b }) => b))];
    },
    sums: async (bounds, span) => {
      const sums = await ask<{ range: number; rows: string; sum: string }>(
        `select range, count(*)::text as rows, sum(${hash})::text as sum
         from (select ${bucket} as range, ${columns} from (${query}) q where ${settled} and ${inSpan} offset 0) q group by range`,
        [...limits(span), JSON.stringify(bounds)],
      );
      return new Map(sums.map(({ range, rows, sum }) => [range, { rows: Number(rows), sum: BigInt(sum) }]));
    },
    rows: async (bounds, span, ranges) => {
      const rows = await ask<Record<string, unknown>>(
        `select ${k} as k, not (${settled}) as left_out, ${columns} from (${query}) q
         where ${inSpan} and ${bucket} in (select e::int from jsonb_array_elements_text($4::text::jsonb) e)`,
        [...limits(span), JSON.stringify(bounds), JSON.stringify(ranges)],
      );
      return rows.map((row) => readable(row, layout, row.left_out === true));
    },
    leftOut: async (limit) =>
      (await ask<{ k: string }>(`select ${k} as k from (${query}) q where not (${settled}) limit ${limit}`)).map(
        (row) => row.k,
      ),
    present: async (keys) => {
      const found = await ask<{ k: string }>(`select ${k} as k from (${rowsOfKeys(layout, query, keys)}) q`);
      return new Set(found.map((row) => row.k));
    },
    latest: async () => {
      if (!layout.version) return null;
      const micros = postgresMicros(`max(${quote(layout.version)})`);
      return (await ask<{ v: string | null }>(`select ${micros} as v from (${query}) q`))[0]?.v ?? null;
    },
  };
}

/** SQL of the same in BigQuery. */
function bigqueryKey(layout: Layout): { r: string; k: string } {
  const there = (name: string | undefined): string =>
    layout.columns.find((column) => column.name === name)?.destination ?? "";
  const first = layout.key[0] ?? "";
  return {
    r: layout.integer ? `\`${first}\`` : there(first),
    k: layout.key.map((name) => bigqueryLength(there(name))).join(" || "),
  };
}

/** Rows of the target, each as its version and key in one text: one is changed only while it is the version that was read. */
export function asRead(layout: Layout, rows: { version: string | null; key: string }[]): AsRead {
  const text = `${versionOf(layout)} || ' ' || ${bigqueryKey(layout).k}`;
  return {
    condition: `(${text.replaceAll(/`(\w+)`/g, "t.`$1`")}) IN UNNEST(@read)`,
    read: rows.map(({ version, key }) => `${version} ${key}`),
  };
}
const versionOf = ({ columns, version }: Layout): string =>
  columns.find(({ name }) => name === version)?.destination ?? "";

/** Columns of a SELECT of every row's key, range and version. */
export function bigqueryVersions(layout: Layout): string {
  const { r, k } = bigqueryKey(layout);
  return `CAST(${r} AS STRING) AS \`range\`, ${k} AS \`key\`, ${versionOf(layout)} AS version`;
}

/** The queries, for make check too. Parameters: @low, @high, @bounds, @ranges, and @left_out, keys that are not compared. */
export function bigqueryStatements(layout: Layout, table: string): { sums: string; rows: string } {
  const { r, k } = bigqueryKey(layout);
  const columns = layout.columns.map((column, index) => `${column.destination} AS c${index}`).join(", ");
  const where = `(@low IS NULL OR ${r} >= @low) AND (@high IS NULL OR ${r} < @high)`;
  const text = aliases(layout).map(bigqueryLength).join(" || ");
  return {
    // Two halves of 30 bits: an INT64 holds the sum of 2^33 of them.
    sums: `SELECT CAST(bucket AS STRING) AS bucket, CAST(COUNT(*) AS STRING) AS n, CAST(SUM(row_hash >> 30) AS STRING) AS high, CAST(SUM(row_hash & 1073741823) AS STRING) AS low
FROM (
  SELECT bucket, CAST(CONCAT('0x', SUBSTR(TO_HEX(MD5(${text})), 1, 15)) AS INT64) AS row_hash
  FROM (SELECT RANGE_BUCKET(${r}, @bounds) AS bucket, ${k} AS k, ${columns} FROM ${table} WHERE ${where})
  WHERE k NOT IN (SELECT left_out FROM UNNEST(@left_out) AS left_out)
) GROUP BY bucket`,
    rows: `SELECT ${k} AS k, ${columns} FROM ${table} WHERE ${where} AND RANGE_BUCKET(${r}, @bounds) IN UNNEST(@ranges)`,
  };
}

export function bigquerySide(to: Destination, layout: Layout, leftOut: string[], labels: Record<string, string>): Side {
  const { sums, rows } = bigqueryStatements(layout, address(to, to.table));
  const kind = layout.integer ? "INT64" : "STRING";
  const ask = async (
    query: string,
    { low, high }: Span,
    parameters: Record<string, string[]>,
    types: Record<string, string[]>,
  ) => {
    const [found] = await to.bigquery.query({
      query,
      params: { low: low ?? null, high: high ?? null, ...parameters },
      types: { low: kind, high: kind, ...types } as never,
      labels,
    });
    return found as Record<string, string>[];
  };
  return {
    sums: async (bounds, span) => {
      const found = await ask(sums, span, { bounds, left_out: leftOut }, { bounds: [kind], left_out: ["STRING"] });
      return new Map(
        found.map(({ bucket, n, high, low }) => [
          Number(bucket),
          { rows: Number(n), sum: BigInt(high ?? 0) * 2n ** 30n + BigInt(low ?? 0) },
        ]),
      );
    },
    rows: async (bounds, span, ranges) => {
      const parameters = { bounds, ranges: ranges.map(String) };
      const found = await ask(rows, span, parameters, { bounds: [kind], ranges: ["INT64"] });
      return found.map((row) => readable(row, layout));
    },
  };
}

/** @param settled the condition on a row r under which it is compared. */
export function clickhouseSide(client: ClickHouseClient, layout: Layout, table: string, settled: string): Side {
  const columns = layout.columns.map((column, index) => `${column.destination} AS c${index}`).join(", ");
  const k = keyAliases(layout).map(clickhouseLength).join(" || ");
  const hash = `bitShiftRight(reinterpretAsUInt64(reverse(substring(MD5(${aliases(layout).map(clickhouseLength).join(" || ")}), 1, 8))), 4)`;
  // roundDown finds its element by binary search; indexOf then counts from 1.
  const all = (bounds: string[]): string => `[${[-(2n ** 63n), ...bounds].join()}]::Array(Int64)`;
  const bucket = (bounds: string[]): string => (bounds.length ? `roundDown(r.id, ${all(bounds)})` : "toInt64(0)");
  const number = (bounds: string[], of: string): string => (bounds.length ? `indexOf(${all(bounds)}, ${of}) - 1` : of);
  const where = ({ low, high }: Span): string =>
    [settled, ...(low === undefined ? [] : [`r.id >= ${low}`]), ...(high === undefined ? [] : [`r.id < ${high}`])].join(
      " AND ",
    );
  return {
    sums: async (bounds, span) => {
      const found = await select<{ n: string; count: string; total: string }>(
        client,
        `SELECT toString(${number(bounds, "bucket")}) AS n, toString(count()) AS count, toString(sum(toUInt128(hash))) AS total
         FROM (SELECT bucket, ${hash} AS hash FROM (SELECT ${bucket(bounds)} AS bucket, ${columns} FROM ${table} AS r FINAL WHERE ${where(span)}))
         GROUP BY bucket`,
      );
      return new Map(found.map(({ n, count, total }) => [Number(n), { rows: Number(count), sum: BigInt(total) }]));
    },
    rows: async (bounds, span, ranges) => {
      const found = await select<Record<string, unknown>>(
        client,
        `SELECT ${k} AS k, * EXCEPT bucket FROM (SELECT ${bucket(bounds)} AS bucket, ${columns} FROM ${table} AS r FINAL WHERE ${where(span)})
         WHERE ${number(bounds, "bucket")} IN (${ranges.join()})`,
      );
      return found.map((row) => readable(row, layout));
    },
  };
}
