-- What a SELECT reads of its source table, and what makes that unfit as a source, each fault with what to do. The settings name the table
-- (with its schema), the cursor, the key's fields, what is expected (a JSON array of name and type), the file that says so, and what the
-- SELECT returns, as Postgres describes it: a JSON array of name, type's oid, table's oid and column's number; empty, it is the table's
-- columns of the expected names. Whether a column's type fits is for the caller to say. In psql:
--   set etl.source = 'public.orders'; set etl.source_cursor = 'updated_at'; set etl.source_key = 'id'; set etl.source_select = '';
--   set etl.source_fields = '[{"name": "id", "expected": "INTEGER"}]'; set etl.source_file = 'contract'; \i sql/source_checks.sql
with recursive expected as (
  select * from jsonb_to_recordset(current_setting('etl.source_fields')::jsonb) as e (name text, expected text)
), wanted as (
  select current_setting('etl.source') as name, current_setting('etl.source_cursor') as cursor, current_user as role,
    string_to_array(current_setting('etl.source_key'), ',') as key_fields,
    current_setting('etl.source_file') as file, array(select expected.name from expected) as fields,
    nullif(current_setting('etl.source_select'), '')::jsonb as selected
), hidden as (
  select nspname from wanted join pg_namespace on split_part(name, '.', 1) in (nspname, quote_ident(nspname))
  where not has_schema_privilege(oid, 'usage')
), named as (
  -- Without USAGE on its schema the name may not be looked up.
  select wanted.*, oid, relkind from wanted
  left join pg_class on oid = case when not exists (select from hidden) then to_regclass(name) end
), parts as (
  -- The table, its partitions, and what inherits from it.
  select oid, relkind, false as inherits from named where oid is not null
  union all
  select c.oid, c.relkind, not relispartition from parts join pg_inherits on inhparent = parts.oid join pg_class c on c.oid = inhrelid
), attributes as (
  select attname as column, attnum, coalesce(nullif(typbasetype, 0), atttypid) as atttypid, greatest(atttypmod, typtypmod) as atttypmod,
    format_type(atttypid, atttypmod) as declared, -- of a domain the others are those of the type that it is made of
    -- A NOT NULL that is NOT VALID (Postgres 18) says nothing of the rows before it.
    attnotnull and not exists (
      select from pg_constraint where conrelid = named.oid and contype = 'n' and not convalidated and attnum = any (conkey)) as not_null
  from named join pg_attribute on attrelid = named.oid join pg_type t on t.oid = atttypid where attnum > 0 and not attisdropped
), found as (
  -- What the SELECT returns. type: Postgres's name, or of an array that of its elements, without modifiers; enum for any enum.
  -- sql: the type as SQL writes it, such as integer[]; declared: with its modifiers, such as numeric(12,2).
  -- of: the column of the source's table that it is; null for an expression, and for another table's.
  select d.name, case coalesce(e.typtype, t.typtype) when 'e' then 'enum' else coalesce(e.typname, t.typname) end as type,
    e.oid is not null as array, format_type(t.oid, null) as sql, format_type(t.oid, atttypmod) as declared,
    coalesce(attnotnull, false) as notnull, case when attrelid = named.oid then attname::text end as of
  from named
  cross join jsonb_to_recordset(coalesce(selected, (
    select jsonb_agg(jsonb_build_object('name', a.column, 'type', atttypid, 'table', named.oid, 'number', attnum))
    from attributes a where a.column = any (fields)))) as d (name text, type oid, "table" oid, number int)
  join pg_type t on t.oid = d.type
  left join pg_type e on e.oid = t.typelem and t.typcategory = 'A'
  left join pg_attribute on attrelid = d."table" and attnum = d.number
), source as (
  -- The columns that are read, and those of the key.
  select named.*, array(select of from found where of is not null union select cursor) as columns,
    array(select coalesce(of, f.name) from found f where f.name = any (key_fields) order by array_position(key_fields, f.name)) as key
  from named
), cursor as (
  select name, attributes.* from source join attributes on attributes.column = cursor
), indexes as (
  select indexrelid::regclass::text as index, case when indpred is not null then 'partial' when not indisvalid then 'not valid'
      when not indimmediate then 'deferrable' when not indisunique then 'not unique' end as flaw
  from source join pg_index on indrelid = oid
  where indexprs is null and key @> (
    select array_agg(attributes.column::text) from attributes where attnum = any ((indkey::int2[])[0:indnkeyatts - 1]))
), faults (fault) as (
  select format('source table %s: role %s may not use its schema. Run as a superuser: grant usage on schema %I to %2$I;',
                name, role, nspname)
  from wanted, hidden
  union all
  select format('source table %s: there is no such table. Is SOURCE_DATABASE_URL the right database?', name)
  from source where oid is null and not exists (select from hidden)
  union all
  select format('source table %s: it is a view, whose rows have no key and no NOT NULL. '
                'Name the table behind it in the contract and in the SELECT', name)
  from source where relkind in ('v', 'm')
  union all
  select format('source table %s: %s is a foreign table: transactions that are open on its server cannot be seen from here, and their '
                'rows would be missed. Point SOURCE_DATABASE_URL at that server, or detach the foreign table', name, parts.oid::regclass)
  from source, parts where parts.relkind = 'f'
  union all
  select format('source table %s: subscription %s writes its rows: transactions that are open on the publisher cannot be seen from here, '
                'and their rows would be missed. Point SOURCE_DATABASE_URL at the publisher', name, subname)
  from source, parts join pg_subscription_rel on srrelid = parts.oid join pg_subscription s on s.oid = srsubid
  union all
  select format('source table %s: role %s may not read %s. Run as a superuser: grant select (%3$s) on %1$s to %2$I;',
                name, role, string_agg(quote_ident(a.column), ', '))
  from source, attributes a
  where a.column = any (columns) and not has_column_privilege(oid, attnum, 'select') group by name, role
  union all
  select format('source table %s: row-level security would hide rows from role %s. Run as a superuser: alter role %2$I bypassrls; '
                'or alter table %1$s disable row level security;', name, role)
  from source where row_security_active(oid)
  union all
  select format('column %s.%s: expected timestamptz, since it is the cursor, found %s%s', source.name, source.cursor,
                coalesce(declared, 'no such column'), case when atttypid = 'timestamp'::regtype then
                  format('. Run: alter table %s alter %I type timestamptz using %2$I at time zone ''UTC''; (or the zone it is written in)',
                         source.name, source.cursor) end)
  from source left join cursor on true where oid is not null and atttypid is distinct from 'timestamptz'::regtype
  union all
  select format('column %s.%s: expected microseconds, since it is the cursor and a time rounded down can lie before the watermark, '
                'found %s. Run: alter table %1$s alter %2$I type timestamptz;', name, cursor.column, declared)
  from cursor where atttypid = 'timestamptz'::regtype and atttypmod not in (-1, 6)
  union all
  select format('column %s.%s: expected NOT NULL, since it is %s, found a nullable column. Run: alter table %1$s alter %2$I set not null;',
                name, a.column,
                case when a.column = cursor then 'the cursor and a row without it would never be read' else 'part of the key' end)
  from source, attributes a where not not_null and relkind in ('r', 'p') and (a.column = cursor or a.column = any (key))
  union all
  select format('column %s.%s: expected %s (%s), found no such column', source.name, e.name, e.expected, file)
  from source, expected e where oid is not null and not exists (select from found where found.name = e.name)
  union all
  select format('column %s.%s: expected no such field (%s), found it in the SELECT', source.name, f.name, file)
  from source, found f where f.name <> all (fields)
  union all
  select format('column %s.%s: expected a column of this table, since rows are found by it, found something else in the SELECT',
                source.name, f.name)
  from source, found f where f.of is null and (f.name = cursor or f.name = any (key_fields))
  union all
  select format('source table %s: expected a unique index on its key (%s), found %s. '
                || coalesce((
              select 'A partitioned table''s has to hold ' || string_agg(attname, ', ') || ' too: make that part of the key in the contract'
              from pg_partitioned_table join pg_attribute on attrelid = partrelid and attnum = any (partattrs)
              where partrelid = oid and attname <> all (key)), 'Run: create unique index on %1$s (%2$s);'), name,
                (select string_agg(quote_ident(k), ', ') from unnest(key) k),
                coalesce((select string_agg(format('%s, which is %s', index, flaw), ', ') from indexes), 'none'))
  from source where relkind in ('r', 'p') and key <> '{}' and not exists (select from indexes where flaw is null)
  union all
  select format('source table %s: %s inherits from it, and no index makes the key unique over both. '
                'Read each table apart, or make it a partition', name, parts.oid::regclass)
  from source, parts where inherits and key <> '{}' and cursor <> all (key) -- with the cursor in it each may have its own time
)
select (select coalesce(json_agg(fault), '[]') from faults) as faults, (select coalesce(json_agg(found), '[]') from found) as found,
  array_to_json(key) as key_columns, (
    -- Columns of the table that are neither expected nor read.
    select coalesce(json_agg(a.column order by attnum), '[]') from attributes a
    where a.column <> all (fields) and a.column <> all (columns)) as unknown
from source;
