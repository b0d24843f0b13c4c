/** What make status JSON=1 prints of a pipeline. */
export interface Status
  extends Record<"watermark" | "last_success" | "last_run" | "last_run_state" | "last_run_id", string | null>,
    Record<"last_error" | "lock" | "lock_since" | "held_by", string | null>,
    Record<"watermark_age_seconds" | "interval_seconds" | "last_success_age_seconds", number | null>,
    Record<"last_run_age_seconds" | "rows", number | null> {
  pipeline: string;
  state: "ok" | "new" | "warn" | "red";
  reasons: string[];
  last_run_by_hand: boolean | null;
  hold_seconds: number;
  days: (Record<"archived" | "failed" | "running", number> & Record<"first" | "last" | "at", string>) | null;
  sensors: Sensors | null;
}

interface Sensors
  extends Record<"lag" | "consumers" | "dead_letters" | "slot_retained_bytes" | "canary_age_seconds", number | null>,
    Record<"connector_running" | "slot_active", boolean | null> {
  topic: string;
  epoch: number;
  canary_gap: string | null;
}
