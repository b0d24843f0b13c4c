"""make bench-peers: public.events to S3 as gzipped JSON lines, with dlt's fastest backend for it."""

import os

import dlt
from dlt.destinations import filesystem
from dlt.sources.sql_database import sql_table

credentials = {
    "aws_access_key_id": os.environ["AWS_ACCESS_KEY_ID"],
    "aws_secret_access_key": os.environ["AWS_SECRET_ACCESS_KEY"],
    "endpoint_url": os.environ["S3_ENDPOINT"],
    "region_name": os.environ["AWS_REGION"],
}
table = sql_table(
    credentials=os.environ["SOURCE"],
    table="events",
    schema="public",
    backend="connectorx",
    backend_kwargs={"return_type": "arrow"},
)
pipeline = dlt.pipeline(
    "events",
    destination=filesystem(bucket_url=os.environ["BUCKET_URL"], credentials=credentials),
    dataset_name="archive",
)
print(pipeline.run(table, loader_file_format="jsonl", write_disposition="append"))
