// make down: stops every process that this stack started, parts and tests' clusters alike. Data stays in .stack/.
import { recordedNames, stopProcess } from "./process.ts";
import { lockStack, say } from "./stack.ts";

await lockStack();
const stop = (names: string[]): Promise<boolean[]> =>
  Promise.all(
    names.map(async (name) => {
      const ran = await stopProcess(name);
      if (ran) say(`${name}: stopped`);
      return ran;
    }),
  );
const names = recordedNames();
// Connect ends cleanly only while its broker and its source still serve.
const isClient = (name: string): boolean => name === "connect";
const stopped = [...(await stop(names.filter(isClient))), ...(await stop(names.filter((name) => !isClient(name))))];
if (!stopped.includes(true)) say("nothing of this stack runs");
