/** Randomness that a seed repeats: fast-check's generator, of which these are the numbers. */
import fc from "fast-check";

/** 1 where nothing else is given, and in make test; make soak gives another one each time (test/run.ts). */
export const seed = Number(process.env.SEED ?? 1);

/** Whole numbers of [0, below), the same for the same seed. */
export function random(of = seed): (below: number) => number {
  const endless = fc.infiniteStream(fc.maxSafeNat(), { noHistory: true });
  const [numbers] = fc.sample(endless, { seed: of, numRuns: 1, unbiased: true });
  return (below) => (numbers?.next().value ?? 0) % below;
}

// Functions, since the first text takes fast-check most of a second, and most who read this file need numbers only.
/** Texts and JSON that Postgres takes. JSON is an array or an object (see jsons in texts.ts). */
export const anyText = () => fc.string({ unit: "binary", maxLength: 25 }).map((value) => value.replaceAll("\0", "\u0001"));
export function anyJson() {
  const anyValue = fc.jsonValue({ stringUnit: "binary" });
  const anyThing = fc.oneof(fc.array(anyValue), fc.dictionary(anyText(), anyValue));
  return anyThing.map((value) => JSON.stringify(value).replaceAll("\\u0000", "\\u0002"));
}
