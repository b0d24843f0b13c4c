/** Texts that Postgres, JSON, COPY, a shell or an editor could take for something else, or write in another way. */
const controls = String.fromCharCode(...Array.from({ length: 31 }, (_, index) => index + 1), 127);

/** The last one is longer than the pieces in which a stream of rows comes. */
export const texts = [
  ...["", " ", "'", '"', '""', "`", "\\", '\\"', "\n", "\r\n", "\r", "\t", "\\N", "\\.", "null", "NULL", "true", "0", "[1]", '{"op":"d"}'],
  ...[
    '{"a": "b"}\n{"id":1,"a"',
    '{"id":7,"a',
    "\\u0041\\x41\\n",
    "%s {} $1 ?",
    "</script>",
    "a\u2028b\u2029c\u0085d",
    "\u007f\u0080\u009f\u00a0",
  ],
  ...["\u0001", "\u0001\u0002", '\u0002"\u0001\n\u0001\u0001', controls], // two of them are the quote and the delimiter of the COPY
  ...["👩‍👩‍👧‍👦🏳️‍🌈", "e\u0301 \u00e9", "שלום \u202eabc\u202c مرحبا", "\ufeff\ufffe\uffff\ufffd\u{10ffff}", "z̷̢͌a̶"],
  "ß".repeat(70_000),
];

/** JSON. No string at the top: local-bigquery reads {"c":"5"} into a JSON column as the number 5, and refuses {"c":"a"}, by hand too. */
export const jsons = [
  "{}",
  "[]",
  "0",
  "true",
  '{"": {"": [null, false, {"a": []}]}}',
  '{"\\u00e9\\ud83d\\ude00\\u0001\\u2028": "\\u0002\\n\\r\\t\\"\\\\\\/"}',
  '{"a b": " \\\\u0041 ", "\\\\N": "\\\\."}',
  "[9223372036854775807, -9223372036854775808, 9007199254740993, -9007199254740993]",
  "[0.1, 1e2, -1.5e-7, 1.0]",
  "[18446744073709551615, 1.7976931348623157e308, 0.30000000000000004]",
  "[".repeat(500) + "]".repeat(500),
  JSON.stringify(texts.slice(0, -1)),
];
