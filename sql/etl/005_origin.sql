-- The history that a watermark belongs to: the server (system identifier and timeline), the database's oid, and the WAL position as a
-- number of 20 digits. Where the source has another, or its WAL ends earlier, it was restored, or failed over, and rows that were synced
-- may be gone there. Columns of the run's own history are no longer needed.
alter table etl.watermarks add column server text, add column database_oid text, add column wal text;
update etl.watermarks w set server = w.system_identifier || '/' || lpad(upper(to_hex(w.timeline)), 8, '0');
update etl.watermarks w
  set database_oid = r.source_database, wal = lpad((r.source_wal - '0/0')::text, 20, '0')
  from (select distinct on (pipeline) * from etl.runs where state = 'rewound' or source_wal is not null
        order by pipeline, started_at desc) r
  where r.pipeline = w.pipeline and r.source_server = w.server;
alter table etl.watermarks drop column system_identifier, drop column timeline, alter column server set not null;
alter table etl.runs drop column source_server, drop column source_database, drop column source_wal;
