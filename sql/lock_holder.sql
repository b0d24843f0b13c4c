-- Who holds the lock of the pipeline etl.pipeline, since when, and on which host; no row where it is free.
select coalesce(r.run_id, a.application_name) as holder, r.host, r.pid, a.pid as postgres_pid,
  replace(date_trunc('second', a.backend_start)::text, ' ', 'T') as since
from pg_locks l
join pg_stat_activity a on a.pid = l.pid
left join etl.runs r on a.application_name = 'etl:' || current_setting('etl.pipeline') || ' run=' || r.run_id
where l.locktype = 'advisory' and l.granted and l.objsubid = 1
  and l.database = (select oid from pg_database where datname = current_database())
  and (l.classid::bigint << 32) | l.objid::bigint = hashtextextended('etl:' || current_setting('etl.pipeline'), 0);
