/** kafkajs, with what it lacks: the codecs of compressed topics (nothing here is ever compressed), and rest for an idle connection. */
import { createRequire } from "node:module";
import { promisify } from "node:util";
import { zstdDecompress } from "node:zlib";
import kafkajs from "kafkajs";
import { decompressFrame } from "lz4-napi";
import { uncompressSync } from "snappy";

/** Java's clients and brokers write blocks behind their sizes, after a header of 16 bytes (xerial's); others write one block. */
async function unsnappy(data: Buffer): Promise<Buffer> {
  if (data.toString("latin1", 0, 8) !== "\x82SNAPPY\0") return uncompressSync(data) as Buffer;
  const blocks: Buffer[] = [];
  for (let at = 16; at < data.length; at += 4 + data.readUInt32BE(at))
    blocks.push(uncompressSync(data.subarray(at + 4, at + 4 + data.readUInt32BE(at))) as Buffer);
  return Buffer.concat(blocks);
}

const compress = () => Promise.reject(new Error("not used"));
const reads = (decompress: (data: Buffer) => Promise<Buffer>) => () => ({ compress, decompress });
/** By Kafka's numbers for them. */
const codecs = { 2: reads(unsnappy), 3: reads(decompressFrame), 4: reads(promisify(zstdDecompress)) };

// A connection without requests in its queue looks at it again and again, each millisecond (kafkajs's issue 1704).
const { prototype: queue } = createRequire(import.meta.url)("kafkajs/src/network/requestQueue");
const { scheduleCheckPendingRequests: lookAgain } = queue;
queue.scheduleCheckPendingRequests = function (): void {
  if (this.pending.length) lookAgain.call(this);
};

Object.assign(kafkajs.CompressionCodecs, codecs);
export default kafkajs;
