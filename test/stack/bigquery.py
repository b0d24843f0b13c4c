"""
local-bigquery, with four things of it made fast; what it does is the same.
- Query results expire after three minutes. Google's do after a day; here they are never deleted, each is a table, and each query looks
  through all tables: after a thousand queries that is half of its time.
- It looks for a dataset in duckdb_schemas(), for a table in duckdb_tables() and for a column in duckdb_columns(), which ask for all there
  are: with fifty tables that is half of the rest.
- It asks each query's connection for its temporary tables, by a look through all tables. Only a session's has any.
- DuckDB looks for pandas on every folder of Python's path, for each statement anew.
"""

import contextlib
import sys
import threading
import time

sys.modules["pandas"] = None

import duckdb
from local_bigquery.catalog import tables
from local_bigquery.cli import main
from local_bigquery.engine import database
from local_bigquery.errors import BigQueryError
from local_bigquery.jobs import query

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

METADATA = {
    "duckdb_schemas()": """
        SELECT '{project}' AS database_name, schema_name FROM {catalog}.ducklake_schema WHERE end_snapshot IS NULL""",
    "duckdb_columns()": """
        SELECT '{project}' AS database_name, schema_name, table_name, column_name, nulls_allowed AS is_nullable
        FROM {catalog}.ducklake_column c
        JOIN {catalog}.ducklake_table t USING (table_id) JOIN {catalog}.ducklake_schema s USING (schema_id)
        WHERE parent_column IS NULL AND c.end_snapshot IS NULL AND t.end_snapshot IS NULL AND s.end_snapshot IS NULL""",
}
fetch = database.fetch


def fetch_metadata(sql, params=None):
    function = next((name for name in METADATA if f"FROM {name}" in sql), None)
    if function is None or params[0] == "emulator":
        return fetch(sql, params)
    catalog = database.quote(f"__ducklake_metadata_{params[0]}")
    rows = METADATA[function].format(project=params[0], catalog=catalog)
    try:
        return fetch(sql.replace(function, f"({rows})"), params)
    except duckdb.Error:  # there is no such project yet
        return fetch(sql, params)


database.fetch = fetch_metadata


execute = query.execute


class Fresh:
    def __init__(self, cursor):
        self._cursor = cursor

    def __getattr__(self, name):
        return getattr(self._cursor, name)

    def sql(self, text, **options):
        if text == "SELECT table_name FROM duckdb_tables() WHERE temporary":
            text = "SELECT '' WHERE false"
        return self._cursor.sql(text, **options)


def execute_query(cursor, *args, session=None, **options):
    cursor = cursor if session else Fresh(cursor)
    return execute(cursor, *args, session=session, **options)


query.execute = execute_query


def expire_results():
    done = 0
    # At first those that were left when it last ran; it keeps its jobs for ever, and nearly all of their results are gone.
    there = "AND project_id || ':' || job_id IN (SELECT table_name FROM duckdb_tables())"
    while True:
        time.sleep(5)
        until = int((time.time() - SECONDS) * 1000)
        try:
            jobs = fetch(
                "SELECT project_id, job_id FROM emulator.jobs WHERE state = 'DONE' AND creation_time >= ? AND creation_time < ? "
                + there,
                [done, until],
            )
            for project, job in jobs:
                with contextlib.suppress(BigQueryError):  # it has no result
                    tables.delete(project, tables.RESULTS, job)
            done, there = until, ""
        except Exception as error:  # it goes on without
            print(f"results are not deleted: {error}", flush=True)


threading.Thread(target=expire_results, daemon=True).start()
main()
