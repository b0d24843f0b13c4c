/**
 * TLS: whose certificates are trusted, and what to do about one that is refused.
 */
import { readFileSync } from "node:fs";
import { getCACertificates, setDefaultCACertificates } from "node:tls";

let trusted: string | undefined;

/**
 * Trusts the authorities of NODE_EXTRA_CA_CERTS too where only ENV_FILE names it: Node itself reads it from the environment, as it starts.
 * @throws Error where there is no such file, or it holds no certificates.
 */
export function trustAuthorities(file: string | undefined): void {
  if (!file || file === process.env.NODE_EXTRA_CA_CERTS || file === trusted) return;
  setDefaultCACertificates([...getCACertificates("default"), readFileSync(file, "utf8")]);
  trusted = file;
}

/** Of Node's and OpenSSL's errors (https://nodejs.org/api/tls.html#x509-certificate-error-codes). */
const refusals: Record<string, string> = {
  ERR_TLS_CERT_ALTNAME_INVALID: "it is of another host. Use a name that is in it",
  HOSTNAME_MISMATCH: "it is of another host. Use a name that is in it",
  CERT_HAS_EXPIRED: "it has expired. Renew it",
  CERT_NOT_YET_VALID: "it is not valid yet. Check the clocks",
};
const unknown =
  /^(UNABLE_TO_(GET_ISSUER_CERT|VERIFY_LEAF)|SELF_SIGNED_CERT|DEPTH_ZERO|CERT_|INVALID_(CA|PURPOSE)|PATH_LENGTH)/;

/** What is wrong with the server's certificate, and what to do, if that is what the error is about. */
export function explainCertificate(error: unknown): string | undefined {
  for (let one = error as { code?: unknown; cause?: unknown } | undefined; one; one = one.cause as typeof one) {
    const code = String(one.code ?? "");
    const why =
      refusals[code] ??
      (unknown.test(code)
        ? "its authority is not known here. Where it is your own, name its file in NODE_EXTRA_CA_CERTS"
        : undefined);
    if (why) return `the server's certificate is refused (${code}): ${why}`;
  }
  return undefined;
}
