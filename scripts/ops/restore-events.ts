#!/usr/bin/env -S npx tsx
/**
 * restore-events: puts archived events into etl.events_restored.
 *
 *   make restore-events FROM=2017-01-01 TO=2018-01-01     the days of [FROM, TO), each checked against its manifest
 *
 *   safe to re-run   yes: it replaces a day's rows in one transaction
 */
import { pipeline } from "node:stream/promises";
import type { Sql } from "postgres";
import { readEnv } from "../../shared/env.ts";
import { addDays, midnight } from "../../shared/events/archive.ts";
import { main } from "../../shared/main.ts";
import { checkSession, connect, quote } from "../../shared/session.ts";
import { dayVariables, eachDay, openReading, readDay, readDays, readPart } from "./lib/events.ts";

await main(import.meta, async () => {
  const env = readEnv(dayVariables);
  const days = readDays(env, "restore-events");
  const reading = await openReading("restore-events", env);
  const { bucket } = reading;
  await using etl = connect(env.ETL_DATABASE_URL, reading.session);
  await checkSession("ETL_DATABASE_URL", etl);
  await eachDay(reading, days, async (day) => {
    const window = `FROM=${day} TO=${addDays(day)}`;
    const manifest = await readDay(bucket, day, async ({ parts }) => {
      // 1. The day's lines into a table of this session: nothing is restored before all of them are checked.
      await etl`drop table if exists lines`;
      await etl`create temp table lines (line text)`;
      for (const part of parts) {
        const copy = await etl`copy lines from stdin (format csv, quote e'\\x01', delimiter e'\\x02')`.writable();
        await pipeline(readPart(bucket, part), copy);
      }
      // 2. Those in the place of the day's rows.
      await replaceDay(etl, day);
    }).catch((error: Error) => {
      if (error.name !== "Damaged") throw error;
      throw new Error(`${error.message}. Nothing of ${day} was restored. Next: make verify-events ${window}`);
    });
    if (!manifest) throw new Error(`is not archived. Next: make backfill-events ${window}`);
    return manifest;
  });
});

/**
 * Puts the rows of `lines` in the place of the day's.
 * @throws Error that names a row that was restored with another day, or a column that the day's rows were archived without.
 */
async function replaceDay(etl: Sql, day: string): Promise<void> {
  const columns = await etl<{ name: string; type: string }[]>`
    select quote_ident(attname) as name, format_type(atttypid, null) as type from pg_attribute
    where attrelid = 'etl.events_restored'::regclass and attnum > 0 and not attisdropped order by attnum`;
  // jsonb_populate_record takes JSON's null for NULL.
  const values = columns.map(({ name, type }) => (type === "jsonb" ? `line -> '${name}'` : `r.${name}`));
  const [from, to] = [midnight(day), midnight(addDays(day))];
  const replaced = etl.begin(async (sql) => {
    await sql`lock table etl.events_restored in share row exclusive mode`; // another restore waits
    await sql`
      delete from etl.events_restored
      where created_at >= ${from}::text::timestamptz and created_at < ${to}::text::timestamptz`;
    await sql.unsafe(
      `insert into etl.events_restored (${columns.map(({ name }) => name)}) select ${values}
       from (select line::jsonb as line from lines) l, jsonb_populate_record(null::etl.events_restored, line) r`,
    );
  });
  await replaced.catch(async (error: Error & { code?: string; column_name?: string }) => {
    const column = quote(error.column_name ?? "");
    if (error.code === "23502")
      // not_null_violation
      throw new Error(
        `its rows were archived without column ${column}, which is NOT NULL in etl.events_restored. Run: alter table ` +
          `etl.events_restored alter ${column} drop not null; then: make restore-events FROM=${day} TO=${addDays(day)}`,
      );
    if (error.code !== "23505") throw error; // unique_violation
    const [moved] = await etl<{ id: string; other: string }[]>`
      select id::text, created_at::date::text as other from etl.events_restored
      where id in (select (line::jsonb ->> 'id')::bigint from lines)
        and (created_at < ${from}::text::timestamptz or created_at >= ${to}::text::timestamptz) limit 1`;
    if (!moved) throw error;
    const verify = [moved.other, day].map((each) => `make verify-events FROM=${each} TO=${addDays(each)}`);
    throw new Error(
      `row id=${moved.id} is restored with ${moved.other} already: its created_at changed between the two archives. ` +
        `Next: ${verify.join("; ")}. Archive again the day that differs, as that says, and restore both`,
    );
  });
}
