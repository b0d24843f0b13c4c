/** Requests to the servers that have no client of their own: Kafka Connect and the Pushgateway. */

/**
 * A request below the variable's URL, which may have a path of its own and a login: that goes as a header, since fetch takes no URL with one.
 * @param path without a slash at its beginning.
 * @throws Error that names host and variable where the server does not answer in time, or refuses the login.
 */
export async function ask(
  variable: string,
  base: string,
  path: string,
  init: RequestInit,
  seconds: number,
): Promise<Response> {
  const url = new URL(path, base.replace(/\/*$/, "/"));
  const login = [url.username, url.password].map(decodeURIComponent).join(":");
  const headers = {
    ...(login !== ":" && { authorization: `Basic ${Buffer.from(login).toString("base64")}` }),
    ...init.headers,
  };
  [url.username, url.password] = ["", ""];
  const answer = await fetch(url, { ...init, headers, signal: AbortSignal.timeout(seconds * 1000) }).catch(
    (error: Error) => {
      const { code, message } = (error.cause ?? error) as { code?: string; message: string };
      throw new Error(`${url.host} (${variable}) does not answer: ${message || code}. For the local stack: make up`);
    },
  );
  if (answer.status === 401 || answer.status === 403)
    throw new Error(
      `${url.host} (${variable}) refused the login: HTTP ${answer.status}. Write it into the URL: https://NAME:PASSWORD@HOST`,
    );
  return answer;
}
