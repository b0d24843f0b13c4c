/**
 * A connection between two processes that can be cut, slowed down, stalled and changed: the one TCP proxy, whatever is spoken through it.
 */
import { once } from "node:events";
import { type AddressInfo, createServer, connect as open, type Socket } from "node:net";
import { setTimeout as delay } from "node:timers/promises";
import { endpoint } from "../stack/env.ts";

interface Pair {
  client: Socket;
  upstream: Socket;
  /** Until it resolves nothing passes. */
  held: Promise<unknown>;
}

/** Sees what one side of a connection has sent. @returns what is passed on of it. */
export type Tap = (data: Buffer, pair: Pair) => Buffer;

export interface Link extends AsyncDisposable {
  port: number;
  /** The target, by way of the link. */
  url: string;
  /** Resets every connection. */
  cut(): void;
  /** Resets every connection, and nobody listens, until `pass`. */
  refuse(): void;
  /** Connections are taken and stay, and nothing passes, until `pass`. */
  hang(): void;
  pass(): Promise<void>;
  /** Milliseconds that each piece waits, in both directions. */
  latency: number;
  /** What is under way stands still until the promise resolves, then arrives, even from a sender that is gone. New connections pass. */
  stall(until: Promise<unknown>): void;
  /** Calls `then` as the so-manieth piece of HTTP requests from now on that has this in it comes, before it is passed on. */
  after(count: number, piece: RegExp, then: () => void): void;
}

/**
 * Listens at a port of its own in front of the server at `target`, a URL or host:port.
 * @param taps makes, for each connection, what sees the bytes of the client or of the server.
 */
export async function createLink(target = "", taps: { port?: number; fromClient?: () => Tap; fromServer?: () => Tap } = {}): Promise<Link> {
  const { host, port } = endpoint(target);
  const pairs = new Set<Pair>();
  const waiting = new Set<{ left: number; piece: RegExp; then: () => void }>();
  let hanging = Promise.withResolvers<void>();
  hanging.resolve();
  const count = (data: Buffer): void => {
    for (const one of waiting) {
      if (!one.piece.test(data.toString("latin1")) || --one.left > 0) continue;
      waiting.delete(one);
      one.then();
    }
  };
  const pass: Tap = (data) => data;
  const server = createServer({ allowHalfOpen: true, noDelay: true }, (client) => {
    const upstream = open({ port, host, allowHalfOpen: true, noDelay: true });
    const pair: Pair = { client, upstream, held: hanging.promise };
    pairs.add(pair);
    const pump = async (from: Socket, to: Socket, tap: Tap): Promise<void> => {
      for await (const data of from.iterator({ destroyOnReturn: false })) {
        if (from === client) count(data);
        if (link.latency) await delay(link.latency);
        await pair.held;
        const passed = tap(data, pair);
        if (!to.write(passed) && !to.destroyed) await Promise.race([once(to, "drain"), once(to, "close")]);
      }
      await pair.held;
      to.end();
    };
    for (const socket of [client, upstream]) socket.on("error", () => {});
    // A side that is reset takes the other with it, once what it had sent has arrived.
    const both = [
      pump(client, upstream, taps.fromClient?.() ?? pass).catch(() => upstream.destroySoon()),
      pump(upstream, client, taps.fromServer?.() ?? pass).catch(() => client.destroySoon()),
    ];
    void Promise.all(both).then(() => pairs.delete(pair));
  });
  const listen = async (at: number): Promise<number> => {
    if (!server.listening) await once(server.listen(at, "127.0.0.1"), "listening");
    return (server.address() as AddressInfo).port;
  };
  const own = await listen(taps.port ?? 0);
  const link: Link = {
    port: own,
    url: target.includes("://") ? Object.assign(new URL(target), { host: `127.0.0.1:${own}` }).href : `${host}:${own}`,
    latency: 0,
    cut: () => {
      for (const { client, upstream } of pairs) for (const socket of [client, upstream]) socket.resetAndDestroy();
    },
    refuse: () => {
      server.close();
      link.cut();
    },
    hang: () => {
      hanging = Promise.withResolvers<void>();
      link.stall(hanging.promise);
    },
    pass: async () => {
      hanging.resolve();
      await listen(own);
    },
    stall: (until) => {
      for (const pair of pairs) pair.held = until;
    },
    after: (left, piece, then) => void waiting.add({ left, piece, then }),
    [Symbol.asyncDispose]: async () => link.refuse(),
  };
  return link;
}

/**
 * In front of a Postgres, cuts a connection once `bytes` have come from the server, at the end of a message, so at the end of a COPY's
 * row: by a reset, by a FIN, the way a server ends whose machine shuts down, or by a stall: it stays open, and nothing comes any more.
 */
export async function createCutLink(
  target: string | undefined,
  how: "reset" | "fin" | "stall",
  bytes: number,
): Promise<Link & { broken: Promise<void> }> {
  const broken = Promise.withResolvers<void>();
  const cut = ({ client, upstream }: Pair): void => {
    upstream.destroy();
    if (how === "fin") client.end();
    else client.resetAndDestroy();
  };
  const fromServer = (): Tap => {
    let [left, pending] = [bytes, Buffer.alloc(0)];
    return (data, pair) => {
      pending = Buffer.concat([pending, data]);
      let end = 0;
      // A message: its type, its length without the type, its content.
      while (left > 0 && pending.length >= end + 5 && pending.length > end + pending.readUInt32BE(end + 1)) {
        const length = 1 + pending.readUInt32BE(end + 1);
        [end, left] = [end + length, left - length];
      }
      const passed = pending.subarray(0, end);
      pending = pending.subarray(end);
      if (left > 0 || !end) return passed;
      broken.resolve();
      if (how !== "stall") setImmediate(cut, pair); // once it is written
      return passed;
    };
  };
  return Object.assign(await createLink(target, { fromServer }), { broken: broken.promise });
}
