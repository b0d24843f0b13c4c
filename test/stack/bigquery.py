"""
local-bigquery, whose query results expire after three minutes. Google's do after a day; here they are never deleted, each is a table, and
each query looks through all tables: after a thousand queries that is half of its time.
"""

import threading
import time

from local_bigquery.catalog import tables
from local_bigquery.cli import main
from local_bigquery.engine import database

SECONDS = 180


def expire_results():
    while True:
        time.sleep(5)
        try:
            jobs = database.fetch(
                "SELECT project_id, job_id FROM emulator.jobs JOIN duckdb_tables() t ON t.table_name = project_id || ':' || job_id "
                "WHERE t.schema_name = ? AND state = 'DONE' AND creation_time < ?",
                [tables.RESULTS, int((time.time() - SECONDS) * 1000)],
            )
            for project, job in jobs:
                tables.delete(project, tables.RESULTS, job)
        except Exception as error:  # it goes on without
            print(f"results are not deleted: {error}", flush=True)


threading.Thread(target=expire_results, daemon=True).start()
main()
