/** Certificates of a test's own, by openssl. */
import { execFileSync } from "node:child_process";
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";

export interface Authority extends Disposable {
  /** Its own certificate, in PEM form. */
  file: string;
  /** A server's key and certificate for these names, such as DNS:localhost,IP:127.0.0.1. */
  issue(names: string, days?: number): { key: string; certificate: string };
}

export function createAuthority(): Authority {
  const folder = mkdtempSync(join(tmpdir(), "etl-tls-"));
  const at = (name: string): string => join(folder, name);
  const openssl = (...args: string[]): Buffer => execFileSync("openssl", args, { stdio: ["ignore", "pipe", "ignore"] });
  const key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"];
  openssl("req", "-x509", ...key, "-keyout", at("ca.key"), "-out", at("ca.pem"), "-days", "2", "-subj", "/CN=test authority");
  let count = 0;
  return {
    file: at("ca.pem"),
    issue: (names, days = 2) => {
      const name = at(`${++count}`);
      openssl("req", "-new", ...key, "-keyout", `${name}.key`, "-out", `${name}.csr`, "-subj", "/CN=server");
      writeFileSync(`${name}.ext`, `subjectAltName=${names}\n`);
      openssl(
        ...["x509", "-req", "-in", `${name}.csr`, "-CA", at("ca.pem"), "-CAkey", at("ca.key"), "-CAcreateserial"],
        ...["-days", String(days), "-extfile", `${name}.ext`, "-out", `${name}.pem`],
      );
      return { key: `${name}.key`, certificate: `${name}.pem` };
    },
    [Symbol.dispose]: () => rmSync(folder, { recursive: true, force: true }),
  };
}
