// Parts shared by several views.

import { el, icon } from "./dom.js";

/** Whether events of this kind are stored as messages. */
export const isMessage = (name) => ["MESSAGE"].includes(name);

/** The kind of an event. */
export const kind = (name) => el(`span.kind.${name.toLowerCase()}`, null, name);

/** A conversation, shown by its BigChat id. */
export function conversation(key, id) {
  if (id === null) return el("span.muted", null, "none");
  return key === null ? String(id) : el("a", { href: `#/conversations/${key}` }, String(id));
}

/** A message in place of content. */
export function nothing(symbol, title, ...more) {
  return el("div.nothing", null, icon(symbol), el("h2", null, title), more.map((text) => el("p", null, text)));
}

/** A placeholder while loading; it appears only if loading takes long. */
export function loading(rows = 5) {
  return el(
    "div.loading",
    { "aria-busy": "true" },
    el("p.unseen", null, "Loading"),
    Array.from({ length: rows }, (_, index) => el(`i.bone.bone${index % 3}`, { "aria-hidden": "true" })),
  );
}

/** A heading with its buttons. */
export function head(title, under, ...actions) {
  return el("div.head", null, el("div", null, el("h1", { id: "title", tabindex: -1 }, title), under && el("div.under", null, under)), actions.some(Boolean) && el("div.buttons", null, actions));
}

/** The way back. */
export const back = (href, text) => el("nav.back", { "aria-label": "Back" }, el("a", { href }, icon("left"), text));

/** Facts: pairs of a name and a value; those without a value are left out. */
export function facts(pairs) {
  return el("dl.facts", null, pairs.filter(([, value]) => value !== null && value !== undefined && value !== false).map(([name, value]) => el("div", null, el("dt", null, name), el("dd", null, value))));
}

/** A text with a button to copy it. */
export const copyable = (text) => el("span.copyable", null, el("code", null, text), el("button.icon", { type: "button", "data-do": "copy", "data-text": text, title: "Copy" }, icon("copy"), el("span.unseen", null, "Copy")));

const TOKEN = /"(?:[^"\\]+|\\.)*"|[[\]{},:]|[^\s[\]{},:"]+/g;

/** JSON with indentation, every number and key as received; other text unchanged. */
export function pretty(text) {
  try {
    JSON.parse(text);
  } catch {
    return text;
  }
  let depth = 0;
  let previous = "";
  let lines = "";
  const newLine = () => `\n${"  ".repeat(depth)}`;
  for (const token of text.match(TOKEN)) {
    const opened = previous === "{" || previous === "[";
    if (token === "}" || token === "]") {
      depth -= 1;
      lines += opened ? token : newLine() + token;
    } else {
      if (opened || previous === ",") lines += newLine();
      else if (previous === ":") lines += " ";
      if (token === "{" || token === "[") depth += 1;
      // Needless escapes are removed.
      lines += token.startsWith('"') ? JSON.stringify(JSON.parse(token)) : token;
    }
    previous = token;
  }
  return lines;
}

/** A message, or a note that it has no visible text. */
export function words(text) {
  if (!/^[\s\u2800\u200c\u200d\p{Variation_Selector}]*$/v.test(text)) return text;
  return el("span.muted", { title: text === "" ? "no text" : "only white space" }, "(empty message)");
}

/** The two ways to resolve dead letters, the better one first and highlighted: the retry, unless it cannot succeed. */
export function resolutions(permanent, which, retry, discard) {
  const ways = [
    el(permanent ? "button.quiet" : "button", { type: "button", "data-do": "retry", ...which }, retry),
    el(permanent ? "button.danger" : "button.quiet.danger", { type: "button", "data-do": "discard", ...which }, discard),
  ];
  return permanent ? ways.reverse() : ways;
}

const RESOLVED = { retry: "retried", discard: "discarded", undo: "reopened" };

/** How an event was resolved. */
export const resolved = ({ resolution }) => el("b", { class: resolution }, RESOLVED[resolution] ?? resolution);

/** The button that undoes a discard, as long as that is possible. */
export const undo = ({ can_undo, event }) => can_undo && el("button.quiet", { type: "button", "data-do": "undo", "data-ids": event }, "Undo");

/** A request: its line, and its body below. */
export function request(text) {
  if (!text) return el("p.muted", null, "No request is recorded.");
  const [, method, path, body] = /^([A-Z]+) (\S+)\s*([^]*)$/.exec(text) ?? [null, "", "", text];
  return el("div.wire", null, method && el("p", null, el("b", null, method), " ", el("code", null, path)), body && el("pre", { tabindex: 0 }, pretty(body)));
}

/** A response. */
export function response(text) {
  if (!text) return el("p.muted", null, "No response is recorded.");
  const [, status, body] = /^(\d{3})\b\s*([^]*)$/.exec(text) ?? [null, null, text];
  return el("div.wire", null, status && el("p", null, el("b", { class: status < "400" ? "fine" : "bad" }, status), el("span.muted", null, STATUS[status] ? ` ${STATUS[status]}` : "")), body && el("pre", { tabindex: 0 }, pretty(body)));
}

const STATUS = {
  200: "OK",
  201: "Created",
  204: "No Content",
  400: "Bad Request",
  401: "Unauthorized",
  403: "Forbidden",
  404: "Not Found",
  408: "Request Timeout",
  409: "Conflict",
  413: "Content Too Large",
  422: "Unprocessable Content",
  429: "Too Many Requests",
  500: "Internal Server Error",
  502: "Bad Gateway",
  503: "Service Unavailable",
  504: "Gateway Timeout",
};
