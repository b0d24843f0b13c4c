/**
 * Promises to switch off in the campaign's copy of the code, one at a time: it must find each.
 */
import type { Scratch } from "../lib/scratch.ts";

export const breaks: Record<string, { about: string; edit: (scratch: Scratch) => void }> = {
  bound: {
    about: "the safe bound: the clock alone, whatever transactions are open",
    edit: ({ edit }) => {
      edit("sql/safe_bound.sql", (sql) =>
        sql.replace("least(now() - lag, (select xact_start from oldest))", "(now() - lag)"),
      );
    },
  },
  guard: {
    about: "the MERGE's version guard: a row is replaced, whichever version is there",
    edit: ({ edit }) => {
      edit("shared/bigquery/load.ts", (code) =>
        code.replace(/const replaced = compared\n[^;]*;/, 'const replaced = "TRUE";'),
      );
    },
  },
  commit: {
    about: "commit-after-insert: the offsets are committed before the insert",
    edit: ({ edit }) => {
      const commit =
        "await commitOffsetsIfNecessary({ topics: [{ topic, partitions: [{ partition: batch.partition, offset: String(BigInt(batch.lastOffset()) + 1n) }] }] });";
      edit("shared/sensors/kafka.ts", (code) => code.replace("await work.batch(", `${commit} await work.batch(`));
    },
  },
  manifest: {
    about: "manifest-last: the manifest is put before its parts",
    edit: ({ edit }) => {
      const archive = (change: (code: string) => string) => edit("shared/events/archive.ts", change); // each of them must find its place
      archive((code) =>
        code.replace(
          /uploading = (put\(bucket, key, body, .+\));/,
          "late.push(() => $1); uploading = Promise.resolve(false);",
        ),
      );
      archive((code) =>
        code.replace(
          "  // An answer that got lost",
          "  for (const put of late.splice(0)) await put();\n  // An answer that got lost",
        ),
      );
      archive((code) => `${code}const late: (() => Promise<unknown>)[] = [];\n`);
    },
  },
};
