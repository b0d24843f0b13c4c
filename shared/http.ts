/** Requests to servers that have no client of their own: Kafka Connect, the Pushgateway, HEARTBEAT_URL. */

/** The address of a path below a server's URL, which may have a path of its own. @param path without a slash at its beginning. */
export const below = (base: string, path: string): URL => new URL(path, base.replace(/\/*$/, "/"));

/**
 * A request to the URL of that variable. Its login goes as a header: fetch takes no URL with one.
 * @throws Error that names host and variable where the server does not answer in time, or refuses the login.
 */
export async function ask(variable: string, { href }: URL, init: RequestInit, seconds: number): Promise<Response> {
  const url = new URL(href);
  const login = [url.username, url.password].map(decodeURIComponent).join(":");
  [url.username, url.password] = ["", ""];
  const authorization = login !== ":" && { authorization: `Basic ${Buffer.from(login).toString("base64")}` };
  const signal = AbortSignal.timeout(seconds * 1000);
  const request = fetch(url, { ...init, headers: { ...authorization, ...init.headers }, signal });
  const answer = await request.catch((error: Error) => {
    const { code, message } = (error.cause ?? error) as { code?: string; message: string };
    throw new Error(`${url.host} (${variable}) does not answer: ${message || code}. For the local stack: make up`);
  });
  if (![401, 403].includes(answer.status)) return answer;
  throw new Error(`${url.host} (${variable}) refused the login: HTTP ${answer.status}. Write it into the URL: https://NAME:PASSWORD@HOST`);
}
