/**
 * Makes a database a source like the shop's: the tables of schema.sql, and the roles of sql/roles.sql with the
 * passwords that the URLs of the environment hold. `make up` does it to the local stack's, the tests to theirs.
 */
import { readFileSync } from "node:fs";
import { join } from "node:path";
import postgres, { type Sql } from "postgres";
import { type Env, root } from "../stack/env.ts";
import { say } from "../stack/stack.ts";
import { loadData, openSource } from "./load.ts";

/** What makes a database a source. */
export const sourceFiles = ["test/data/schema.sql", "sql/source.sql", "sql/roles.sql", "sql/replication.sql"];

/** Safe to repeat. `adminUrl` is a superuser's; `roleUrls` are the URLs whose roles get the passwords in them. */
export async function createSource(adminUrl: string, roleUrls: string[]): Promise<void> {
  const sql = postgres(adminUrl, { max: 1, onnotice: () => {} });
  try {
    for (const file of sourceFiles) await execute(sql, file);
    for (const url of roleUrls) {
      const { username, password } = new URL(url);
      const [statement] = await sql<{ text: string }[]>`
        select format('alter role %I password %L', ${username}::text, ${decodeURIComponent(password)}::text) as text`;
      await sql.unsafe(statement?.text ?? "");
    }
  } finally {
    await sql.end();
  }
}

/** That of a stack, with the passwords of its URLs. */
export const createStackSource = (env: Env): Promise<void> =>
  createSource(
    env.STACK_ADMIN_DATABASE_URL ?? "",
    [env.SOURCE_DATABASE_URL, env.ETL_DATABASE_URL, env.REPLICATION_DATABASE_URL].map((url) => url ?? ""),
  );

/** Roles belong to the whole server: two that alter them at once, for two databases, fail with "tuple concurrently updated". */
async function execute(sql: Sql, file: string, tries = 10): Promise<void> {
  await sql.unsafe(readFileSync(join(root, file), "utf8")).catch((error: Error) => {
    if (tries === 0 || error.message !== "tuple concurrently updated") throw error;
    return execute(sql, file, tries - 1);
  });
}

/** Loads the real data into a source that is new, so without orders; `make data` completes one whose load was cut off. */
export async function fillSource(adminUrl: string): Promise<void> {
  const sql = openSource(adminUrl);
  const [orders] = await sql`select exists (select from public.orders) as any`;
  await sql.end();
  if (!orders?.any) await loadData(adminUrl, { log: say });
}
