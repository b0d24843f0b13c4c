"""
local-bigquery, with eleven things of it made fast. What it does is the same, but that it forgets its jobs and their results when it ends.
- A project is a DuckDB database, not a DuckLake: that reads its whole catalog again after each table that is made or dropped, which is
  30 ms of processor time for each.
- A job and its result expire after three minutes. Google's result does after a day; here each is a table, and both stay for ever, while
  each query looks through all tables, and each look at a job through all jobs.
- Jobs and results are in memory, not in a file: a query writes its job three times, and its result.
- What it knows of datasets and tables is read from its file once, and then kept; what is written goes to both.
- It looks for a table in duckdb_tables() and for its columns in duckdb_columns(), which list all there are.
- It asks each query's connection for its temporary tables, by a look through all tables. Only a session's has any.
- Each statement asks the file for all row access policies, and each of its tables for a column that only a table partitioned by ingestion
  time has, and none here is.
- DuckDB looks for pandas on every folder of Python's path, for each statement anew.
- A MERGE is one of DuckDB's, not ten statements. That one would not refuse two source rows for one of the target: this is asked before.
- The parts of an upload are cut at their boundary, not read as an e-mail, line by line.
- DuckDB uses one thread: to share out a few rows costs more than to read them. No line is logged for each request.

And five things done as Google's BigQuery does them:
- A connection stays open for longer than five seconds without a request.
- A copy brings descriptions, policy tags, partitioning and clustering, and removes the row access policies of what it replaces.
- A query with WRITE_TRUNCATE_DATA replaces the rows only, and with ALLOW_FIELD_ADDITION adds columns.
- A query counts what it is billed: the size of the tables that it names, at least 10 MiB each. One that would be billed more than its
  maximumBytesBilled is refused before it runs.
- The table that a CREATE TABLE makes is not among its referencedTables.
"""

import contextlib
import functools
import sys
import threading
import time

sys.modules["pandas"] = None

import duckdb
import uvicorn
from local_bigquery.api import uploads
from local_bigquery.catalog import metadata, names, row_access, tables
from local_bigquery.cli import main
from local_bigquery.engine import database, results
from local_bigquery.errors import BigQueryError
from local_bigquery.jobs import copy, merge, query, runner, store
from local_bigquery.models import JobStatistics2, RowAccessPolicy, Table
from local_bigquery.sql.dialect import DuckDBDialect
from local_bigquery.sql.rules import partitions
from local_bigquery.sql.translate import translate
from sqlglot import exp, parse_one

SECONDS = 180


def attach(con, project):
    con.execute("SET threads = 1")
    con.execute(f"ATTACH IF NOT EXISTS ':memory:' AS results; CREATE SCHEMA IF NOT EXISTS results.{tables.RESULTS}")
    con.execute(f"ATTACH IF NOT EXISTS '{database.settings.data_dir / project}.duckdb' AS {database.quote(project)}")
    database._attached.add(project)


database._attach = attach
database.projects = lambda: sorted(database._attached)

fetch, objects = database.fetch, database.objects


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

save_metadata, delete_metadata = metadata.save, metadata.delete
resources = {}


def kept(model):
    """What the file has of a kind, by key."""
    if model not in resources:
        kind = metadata.KINDS[model]
        rows = fetch(f"SELECT {', '.join(database.RESOURCES[kind])}, resource FROM emulator.{kind}")
        resources.setdefault(model, {tuple(keys): model.model_validate_json(resource) for *keys, resource in rows})
    return resources[model]


def list_resources(model, *keys):
    if len(keys) == len(database.RESOURCES[metadata.KINDS[model]]):
        return [kept(model)[keys]] if keys in kept(model) else []
    return [resource for of, resource in list(kept(model).items()) if of[: len(keys)] == keys]


def save_resource(resource, *keys):
    saved = kept(type(resource))[keys] = save_metadata(resource, *keys)
    return saved


def delete_resources(model, *keys):
    gone = [of for of in list(kept(model)) if of[: len(keys)] == keys]
    if gone:
        delete_metadata(model, *keys)
    for of in gone:
        kept(model).pop(of, None)


metadata.list_, metadata.save, metadata.delete = list_resources, save_resource, delete_resources
row_access.secured = lambda: frozenset(of[:3] for of in kept(RowAccessPolicy))
partitions._hidden = lambda table: False

COLUMNS = "duckdb_columns() WHERE database_name = ? AND schema_name = ? AND table_name = ?"


def fetch_described(sql, params=None):
    if COLUMNS not in sql:
        return fetch(sql, params)
    described = f"""(SELECT column_name, "null" = 'YES' AS is_nullable FROM (DESCRIBE {database.quote(*params[:3])})) WHERE true"""
    try:
        return fetch(sql.replace(COLUMNS, described), params[3:])
    except duckdb.CatalogException:
        return []


database.fetch = fetch_described


physical = tables.physical


def physical_result(project, dataset, table):
    if dataset == tables.RESULTS:
        return "results", dataset, f"{project}:{table}"
    return physical(project, dataset, table)


tables.physical = physical_result


jobs = {}


def save(job):
    jobs[job.jobReference.projectId, job.jobReference.jobId] = job
    return job


