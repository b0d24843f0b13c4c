/**
 * The consumer's own metrics, for Prometheus to fetch.
 */
import { once } from "node:events";
import type { AddressInfo } from "node:net";
import type { Registry } from "prom-client";

/**
 * Serves /metrics of the registry, and /healthz: 200, or 503 with what is wrong.
 * @param port 0 is any free one.
 * @throws Error where the port is taken.
 */
export async function serveMetrics(
  port: number,
  registry: Registry,
  fault: () => string | undefined,
): Promise<{ port: number } & AsyncDisposable> {
  const { createServer } = await import("node:http"); // as an ES module it loads all of fetch: 15 ms of each command's start
  const server = createServer(async (request, response) => {
    const path = request.url?.split("?")[0];
    if (path === "/metrics") response.setHeader("content-type", registry.contentType).end(await registry.metrics());
    else if (path === "/healthz") response.writeHead(fault() ? 503 : 200).end(`${fault() ?? "ok"}\n`);
    else response.writeHead(404).end("/metrics and /healthz are here\n");
  });
  server.listen(port);
  await once(server, "listening").catch((error: Error) => {
    throw new Error(`METRICS_PORT ${port}: ${error.message}. Is another consumer running here? Choose another port`);
  });
  return {
    port: (server.address() as AddressInfo).port,
    [Symbol.asyncDispose]: async () => {
      server.closeAllConnections();
      server.close();
    },
  };
}
