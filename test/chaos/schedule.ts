/**
 * Which fault hits what, and when: all of it follows from the seed, so that a failing seed replays the same schedule.
 */
import { random } from "../lib/random.ts";
import { type LinkName, linkNames, type ServerName, servers } from "./stack.ts";

const jobs = ["orders", "users", "events", "sensors", "views"] as const;
export type Job = (typeof jobs)[number];

/** What each kind may hit. */
const targets = {
  "kill script": jobs,
  "late merge": ["orders", "users"],
  "kill server": servers,
  "restart connector": ["connect"],
  "freeze script": jobs,
  "freeze server": servers,
  "cut connections": linkNames,
  latency: linkNames,
  stall: linkNames,
  "double fire": ["orders", "users", "events", "views"],
  "pushgateway outage": ["pushgateway"],
  "disk full": ["s3"],
} as const satisfies Record<string, readonly (Job | ServerName | LinkName)[]>;
export type Kind = keyof typeof targets;
export const kinds = Object.keys(targets) as Kind[];

export interface Fault {
  /** Seconds from the campaign's begin. */
  at: number;
  kind: Kind;
  target: Job | ServerName | LinkName;
  /** How long it lasts, where it does: down, frozen, slow, full. */
  seconds: number;
  /** Of a script: so long after it is seen to run. */
  after: number;
  /** Milliseconds a piece. */
  latency: number;
  /** Of a script that is killed: at the so-manieth write that its destination is asked for. */
  writes: number;
  /**
   * It takes something with it: of a frozen script its session with the metadata database, and so its lock; of a server a script that uses
   * it; of a killed script what it had sent, which arrives later, after what others send meanwhile.
   */
  both: boolean;
}

/** Each kind as often as the others: decks of all of them, shuffled. One fault in about 1.5 s. */
export function createSchedule(seed: number, seconds: number): Fault[] {
  const below = random(seed);
  const faults: Fault[] = [];
  let deck: Kind[] = [];
  for (let at = 1; at < seconds - 1; at += (500 + below(2000)) / 1000) {
    if (!deck.length) deck = [...kinds];
    const [kind] = deck.splice(below(deck.length), 1) as [Kind];
    faults.push({
      at,
      kind,
      target: targets[kind][below(targets[kind].length)] as Fault["target"],
      seconds: (kind === "pushgateway outage" ? 5 : kind === "freeze script" ? 3 : 0.5) + below(5000) / 1000,
      after: below(1500) / 1000,
      latency: 10 + below(200),
      writes: 1 + below(4),
      both: below(2) === 0,
    });
  }
  return faults;
}
