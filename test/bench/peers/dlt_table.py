"""make bench-page, bench-peers, bench-lossless: one table of Postgres with dlt, as the environment says.

SOURCE, TABLE; TARGET is the URL of a Postgres or of a bucket or folder; to a Postgres, BACKEND and LOADER unset are dlt's
defaults, and rows are merged by id with an incremental cursor on updated_at, LAG= seconds back.
"""

import os

import dlt
from dlt.destinations import filesystem, postgres
from dlt.sources.sql_database import sql_table

env = os.environ
to_postgres = env["TARGET"].startswith("postgresql:")
options = {}
if to_postgres:
    lag = {"lag": float(env["LAG"])} if env.get("LAG") else {}
    options["incremental"] = dlt.sources.incremental("updated_at", **lag)
if env.get("BACKEND"):
    options["backend"] = env["BACKEND"]
    options["backend_kwargs"] = {"return_type": "arrow"} if env["BACKEND"] == "connectorx" else {}
table = sql_table(credentials=env["SOURCE"], table=env["TABLE"], schema="public", **options)

if to_postgres:
    table.apply_hints(primary_key="id")
    destination = postgres(env["TARGET"])
    how = {"write_disposition": "merge", "loader_file_format": env.get("LOADER") or None}
else:
    credentials = {
        "aws_access_key_id": env.get("AWS_ACCESS_KEY_ID"),
        "aws_secret_access_key": env.get("AWS_SECRET_ACCESS_KEY"),
        "endpoint_url": env.get("S3_ENDPOINT"),
        "region_name": env.get("AWS_REGION"),
    }
    in_bucket = {"credentials": credentials} if env["TARGET"].startswith("s3:") else {}
    destination = filesystem(bucket_url=env["TARGET"], **in_bucket)
    how = {"write_disposition": "append", "loader_file_format": "jsonl"}

pipeline = dlt.pipeline(
    env["TABLE"],
    destination=destination,
    dataset_name=env["DATASET"],
    pipelines_dir=os.path.join(env["HOME"], "pipelines"),  # as root it would be one folder for all of them
)
pipeline.run(table, **how)
print("delivered", pipeline.last_trace.last_normalize_info.row_counts.get(env["TABLE"], 0))
