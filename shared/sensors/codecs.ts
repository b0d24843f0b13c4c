/** The codecs of compressed topics that kafkajs does not have: zstd, lz4, snappy. Nothing here is ever compressed. */
import { promisify } from "node:util";
import { zstdDecompress } from "node:zlib";
import kafkajs from "kafkajs";
import { decompressFrame } from "lz4-napi";
import { uncompressSync } from "snappy";

const { CompressionCodecs, CompressionTypes } = kafkajs;

/** Java's clients and brokers write blocks behind their sizes, after a header of 16 bytes (xerial's); others write one block. */
async function unsnappy(data: Buffer): Promise<Buffer> {
  if (data.toString("latin1", 0, 8) !== "\x82SNAPPY\0") return uncompressSync(data) as Buffer;
  const blocks: Buffer[] = [];
  for (let at = 16; at < data.length; at += 4 + data.readUInt32BE(at))
    blocks.push(uncompressSync(data.subarray(at + 4, at + 4 + data.readUInt32BE(at))) as Buffer);
  return Buffer.concat(blocks);
}

/** Teaches kafkajs to read them. */
export function installCodecs(): void {
  const reads = (decompress: (data: Buffer) => Promise<Buffer>) => () => ({
    decompress,
    compress: () => Promise.reject(new Error("not used")),
  });
  CompressionCodecs[CompressionTypes.ZSTD] = reads(promisify(zstdDecompress));
  CompressionCodecs[CompressionTypes.LZ4] = reads(decompressFrame);
  CompressionCodecs[CompressionTypes.Snappy] = reads(unsnappy);
}
