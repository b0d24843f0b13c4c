-- What makes a table unfit as a source, a row a fault, with what to do. $1: the table, with its schema; $2: its cursor column.
with source as (
  select to_regclass($1)::oid as oid, current_user as role
), cursor as (
  select attnotnull as not_null, atttypid = 'timestamptz'::regtype as fits, format_type(atttypid, atttypmod) as declared
  from source join pg_attribute on attrelid = oid
  where attname = $2 and attnum > 0 and not attisdropped
)
select format('source table %s: there is no such table, or it may not be seen. Is SOURCE_DATABASE_URL the right database?', $1) as fault
from source where oid is null
union all
select format('source table %s: role %s may not read it. Run as a superuser: grant select on %1$s to %2$s;', $1, role)
from source where not has_table_privilege(oid, 'select')
union all
select format('source table %s: row-level security would hide rows from role %s. Run as a superuser: alter role %2$s bypassrls; '
              'or alter table %1$s disable row level security;', $1, role)
from source where row_security_active(oid)
union all
select format('column %s.%s: expected timestamptz, since it is the cursor, found %s', $1, $2, coalesce(declared, 'no such column'))
from source left join cursor on true where oid is not null and fits is not true
union all
select format('column %s.%s: expected NOT NULL, since it is the cursor and a row without it would never be read, found a nullable column. '
              'Run: alter table %1$s alter %2$I set not null;', $1, $2)
from cursor where fits and not not_null
