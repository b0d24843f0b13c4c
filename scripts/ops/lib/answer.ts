/** Asking servers that may not answer, or not yet. */
import { setTimeout as delay } from "node:timers/promises";
import { explain } from "../../../shared/main.ts";

/** What `work` gives within so many seconds, or its error in words. */
export async function answer<T>(seconds: number, work: () => T | Promise<T>): Promise<{ value?: T; error?: string }> {
  const late = new Error(`no answer within ${seconds} s`);
  try {
    return { value: await Promise.race([work(), delay(seconds * 1000).then(() => Promise.reject(late))]) };
  } catch (error) {
    return { error: explain(error as Error) };
  }
}

/** Asks until `done` says so. @throws Error of `otherwise` after that time. */
export async function waitUntil(done: () => Promise<boolean>, seconds: number, otherwise: string): Promise<void> {
  for (const deadline = performance.now() + seconds * 1000; !(await done()); await delay(200))
    if (performance.now() > deadline) throw new Error(otherwise);
}
