#!/usr/bin/env -S npx tsx
/**
 * restore-events: puts archived events into etl.events_restored.
 *
 *   make restore-events FROM=2017-01-01 TO=2018-01-01     the days of [FROM, TO), each checked against its manifest
 *
 *   safe to re-run   yes: it replaces a day's rows in one transaction
 */
import { Readable } from "node:stream";
import { finished, pipeline } from "node:stream/promises";
import type { TransactionSql } from "postgres";
import { readEnv } from "../../shared/env.ts";
import { addDays, midnight, type Part } from "../../shared/events/archive.ts";
import type { Bucket } from "../../shared/events/s3.ts";
import { main } from "../../shared/main.ts";
import { dayVariables, eachDay, readDay, readPart } from "./lib/events.ts";

await main(import.meta, async () => {
  await eachDay("restore-events", "ETL_DATABASE_URL", readEnv(dayVariables), async (of) => {
    const { day, bucket, sql: etl } = of;
    const window = `FROM=${day} TO=${addDays(day)}`;
    const manifest = await readDay(of, async ({ parts }) => {
      await etl.begin(async (sql) => {
        await sql`lock table etl.events_restored in share row exclusive mode`; // another restore waits
        await sql`create temp table lines (line text) on commit drop`;
        for (const part of parts) await copyPart(bucket, part, sql);
        await replaceDay(sql, day);
      });
    }).catch((error: Error) => {
      if (error.name !== "NoSuchKey" && error.name !== "Damaged") throw error;
      throw new Error(`${error.message}. Nothing of ${day} was restored. Next: make verify-events ${window}`);
    });
    return { manifest, fault: manifest ? undefined : `is not archived. Next: make backfill-events ${window}` };
  });
});

async function copyPart(bucket: Bucket, part: Part, sql: TransactionSql): Promise<void> {
  const copy = await sql`copy lines from stdin (format csv, quote e'\\x01', delimiter e'\\x02')`.writable();
  try {
    await readPart(bucket, part, (lines) => pipeline(Readable.from(lines), copy));
  } catch (error) {
    copy.destroy(error as Error); // the transaction cannot be rolled back while the COPY waits for lines
    throw error;
  } finally {
    await finished(copy).catch(() => {});
  }
}

/** Puts the rows of `lines` in the place of the day's. */
async function replaceDay(sql: TransactionSql, day: string): Promise<void> {
  await sql`
    delete from etl.events_restored
    where created_at >= ${midnight(day)}::text::timestamptz and created_at < ${midnight(addDays(day))}::text::timestamptz`;
  const columns = await sql<{ name: string; type: string }[]>`
    select quote_ident(attname) as name, format_type(atttypid, null) as type from pg_attribute
    where attrelid = 'etl.events_restored'::regclass and attnum > 0 and not attisdropped order by attnum`;
  // jsonb_populate_record takes JSON's null for NULL.
  const values = columns.map(({ name, type }) => (type === "jsonb" ? `line -> '${name}'` : `r.${name}`));
  await sql.unsafe(
    `insert into etl.events_restored (${columns.map(({ name }) => name)}) select ${values}
     from (select line::jsonb as line from lines) l, jsonb_populate_record(null::etl.events_restored, line) r`,
  );
}
