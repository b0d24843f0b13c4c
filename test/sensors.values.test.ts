// What arrives in ClickHouse is what the source has, whatever is done to it.
import { suite, test } from "node:test";
import { createSensors } from "./lib/sensors.ts";

suite("sensors", async () => {
  test("inserts, updates, deletes, moved sorting keys and changed primary keys: FINAL is the source, row by row", async () => {
    await using sensors = await createSensors();
    const { admin } = sensors.shop;
    await admin`insert into sensor_readings (sensor_id, metric, value, recorded_at) select 'S' || i % 3, 'temp', i, '2024-01-01'::timestamptz + i * interval '1 s' from generate_series(1, 500) i`;
    await using consumer = { [Symbol.asyncDispose]: async () => {}, ...(await sensors.consumer()) };
    await sensors.equal();
    await admin`update sensor_readings set value = -value where id % 3 = 0`;
    await admin`update sensor_readings set sensor_id = 'moved', recorded_at = recorded_at + interval '1 day' where id % 5 = 0`;
    await admin`delete from sensor_readings where id % 7 = 0`;
    await admin`update sensor_readings set id = id + 10000 where id % 11 = 0`;
    await admin`insert into sensor_readings (id, sensor_id, metric, value) values (7, 'again', null, null), (20001, null, 'x', 'NaN'), (20002, 'é', '', '-Infinity')`;
    await sensors.equal();
    consumer.child.kill("SIGTERM");
    const { code } = await consumer.ended;
    if (code !== 0) throw new Error(`exit ${code}`);
  });
});
