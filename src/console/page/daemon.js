// What the page asks the daemon.

/** There is no answer: the daemon is down, or the network is. */
export class Lost extends Error {}
/** The console asks for a token. */
export class Denied extends Error {}
/** The daemon says no; the message says why. */
export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

const PATIENCE = 10_000;

/** Where the key of a session is: what a login gives, and worth nothing without the cookie that comes with it. */
export const KEY = "key";

export const get = (path) => ask(path, { method: "GET" });

export const post = (path, body) => ask(path, { method: "POST", body: JSON.stringify(body ?? {}) }, { "Content-Type": "application/json" });

/** What the daemon calls a point in time. */
const TIME = /^(at|now|since|from|until)$|_(at|since)$/;

/** Ids have up to 64 bits, and a number holds only 53 of them: a greater integer stays the text it came as. Times become Unix ms. */
function exactly(name, value, context) {
  if (typeof value === "string" && TIME.test(name)) return Date.parse(value);
  const source = context?.source;
  return typeof value === "number" && !Number.isSafeInteger(value) && /^-?\d+$/.test(source) ? source : value;
}

/** A point in time as the daemon takes it. */
export const instant = (ms) => new Date(Number(ms)).toISOString();

/** An id, be it a number or a text, as an integer in what is sent. */
export const integer = JSON.rawJSON ?? Number;

async function ask(path, options, headers) {
  // No other site can make a browser send this.
  const ours = { "X-Bigchat-Sync": remembered(KEY) ?? "1" };
  let response;
  let text;
  try {
    response = await fetch(path, { ...options, headers: { ...ours, ...headers }, credentials: "same-origin", cache: "no-store", redirect: "error", signal: AbortSignal.timeout(PATIENCE) });
    text = await response.text();
  } catch (error) {
    throw new Lost(error.message);
  }
  let body = null;
  try {
    if (text !== "") body = JSON.parse(text, exactly);
  } catch {
    // Said below.
  }
  if (response.status === 401) throw new Denied(body?.error ?? "");
  if (!response.ok) throw new Refused(response.status, body?.error ?? `The daemon answered ${response.status}.`);
  if (body === null && response.status !== 204) throw new Lost("no JSON");
  return body;
}
