-- What BigQuery billed the run's queries; 0 where it asks none. Loads and copies are free.
alter table etl.runs add column bytes_billed bigint not null default 0;
