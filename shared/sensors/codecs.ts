/** The codecs of compressed topics that kafkajs does not have: snappy, lz4, zstd. Nothing here is ever compressed. */
import { promisify } from "node:util";
import { zstdDecompress } from "node:zlib";
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
export const codecs = { 2: reads(unsnappy), 3: reads(decompressFrame), 4: reads(promisify(zstdDecompress)) };
