-- Which table the watermark was written to, by name and time of creation: in another one the rows before the watermark may be missing.
-- Null before the next run. A managed server may not say which server it is: null too, and not compared.
alter table etl.watermarks add column destination text, alter column server drop not null;
