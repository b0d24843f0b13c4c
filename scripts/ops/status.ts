/**
 * status: where each pipeline is. Reads schema etl and the source's open transactions, and changes nothing.
 *
 *   make status          a table
 *   make status JSON=1   the same for programs: an array of objects on stdout; times in UTC, ages in seconds
 */
import { readEnv } from "../../shared/env.ts";
import { checkSession, connect } from "../../shared/postgres.ts";
import { duration, table, thousands } from "../../shared/progress.ts";
import { main } from "../../shared/run.ts";
import { watermarked } from "../../shared/schema.ts";
import { checkVisible, readBound } from "../../shared/watermark.ts";

interface Status {
  pipeline: string;
  watermark: string | null;
  watermark_age_seconds: number | null;
  last_success: string | null;
  last_success_age_seconds: number | null;
  last_run: string | null;
  last_run_age_seconds: number | null;
  last_run_state: string | null;
  last_error: string | null;
  /** Of the last successful run. */
  rows: number | null;
  held_by: string | null;
  hold_seconds: number;
}

await main(import.meta, async () => {
  const env = readEnv("SOURCE_DATABASE_URL", "ETL_DATABASE_URL", "WATERMARK_LAG_SECONDS", "JSON");
  const session = { application: "etl:status", timeoutSeconds: 30 };
  const etl = connect(env.ETL_DATABASE_URL, session);
  const settings = { "etl.lag_seconds": String(env.WATERMARK_LAG_SECONDS) };
  const source = connect(env.SOURCE_DATABASE_URL, { ...session, settings });
  await checkSession("ETL_DATABASE_URL", etl);

  // The metadata is worth showing also when the source is down; that is when people look.
  const holder = await checkSession("SOURCE_DATABASE_URL", source)
    .then(() => readBound(source))
    .then((bound) => {
      checkVisible(bound);
      return { held_by: bound.prepared ?? bound.holder, hold_seconds: bound.hold_seconds };
    })
    .catch((error: Error) => ({ held_by: `unknown: ${error.message}`, hold_seconds: 0 }));
  const rows = await etl<Status[]>`
    select p.pipeline,
      replace(w.watermark::text, ' ', 'T') as watermark,
      extract(epoch from now() - w.watermark)::float8 as watermark_age_seconds,
      replace(date_trunc('second', ok.finished_at)::text, ' ', 'T') as last_success,
      extract(epoch from now() - ok.finished_at)::float8 as last_success_age_seconds,
      replace(date_trunc('second', last.started_at)::text, ' ', 'T') as last_run,
      extract(epoch from now() - last.started_at)::float8 as last_run_age_seconds,
      last.state as last_run_state, last.error as last_error, ok.rows::float8 as rows
    from unnest(${`{${[...watermarked(), "views"].join()}}`}::text::text[]) p (pipeline)
    left join etl.watermarks w using (pipeline)
    left join lateral (select * from etl.runs r where r.pipeline = p.pipeline and r.state = 'succeeded'
                       order by started_at desc limit 1) ok on true
    left join lateral (select * from etl.runs r where r.pipeline = p.pipeline and r.state <> 'rewound'
                       order by started_at desc limit 1) last on true
    order by p.pipeline`;
  const all = rows.map((row) => ({ ...row, ...holder }));

  if (env.JSON) process.stdout.write(`${JSON.stringify(all, null, 2)}\n`);
  else {
    const ago = (seconds: number | null): string => (seconds === null ? "never" : `${duration(seconds)} ago`);
    const shown = all.map((row) => ({
      pipeline: row.pipeline,
      watermark: row.watermark ?? "none",
      age: row.watermark_age_seconds === null ? "-" : duration(row.watermark_age_seconds),
      "last success": ago(row.last_success_age_seconds),
      "last run": row.last_run_state ? `${row.last_run_state} ${ago(row.last_run_age_seconds)}` : "never",
      rows: row.rows === null ? "-" : thousands(row.rows),
      "held by": row.held_by ?? "nobody",
    }));
    process.stdout.write(`${table(shown)}\n`);
    for (const { pipeline, last_run_state, last_error } of all) {
      if (last_run_state === "failed") process.stdout.write(`\n${pipeline} failed: ${last_error}\n`);
    }
  }
  await Promise.all([etl.end(), source.end({ timeout: 1 })]);
});
