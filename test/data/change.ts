/**
 * Changes some of the source's rows, as a shop would, so that the next run of a pipeline has something to do.
 * Plain SQL: the triggers set updated_at, and nothing marks a changed row otherwise.
 */
import { openSource } from "./load.ts";

/** How many orders and users to change, and orders to insert. The same seed on the same rows makes the same changes. */
export type Changes = { orders: number; users: number; newOrders: number; seed?: number };

/**
 * One transaction: all of it happens or none.
 * @param adminUrl the local stack's STACK_ADMIN_DATABASE_URL; another host is refused
 */
export async function changeSource(adminUrl: string, { orders, users, newOrders, seed = 1 }: Changes): Promise<void> {
  const sql = openSource(adminUrl);
  // A hash of seed and id, as the order to pick by and as the dice.
  const hash = sql`hashtextextended(id::text, ${seed})`;
  try {
    await sql.begin(async (tx) => {
      // Off the same order's total: what it cost on the shelf stays what it was.
      await tx`
        with picked as (
          select id, least(total, (1 + abs(${hash} % 500)) / 100.0) as goodwill
          from public.orders order by ${hash}, id limit ${orders}
        )
        update public.orders o
        set status = case o.status when 'returned' then 'completed' else 'returned' end,
          total = o.total - p.goodwill, discount = o.discount + p.goodwill
        from picked p where o.id = p.id`;
      await tx`
        with bands as (
          select array['Under 15K', '15-24K', '25-34K', '35-49K', '50-74K', '75-99K', '100-124K', '125-149K', '150-174K',
            '175-199K', '200-249K', '250K+'] as bands
        ), picked as (
          select id from public.users order by ${hash}, id limit ${users}
        )
        update public.users u
        set income_band = bands[coalesce(array_position(bands, u.income_band), 0) % cardinality(bands) + 1]
        from picked p, bands where u.id = p.id`;
      // The same basket bought again.
      await tx`
        insert into public.orders (id, user_id, store_id, status, item_count, total, discount, created_at)
        select (select max(id) from public.orders) + row_number() over (order by ${hash}, id),
          user_id, store_id, 'placed', item_count, total, discount, clock_timestamp()
        from public.orders order by ${hash}, id limit ${newOrders}`;
    });
  } finally {
    await sql.end({ timeout: 1 });
  }
}

/** Inserts, updates, moves and deletes sensor readings, a few transactions of each. @returns how many rows were changed. */
export async function changeReadings(adminUrl: string, seed = 1): Promise<number> {
  const sql = openSource(adminUrl);
  const hash = sql`hashtextextended(id::text, ${seed})`;
  let rows = 0;
  try {
    for (let transaction = 0; transaction < 5; transaction++) {
      const dice = sql`abs(${hash} % 1000)`;
      const results = await sql.begin(async (tx) => [
        await tx`
          insert into public.sensor_readings (sensor_id, metric, value)
          select sensor_id, metric, value from public.sensor_readings where ${dice} = ${transaction}`,
        await tx`update public.sensor_readings set value = value + 1 where ${dice} = ${10 + transaction}`,
        // Its time is part of the destination's sorting key.
        await tx`update public.sensor_readings set recorded_at = recorded_at + interval '1 minute' where ${dice} = ${20 + transaction}`,
        // Of those that were inserted before: the data set itself stays whole, so that it can be completed by `make data`.
        await tx`delete from public.sensor_readings where recorded_at > '2020-01-01' and ${dice} % 4 = 0`,
      ]);
      rows += results.reduce((sum, { count }) => sum + count, 0);
    }
    return rows;
  } finally {
    await sql.end({ timeout: 1 });
  }
}
