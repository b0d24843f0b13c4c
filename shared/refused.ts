/** A row that the source or the destination refuses, for whatever reason, is named by its key. */
import { SourceError } from "./copy.ts";
import type { Run } from "./run.ts";
import { queryWith, quote } from "./session.ts";
import { rowName } from "./source.ts";

/** Whether the source or BigQuery refuses a value: reading it again does not help, and naming the row does. */
export function isRefusal(error: unknown): boolean {
  const { cause, errors } = error as { cause?: Error & { code?: string }; errors?: { reason?: string }[] };
  // Postgres's data exceptions and program limits; not those that name the row already.
  if (error instanceof SourceError) return /^(22|54)/.test(cause?.code ?? "") && !/etl refuses/.test(cause?.message ?? "");
  return errors?.some(({ reason }) => reason === "invalid") ?? false;
}

/**
 * Reads rows again in halves, in the order of their keys, until one is left: log2(n) steps.
 * @param settings what the SELECT reads, for example etl.from and etl.to.
 * @param load loads the rows of a SELECT.
 * @returns the error that names the row by its key; reading it again would not help.
 */
export async function nameRefused(
  run: Run,
  key: string[],
  select: string,
  settings: Record<string, string>,
  load: (select: string) => Promise<unknown>,
): Promise<Error> {
  const ask = async (value: string, rows: string): Promise<string | undefined> =>
    (await queryWith<{ value: string }>(run.source, settings, `select ${value} as value from (${rows}) q`))[0]?.value;
  const part = (first: number, rows: number): string =>
    `select * from (${select}) q order by ${key.map(quote).join(", ")} offset ${first} limit ${rows}`;
  const refusal = (rows: string): Promise<Error | undefined> =>
    load(rows).then(
      () => undefined,
      (error: Error) => (isRefusal(error) ? error : Promise.reject(error)),
    );
  let [first, count] = [0, Number(await ask("count(*)", select))];
  run.log("refused", { rows: count, because: "a row is refused; reading them again in halves to name it" });
  while (count > 1) {
    const half = Math.ceil(count / 2);
    [first, count] = (await refusal(part(first, half))) ? [first, half] : [first + half, count - half];
  }
  const refused = await refusal(part(first, 1));
  const row = await ask(rowName(key), part(first, 1));
  const why = refused ? `is refused: ${refused.message}. Correct it at the source` : "was refused, and no longer is";
  return new SourceError(`row ${row} of ${run.pipeline} ${why}, then: make ${run.pipeline}`);
}
