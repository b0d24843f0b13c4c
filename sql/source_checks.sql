-- What makes a table unfit as a source, a row a fault, with what to do. The settings etl.source (with its schema) and etl.source_cursor say which. In psql:
--   set etl.source = 'public.orders'; set etl.source_cursor = 'updated_at'; \i sql/source_checks.sql
with asked as (
  select current_setting('etl.source') as name, current_setting('etl.source_cursor') as cursor
), source as (
  select name, cursor, to_regclass(name)::oid as oid, current_user as role from asked
), cursor as (
  select name, cursor, attnotnull as not_null, atttypid = 'timestamptz'::regtype as fits, format_type(atttypid, atttypmod) as declared
  from source join pg_attribute on attrelid = oid
  where attname = cursor and attnum > 0 and not attisdropped
)
select format('source table %s: there is no such table, or it may not be seen. Is SOURCE_DATABASE_URL the right database?', name) as fault
from source where oid is null
union all
select format('source table %s: role %s may not read it. Run as a superuser: grant select on %1$s to %2$s;', name, role)
from source where not has_table_privilege(oid, 'select')
union all
select format('source table %s: row-level security would hide rows from role %s. Run as a superuser: alter role %2$s bypassrls; '
              'or alter table %1$s disable row level security;', name, role)
from source where row_security_active(oid)
union all
select format('column %s.%s: expected timestamptz, since it is the cursor, found %s', source.name, source.cursor, coalesce(declared, 'no such column'))
from source left join cursor on true where oid is not null and fits is not true
union all
select format('column %s.%s: expected NOT NULL, since it is the cursor and a row without it would never be read, found a nullable column. '
              'Run: alter table %1$s alter %2$I set not null;', name, cursor)
from cursor where fits and not not_null
