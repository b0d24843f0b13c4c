-- What make new-pipeline and make new-column read of a table, by the catalogue only: the role may lack every grant on it. path and a
-- column's ident are names as SQL writes them; grants are those that the role lacks; a column's declaration, and created, make it at the
-- local stack, where an enum need not exist. Of a new pipeline, key are the columns of a unique, non-null, immediate index, the one that
-- was asked for, by default the primary key; and faults are why it cannot be synced by that and the cursor. In psql:
--   set etl.source = 'public.orders'; set etl.cursor = 'updated_at'; set etl.key = ''; \i sql/table.sql
with relation as (
  select c.oid, nspname, relname, n.oid as schema, format('%I.%I', nspname, relname) as path,
    obj_description(c.oid, 'pg_class') as comment
  from pg_class c join pg_namespace n on n.oid = relnamespace
  where current_setting('etl.source') in (nspname || '.' || relname, format('%I.%I', nspname, relname)) and relkind in ('r', 'p')
), described as (
  -- A domain arrives as the type that it is made of.
  select attname as name, quote_ident(attname) as ident,
    case coalesce(e.typtype, t.typtype) when 'e' then 'enum' else coalesce(e.typname, t.typname) end as type, e.oid is not null as array,
    format_type(t.oid, null) as sql, format_type(t.oid, case d.typtype when 'd' then d.typtypmod else atttypmod end) as declared,
    attnotnull as notnull, attname as of, col_description(attrelid, attnum) as comment, attnum
  from relation join pg_attribute on attrelid = oid and attnum > 0 and not attisdropped
  join pg_type d on d.oid = atttypid join pg_type t on t.oid = case d.typtype when 'd' then d.typbasetype else d.oid end
  left join pg_type e on e.oid = t.typelem and t.typcategory = 'A'
), columns as (
  select *, format('%s %s', ident, case type when 'enum' then 'text' else declared end) as declaration,
    case when "array" then 'REPEATED' when described.notnull then 'REQUIRED' else 'NULLABLE' end as mode
  from described
), keys as (
  select indexrelid, indisprimary, json_agg(attname order by position) as names
  from relation join pg_index on indrelid = oid
  cross join unnest(indkey[0 : indnkeyatts - 1]) with ordinality k (number, position)
  join pg_attribute on attrelid = indrelid and attnum = number
  where indisunique and indimmediate and indisvalid and indpred is null and indexprs is null
  group by indexrelid, indisprimary having bool_and(attnotnull)
), asked as (
  select path, coalesce(nullif(current_setting('etl.cursor', true), ''), 'updated_at') as cursor, (
    select names from keys where coalesce(current_setting('etl.key', true), '') = ''
      or (select array_agg(n order by n) from json_array_elements_text(names) n)
        = (select array_agg(n order by n) from unnest(string_to_array(current_setting('etl.key', true), ',')) n)
    order by indisprimary desc, indexrelid limit 1) as key
  from relation
), faults (fault) as (
  select format('it needs a key; it has %s. Run: alter table %s add primary key (…);', coalesce((select string_agg('KEY=' || (
    select string_agg(n, ',') from json_array_elements_text(names) n), ' or ') from keys), 'none that is unique and not null'), path)
  from asked where key is null
  union all
  select format('it needs a cursor: CURSOR=%s is %s. Run: alter table %s add column updated_at timestamptz not null default now();',
    cursor, coalesce('of type ' || declared, 'no column of it'), path)
  from asked left join columns on name = cursor where declared is distinct from 'timestamp with time zone'
  union all
  select format('its cursor may be NULL. Run: alter table %s alter column %s set not null;', path, ident)
  from asked join columns on name = cursor where declared = 'timestamp with time zone' and not columns.notnull
)
select path, comment,
  (select json_agg(columns order by attnum) from columns) as columns,
  (select format(E'create schema if not exists %I;\ncreate table if not exists %s (\n%s,\n  primary key (%s)\n);\n', nspname, path,
      (select string_agg(concat('  ', declaration, case when columns.notnull then ' not null' end), E',\n' order by attnum) from columns),
      (select string_agg(quote_ident(name), ', ') from json_array_elements_text(key) name))
      || format(E'create index if not exists %I on %s (%I);\n', relname || '_' || cursor, path, cursor) from asked) as created,
  (select coalesce(key, '[]') from asked) as key, (select coalesce(json_agg(fault), '[]') from faults) as faults,
  array_to_json(array_remove(array[
    case when not has_schema_privilege(schema, 'usage') then format('grant usage on schema %I to %I;', nspname, current_user) end,
    case when not has_table_privilege(oid, 'select') then format('grant select on %s to %I;', path, current_user) end], null)) as grants
from relation;
