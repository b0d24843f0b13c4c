// make down: stops every process that this stack started, parts and tests' clusters alike. Data stays in .stack/.
import { recordedNames, stopProcess } from "./process.ts";
import { lockStack, say } from "./stack.ts";

await lockStack();
const stopped = await Promise.all(
  recordedNames().map(async (name) => {
    const ran = await stopProcess(name);
    if (ran) say(`${name}: stopped`);
    return ran;
  }),
);
if (!stopped.includes(true)) say("nothing of this stack runs");
