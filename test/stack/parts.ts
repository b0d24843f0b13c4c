// The local stack: a part is one file and one line here.
import { bigquery } from "./bigquery.ts";
import { clickhouse } from "./clickhouse.ts";
import { connect } from "./connect.ts";
import { kafka } from "./kafka.ts";
import { postgres } from "./postgres.ts";
import { prometheus } from "./prometheus.ts";
import { pushgateway } from "./pushgateway.ts";
import { s3 } from "./s3.ts";
import type { Part } from "./stack.ts";

export const parts: Part[] = [postgres, bigquery, pushgateway, prometheus, s3, clickhouse, kafka, connect];
