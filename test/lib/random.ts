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
