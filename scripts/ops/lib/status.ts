/** What make status says of a pipeline; make status JSON=1 prints it. */
export const states = ["ok", "new", "warn", "red"] as const;
export type State = (typeof states)[number];

/** What schema etl knows of a pipeline: a row of sql/status.sql, which says what the keys mean. */
export type Known = Record<
  "watermark" | "last_success" | "last_run" | "last_run_state" | "last_run_id" | "last_error",
  string | null
> &
  Record<"watermark_age_seconds" | "last_success_age_seconds" | "last_run_age_seconds" | "rows", number | null> & {
    pipeline: string;
    last_run_by_hand: boolean | null;
    days: (Record<"archived" | "failed" | "running", number> & Record<"first" | "last" | "at", string>) | null;
  };

export type Status = Known & {
  state: State;
  /** Why it is not ok, the worst first. */
  reasons: string[];
  /** How often it is meant to succeed (ops/alerts.yml). */
  interval_seconds: number | null;
  /** Who holds the pipeline's lock now, a run's id or an application, and since when. */
  lock: string | null;
  lock_since: string | null;
  /** Who holds the watermark: an open transaction of the source, in words. */
  held_by: string | null;
  hold_seconds: number;
  sensors: Sensors | null;
};

/** Of a part that does not answer null, and a reason says why. */
type Sensors = Record<
  "lag" | "consumers" | "dead_letters" | "slot_retained_bytes" | "canary_age_seconds",
  number | null
> &
  Record<"connector_running" | "slot_active", boolean | null> & {
    topic: string;
    epoch: number;
    canary_gap: string | null;
  };
