"""
local-bigquery, with three things of it made fast; what it does is the same.
- Query results expire after three minutes. Google's do after a day; here they are never deleted, each is a table, and each query looks
  through all tables: after a thousand queries that is half of its time.
- It looks for a table in duckdb_tables(), and for a column in duckdb_columns(), which ask for all there are: with fifty tables that is half
  of the rest.
- DuckDB looks for pandas on every folder of Python's path, for each statement anew.
"""

import sys
import threading
import time

sys.modules["pandas"] = None

import duckdb
from local_bigquery.catalog import tables
from local_bigquery.cli import main
from local_bigquery.engine import database

SECONDS = 180


def objects(project, dataset, table=None):
    if project == "emulator":
        try:
            database.execute(f"SELECT 1 FROM {database.quote(project, dataset, table)} LIMIT 0")
            return [(table, "TABLE", 0)]
        except duckdb.CatalogException:
            return []
    catalog = database.quote(f"__ducklake_metadata_{project}")
    return database.fetch(
        f"""
        SELECT table_name, 'TABLE', coalesce(record_count, 0) FROM {catalog}.ducklake_table t
        JOIN {catalog}.ducklake_schema s USING (schema_id) LEFT JOIN {catalog}.ducklake_table_stats USING (table_id)
        WHERE schema_name = $1 AND table_name = coalesce($2, table_name) AND t.end_snapshot IS NULL AND s.end_snapshot IS NULL
        UNION ALL
        SELECT view_name, 'VIEW', 0 FROM {catalog}.ducklake_view v JOIN {catalog}.ducklake_schema s USING (schema_id)
        WHERE schema_name = $1 AND view_name = coalesce($2, view_name) AND v.end_snapshot IS NULL AND s.end_snapshot IS NULL
        ORDER BY 1""",
        [dataset, table],
    )


database.objects = objects

fetch = database.fetch


def fetch_columns(sql, params=None):
    if "FROM duckdb_columns()" not in sql or params[0] == "emulator":
        return fetch(sql, params)
    project = params[0]
    catalog = database.quote(f"__ducklake_metadata_{project}")
    columns = f"""
        SELECT '{project}' AS database_name, schema_name, table_name, column_name, nulls_allowed AS is_nullable
        FROM {catalog}.ducklake_column c
        JOIN {catalog}.ducklake_table t USING (table_id) JOIN {catalog}.ducklake_schema s USING (schema_id)
        WHERE parent_column IS NULL AND c.end_snapshot IS NULL AND t.end_snapshot IS NULL AND s.end_snapshot IS NULL"""
    return fetch(sql.replace("duckdb_columns()", f"({columns})"), params)


database.fetch = fetch_columns


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
