"""
local-bigquery, with five things of it made fast; what it does is the same.
- A project is a DuckDB database, not a DuckLake: that reads its whole catalog again after each table that is made or dropped, which is
  30 ms of processor time for each.
- A job and its result expire after three minutes. Google's result does after a day; here each is a table, and both stay for ever, while
  each query looks through all tables, and each look at a job through all jobs.
- It looks for a table in duckdb_tables() and for its columns in duckdb_columns(), which list all there are.
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


def attach(con, project):
    con.execute(f"ATTACH IF NOT EXISTS '{database.settings.data_dir / project}.duckdb' AS {database.quote(project)}")
    database._attached.add(project)


database._attach = attach
database.projects = lambda: sorted(database._attached)

objects = database.objects


def objects_named(project, dataset, table=None):
    if table is None:
        return objects(project, dataset)
    try:
        # A view has no rowid.
        [(rows,)] = fetch(f"SELECT count(*) FROM (SELECT rowid FROM {database.quote(project, dataset, table)})")
        return [(table, "TABLE", rows)]
    except duckdb.CatalogException:
        return []
    except duckdb.BinderException:
        return [(table, "VIEW", 0)]


database.objects = objects_named

COLUMNS = "duckdb_columns() WHERE database_name = ? AND schema_name = ? AND table_name = ?"
fetch = database.fetch


def fetch_described(sql, params=None):
    if COLUMNS not in sql:
        return fetch(sql, params)
    described = f"""(SELECT column_name, "null" = 'YES' AS is_nullable FROM (DESCRIBE {database.quote(*params[:3])})) WHERE true"""
    try:
        return fetch(sql.replace(COLUMNS, described), params[3:])
    except duckdb.CatalogException:
        return []


database.fetch = fetch_described


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


def expire_jobs():
    while True:
        time.sleep(5)
        old = ["DONE", int((time.time() - SECONDS) * 1000)]
        try:
            for project, job in fetch("SELECT project_id, job_id FROM emulator.jobs WHERE state = ? AND creation_time < ?", old):
                with contextlib.suppress(BigQueryError):  # it has no result
                    tables.delete(project, tables.RESULTS, job)
            database.execute("DELETE FROM emulator.jobs WHERE state = ? AND creation_time < ?", old)
        except Exception as error:  # it goes on without
            print(f"old jobs are not deleted: {error}", flush=True)


threading.Thread(target=expire_jobs, daemon=True).start()
main()
