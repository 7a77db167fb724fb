// Requests to the daemon.

/** There was no response: the daemon or the network is down. */
export class Lost extends Error {}
/** The console requires a token. */
export class Denied extends Error {}
/** The daemon refused the request; the message says why. */
export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

const TIMEOUT = 10_000;

/** The name under which the browser stores the login's key. The response to a login contains the key, which is useless
 * without the login's cookie. */
export const KEY = "key";

export const get = (path) => ask(path, { method: "GET" });

export const post = (path, body) => ask(path, { method: "POST", body: JSON.stringify(body ?? {}) }, { "Content-Type": "application/json" });

/** The names of fields that contain times. */
const TIME = /^(at|now|since|from|until)$|_(at|since)$/;

/** A number represents only 53 bits of an id's 64, so a larger integer stays text. Times become Unix ms. */
function exactly(name, value, context) {
  if (typeof value === "string" && TIME.test(name)) return Date.parse(value);
  const source = context?.source;
  return typeof value === "number" && !Number.isSafeInteger(value) && /^-?\d+$/.test(source) ? source : value;
}

/** A time in the daemon's format. */
export const instant = (ms) => new Date(Number(ms)).toISOString();

/** An id (a number or a text) as an integer for a request. */
export const integer = JSON.rawJSON ?? Number;

async function ask(path, options, headers) {
  // Other sites cannot make a browser send this header.
  const ours = { "X-Bigchat-Sync": remembered(KEY) ?? "1" };
  let response;
  let text;
  try {
    response = await fetch(path, { ...options, headers: { ...ours, ...headers }, credentials: "same-origin", cache: "no-store", redirect: "error", signal: AbortSignal.timeout(TIMEOUT) });
    text = await response.text();
  } catch (error) {
    throw new Lost(error.message);
  }
  let body = null;
  try {
    if (text !== "") body = JSON.parse(text, exactly);
  } catch {
    // Handled below.
  }
  if (response.status === 401) throw new Denied(body?.error ?? "");
  if (!response.ok) throw new Refused(response.status, body?.error ?? `The daemon answered ${response.status}.`);
  if (body === null && response.status !== 204) throw new Lost("no JSON");
  return body;
}
