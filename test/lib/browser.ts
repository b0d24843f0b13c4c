/** A headless Chromium, spoken to by its own protocol over Node's WebSocket. */
import { spawn } from "node:child_process";
import { once } from "node:events";
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { createInterface } from "node:readline";
import chromium from "@sparticuz/chromium";

// biome-ignore lint/suspicious/noExplicitAny: the protocol's own JSON
type Answer = any;

export interface Page extends AsyncDisposable {
  send(method: string, params?: object): Promise<Answer>;
  /** The value of an expression in the page. */
  evaluate<T>(expression: string): Promise<T>;
  /** What the page said and asked for so far: console messages, errors, requests. */
  heard: { method: string; text: string }[];
}

/** Opens the address, and returns once it is loaded. */
export async function openPage(url: string): Promise<Page> {
  const profile = mkdtempSync(join(tmpdir(), "etl-chromium-"));
  const args = ["--headless", "--no-sandbox", "--disable-gpu", `--user-data-dir=${profile}`, "--remote-debugging-port=0"];
  const child = spawn(await chromium.executablePath(), [...args, "about:blank"], {
    stdio: ["ignore", "ignore", "pipe"],
  });
  const lines = createInterface({ input: child.stderr });
  const port = await new Promise<string>((resolve, reject) => {
    lines.on("line", (line) => /ws:\/\/127\.0\.0\.1:(\d+)/.exec(line)?.[1] && resolve(/:(\d+)\//.exec(line)?.[1] ?? ""));
    child.once("exit", (code) => reject(new Error(`Chromium ended with ${code}`)));
  });
  const targets: Answer[] = (await (await fetch(`http://127.0.0.1:${port}/json`)).json()) as Answer[];
  const socket = new WebSocket(targets.find(({ type }) => type === "page").webSocketDebuggerUrl);
  const waiting = new Map<number, (answer: Answer) => void>();
  const heard: Page["heard"] = [];
  const loaded = Promise.withResolvers<void>();
  socket.addEventListener("message", ({ data }) => {
    const message: Answer = JSON.parse(data);
    if (message.id) return waiting.get(message.id)?.(message);
    if (message.method === "Page.loadEventFired") loaded.resolve();
    if (/consoleAPICalled|exceptionThrown|entryAdded|requestWillBeSent$/.test(message.method))
      heard.push({ method: message.method, text: message.params.request?.url ?? JSON.stringify(message.params) });
  });
  await once(socket, "open");
  let last = 0;
  const send: Page["send"] = async (method, params = {}) => {
    const id = ++last;
    const answered = new Promise<Answer>((resolve) => waiting.set(id, resolve));
    socket.send(JSON.stringify({ id, method, params }));
    const { error, result } = await answered;
    if (error) throw new Error(`${method}: ${error.message}`);
    return result;
  };
  for (const domain of ["Page", "Runtime", "Log", "Network"]) await send(`${domain}.enable`);
  await send("Page.navigate", { url });
  await loaded.promise;
  return {
    send,
    heard,
    evaluate: async (expression) => (await send("Runtime.evaluate", { expression, returnByValue: true })).result.value,
    [Symbol.asyncDispose]: async () => {
      socket.close();
      child.kill("SIGKILL");
      await once(child, "close");
      rmSync(profile, { recursive: true, force: true });
    },
  };
}