def list_jobs(project, states=None, parent=None, least=None, most=None):
    def is_asked_for(job):
        created = int(job.statistics.creationTime)
        return (
            job.jobReference.projectId == project
            and job.statistics.parentJobId == parent
            and (states is None or job.status.state in states)
            and (least is None or created >= least)
            and (most is None or created <= most)
        )

    newest_first = sorted(list(jobs.values()), key=lambda job: (-int(job.statistics.creationTime), job.jobReference.jobId))
    return [job for job in newest_first if is_asked_for(job)]


store.save = save
store.load = lambda project, job: jobs.get((project, job))
store.list_ = list_jobs
store.delete = lambda project, job: jobs.pop((project, job), None)

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


def upload_parts(content_type, payload):
    boundary = content_type.rpartition("boundary=")[2].strip('"').encode()
    job, data = (part.partition(b"\r\n\r\n")[2].removesuffix(b"\r\n") for part in payload.split(b"--" + boundary)[1:-1])
    return uploads._job(job), data


uploads._parts = upload_parts

write = tables.write


def write_data(cur, sql, params, reference, config, *args, **options):
    if config.writeDisposition != "WRITE_TRUNCATE_DATA":
        return write(cur, sql, params, reference, config, *args, **options)
    with database.writing(*reference):
        cur.begin()
        try:
            tables.evolve(cur, reference, cur.sql(sql, params=params), config.schemaUpdateOptions, "Invalid schema update. ")
            cur.execute(f"DELETE FROM {tables.name(*reference)}")
            results.materialise(cur, sql, tables.name(*reference), params, append=True)
            cur.commit()
        except BaseException:
            cur.rollback()
            raise
    return False


tables.write = write_data


def copy_whole(cur, config, upload):
    copied = copy.run(cur, config, upload)
    if config.writeDisposition == "WRITE_TRUNCATE":
        source, destination = tables.reference(config.sourceTable), tables.reference(config.destinationTable)
        parts = ("schema", "description", *tables.LAYOUT)
        stored = metadata.load(Table, *destination) or tables.defaults(*destination)
        tables.record(*destination, stored.without(*parts).merged(tables.load(*source).only(*parts)))
        row_access.delete(*destination)
    return copied


runner.HANDLERS["copy"] = copy_whole


def merge_at_once(cur, tree, context):
    sql, bound = translate(tree, context)
    merged = parse_one(sql, dialect=DuckDBDialect)
    target, source, on = (part.sql(dialect=DuckDBDialect) for part in (merged.this, merged.args["using"], merged.args["on"]))
    rows = f"{merged.this.alias_or_name}.rowid"
    twice = f"SELECT 1 FROM {target} JOIN {source} ON {on} GROUP BY {rows} HAVING count(*) > 1 LIMIT 1"
    changes = any(when.args.get("matched") for when in tree.args["whens"].expressions)
    if changes and cur.execute(twice, bound).fetchone():
        raise BigQueryError("invalidQuery", "UPDATE/MERGE must match at most one source row for each target row")
    actions = cur.execute(f"{sql} RETURNING merge_action", bound).to_arrow_table().column(0).to_pylist()
    kinds = {"insertedRowCount": "INSERT", "updatedRowCount": "UPDATE", "deletedRowCount": "DELETE"}
    counts = {name: str(actions.count(action)) for name, action in kinds.items()}
    return JobStatistics2(numDmlAffectedRows=str(len(actions)), dmlStats=counts)


merge.run = merge_at_once

run_statement = query._statement
MIB = 2**20


def run_within_limit(cur, tree, context, destination, config, dry_run, isolated):
    made = names.reference(tree.find(exp.Table), context.project_id, context.dataset_id) if isinstance(tree, exp.Create) else None
    named = {names.reference(table, context.project_id, context.dataset_id) for table in tree.find_all(exp.Table)} - {made}
    sizes = [int(tables.load(*table).numBytes) for table in named if tables.exists(*table)]
    billed = sum(max(10, -(-size // MIB)) * MIB for size in sizes)
    if config.maximumBytesBilled and billed > int(config.maximumBytesBilled):
        raise BigQueryError(
            "bytesBilledLimitExceeded",
            f"Query exceeded limit for bytes billed: {config.maximumBytesBilled}. {billed} or higher required.",
        )
    statistics = run_statement(cur, tree, context, destination, config, dry_run, isolated)
    read = [table for table in statistics.referencedTables or [] if tables.reference(table) != made]
    return statistics.replace(totalBytesProcessed=str(sum(sizes)), totalBytesBilled=str(billed), referencedTables=read)


query._statement = run_within_limit


def expire_jobs():
    while True:
        time.sleep(5)
        for (project, job), resource in list(jobs.items()):
            if resource.status.state == "DONE" and int(resource.statistics.creationTime) < (time.time() - SECONDS) * 1000:
                with contextlib.suppress(BigQueryError):  # it has no result
                    tables.delete(project, tables.RESULTS, job)
                del jobs[project, job]


threading.Thread(target=expire_jobs, daemon=True).start()
uvicorn.run = functools.partial(uvicorn.run, timeout_keep_alive=60, access_log=False)
main()
