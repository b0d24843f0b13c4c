/**
 * A connection between two processes that can be cut, slowed down and stalled: a TCP proxy, whatever is spoken through it.
 */
import { once } from "node:events";
import { createServer, connect as open, type Socket } from "node:net";
import { setTimeout as delay } from "node:timers/promises";

export interface Link {
  /** Resets every connection; while `down`, new ones too. */
  cut(): void;
  down: boolean;
  /** Milliseconds that each piece waits, in both directions. */
  latency: number;
  /** What is under way stands still until the promise resolves, then arrives, also where its sender is gone by then. New connections pass. */
  stall(until: Promise<unknown>): void;
  /** Calls `then` as the so-manieth HTTP request from now on that may change something comes, before it is passed on. */
  after(writes: number, then: () => void): void;
}

/** Listens at a port of its own in front of the server at `target`. Both are of 127.0.0.1. */
export async function createLink(port: number, target: number): Promise<Link> {
  const pairs = new Set<{ sockets: Socket[]; held: Promise<unknown> }>();
  const waiting = new Set<{ left: number; then: () => void }>();
  const count = (): void => {
    for (const one of waiting) {
      if (--one.left > 0) continue;
      waiting.delete(one);
      one.then();
    }
  };
  const link: Link = {
    down: false,
    latency: 0,
    cut: () => {
      for (const { sockets } of pairs) for (const socket of sockets) socket.resetAndDestroy();
    },
    stall: (until) => {
      for (const pair of pairs) pair.held = until;
    },
    after: (left, then) => void waiting.add({ left, then }),
  };
  const server = createServer({ allowHalfOpen: true, noDelay: true }, (client) => {
    if (link.down) return void client.resetAndDestroy();
    const upstream = open({ port: target, host: "127.0.0.1", allowHalfOpen: true, noDelay: true });
    const pair = { sockets: [client, upstream], held: Promise.resolve() as Promise<unknown> };
    pairs.add(pair);
    const pump = async (from: Socket, to: Socket): Promise<void> => {
      for await (const data of from.iterator({ destroyOnReturn: false })) {
        if (from === client && /^(POST|PUT|DELETE) /.test(data.toString("latin1", 0, 7))) count();
        if (link.latency) await delay(link.latency);
        await pair.held;
        if (!to.write(data) && !to.destroyed) await Promise.race([once(to, "drain"), once(to, "close")]);
      }
      await pair.held;
      to.end();
    };
    for (const socket of pair.sockets) socket.on("error", () => {});
    // A side that is reset takes the other with it, once what it had sent has arrived.
    const both = [pump(client, upstream), pump(upstream, client)].map((one, at) =>
      one.catch(() => pair.sockets[1 - at]?.destroySoon()),
    );
    void Promise.all(both).then(() => pairs.delete(pair));
  });
  server.listen(port, "127.0.0.1");
  await once(server, "listening");
  return link;
}
