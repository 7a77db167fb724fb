// Whether the daemon is healthy, what is wrong, and the rates.

import { draw, frame } from "./chart.js";
import { byId, el } from "./dom.js";
import { get } from "./daemon.js";
import { by } from "./failed.js";
import { ago, at, count, lasting, now, perMinute, roughly, sentence, since, size, some, zone } from "./format.js";
import { conversation, kind, loading, resolved } from "./parts.js";
import { pauseButton } from "./pause.js";

const RANGES = [1, 6, 24, 168];
const HOURS = 6;

export const overview = {
  tab: "overview",
  title: () => "Overview",
  every: 10_000,
  async load({ hours }) {
    const range = RANGES.includes(Number(hours)) ? Number(hours) : HOURS;
    const [activity, resolutions] = await Promise.all([get(`/api/activity?hours=${range}`), get("/api/resolutions")]);
    return { range, activity, resolutions: resolutions.rows.slice(0, 5) };
  },
  show: (data, { status }) => (status ? [verdict(status), pipe(status), strip(status), chart(data), lists(data, status)] : loading(8)),
  shown(data) {
    if (data) draw(data.activity);
  },
};

function verdict(status) {
  const { problems } = status;
  const title = status.healthy ? "Healthy" : problems.length > 1 ? `${problems.length} things need attention` : "One thing needs attention";
  return el(
    "section.verdict",
    { "data-healthy": status.healthy ? "yes" : "no", "aria-labelledby": "title" },
    el("h1", { id: "title", tabindex: -1 }, el("i.dot", { "aria-hidden": "true" }), title),
    el(
      "p.under",
      null,
      status.polled_at === null ? "BigChat has not been read yet." : ["BigChat was read ", ago(status.polled_at), status.newest_event_at === null ? "; it has reported nothing yet." : ["; its newest event is from ", at(status.newest_event_at), "."]],
    ),
    status.paused === null && el("p.buttons", null, pauseButton()),
    problems.length > 0 &&
      el(
        "ul.problems",
        null,
        problems.map(({ what, remedy }) => el("li", null, el("strong", null, sentence(what)), remedy && el("span", null, commands(sentence(remedy))))),
      ),
  );
}

/** A text in which `…` is code. */
const commands = (text) => text.split("`").map((part, index) => (index % 2 ? el("code", null, part) : part));

// BigChat, the journal, OurAPI, and the flow between them.
function pipe(status) {
  return el(
    "section.pipe",
    { "aria-label": "From BigChat to OurAPI" },
    api("BigChat", "source", status.bigchat),
    link(status.behind_s === null ? "not read yet" : status.behind_s < 1 ? "up to now" : `${roughly(status.behind_s * 1000)} behind`, cut(status.bigchat)),
    el(
      "article.node.middle",
      { "aria-labelledby": "node-journal" },
      el("header", null, el("h2", { id: "node-journal" }, "Journal"), el("span.muted", null, size(status.database.size_bytes))),
      el(
        "div.pair",
        null,
        figure(count(status.waiting), "waiting", status.oldest_waiting === null ? "nothing to do" : ["the oldest for ", since(status.oldest_waiting.since)]),
        el("a.figure", { href: "#/failed", "data-bad": status.failed > 0 ? "yes" : null }, el("b", null, count(status.failed)), el("span", null, "failed"), el("small", null, status.failed === 0 ? "none" : "needs action")),
      ),
      status.incomplete > 0 && el("p.note", null, `${some(status.incomplete, "chat")} lost in OurAPI, in whole or in part, and not restored`),
      status.drifted > 0 && el("p.note", null, `${some(status.drifted, "chat")} ${status.drifted === 1 ? "differs" : "differ"} in OurAPI: changed by another client or, if this database is a restored backup, after the backup was made`),
      status.rebuilding > 0 && el("p.note", null, `${some(status.rebuilding, "chat")} to be verified or rebuilt`),
    ),
    link(cut(status.our_api) ? "on hold" : status.delivery_ms ? `in ${lasting(status.delivery_ms.median)}` : "nothing yet", cut(status.our_api)),
    api("OurAPI", "destination", status.our_api),
  );
}

/** Whether no event gets through. */
const cut = (api) => api.state === "down" || api.rate_limit !== null;

function api(name, what, state) {
  const word = state.state === "unknown" && state.asked_at !== null ? (state.problem ? "Not reached yet" : "Not known yet") : { unknown: "No request yet", up: "Up", failing: "Failing", down: "Down" }[state.state];
  const limit = state.rate_limit;
  const id = `node-${name.toLowerCase()}`;
  return el(
    "article.node",
    { "aria-labelledby": id, "data-state": state.state },
    el("header", null, el("h2", { id }, name), el("span.muted", null, what)),
    el("p.state", null, el("i.dot", { "aria-hidden": "true" }), el("b", null, word), state.since !== null && el("span.muted", null, " for ", since(state.since))),
    limit && el("p.note", null, "rate-limited until ", at(limit.until), limit.status !== null && ` (${limit.status}, Retry-After)`),
    state.problem && el("p.note", null, state.problem),
    state.request
      ? el(
          "details.last",
          { "data-key": "last" },
          el("summary", null, "last request ", state.asked_at === null ? "" : ago(state.asked_at)),
          el("code", null, state.request),
          el("code", null, state.response ?? "no response"),
        )
      : el("p.muted.last", null, "no request yet"),
  );
}

const link = (text, cut) => el("div.link", { "data-cut": cut }, el("span", null, text), el("i", { "aria-hidden": "true" }));

const figure = (value, name, more) => el("div.figure", null, el("b", null, value), el("span", null, name), el("small", null, more));

function strip(status) {
  const delivery = status.delivery_ms;
  return el(
    "dl.strip",
    { "aria-label": "Figures" },
    cell("Received", perMinute(status.received_per_minute), "a minute"),
    cell("Delivered", perMinute(status.delivered_per_minute), "a minute"),
    cell("Median delivery time", delivery ? lasting(delivery.median) : "–"),
    cell("p95", delivery ? lasting(delivery.p95) : "–"),
    cell("Slowest", delivery ? lasting(delivery.max) : "–", delivery && `of the latest ${count(delivery.count)}`),
  );
}

const cell = (name, value, more) => el("div", null, el("dt", null, name), el("dd", null, el("b", null, value), more && [" ", el("small", null, more)]));

function chart(data) {
  return el(
    "section.card",
    { "aria-labelledby": "chart-title" },
    el(
      "header",
      null,
      el("h2", { id: "chart-title" }, "Events a minute ", el("small.muted", null, zone(now()))),
      el(
        "div.segments",
        { role: "group", "aria-label": "How far back" },
        RANGES.map((hours) => el("a", { href: hours === HOURS ? "#/" : `#/?hours=${hours}`, "aria-current": data?.range === hours ? "true" : null }, hours < 168 ? `${hours} h` : "7 d")),
      ),
    ),
    el("ul.legend", { id: "legend", "data-own": true }),
    frame(),
    el("details.table", { id: "chart-details" }, el("summary", null, "As a table"), el("div.scroll", { id: "chart-table", "data-own": true })),
    !data && el("div.covers", null, loading(3)),
  );
}

function lists(data, status) {
  const most = Math.max(...status.failed_by_reason.map((group) => group.count), 1);
  return el(
    "div.columns",
    null,
    el(
      "section.card",
      { "aria-labelledby": "reasons" },
      el("header", null, el("h2", { id: "reasons" }, "Failed, by reason"), status.failed > 0 && el("a", { href: "#/failed" }, "Resolve")),
      status.failed === 0
        ? el("p.quietly", null, "No failed events need action. A failed event stays here until you resolve it.")
        : el(
            "ul.reasons",
            null,
            status.failed_by_reason.slice(0, 5).map((group) =>
              el(
                "li",
                { "data-key": group.reason },
                el("a", { href: `#/failed?reason=${encodeURIComponent(group.reason)}` }, sentence(group.reason)),
                el("b", null, count(group.count)),
                el("meter", { min: 0, max: most, value: group.count, "aria-hidden": "true" }),
                el("small", null, "latest ", ago(group.latest_at)),
              ),
            ),
          ),
    ),
    el(
      "section.card",
      { "aria-labelledby": "latest" },
      el("header", null, el("h2", { id: "latest" }, "Latest resolutions"), data?.resolutions.length > 0 && el("a", { href: "#/resolutions" }, "All")),
      !data
        ? loading(3)
        : data.resolutions.length === 0
          ? el("p.quietly", null, "Nothing has been resolved yet.")
          : el(
              "ul.lately",
              null,
              data.resolutions.map((resolution) =>
                el(
                  "li",
                  { "data-key": resolution.id },
                  resolved(resolution),
                  kind(resolution.kind),
                  el("span.muted", null, el("a", { href: `#/failed/${resolution.event}` }, `#${resolution.event}`), resolution.conversation !== null && [" in conversation ", conversation(resolution.conversation_key, resolution.conversation)], " by ", by(resolution)),
                  ago(resolution.at),
                ),
              ),
            ),
    ),
  );
}

/** Redraws the chart if its width or its table has changed. */
export function watch(current) {
  new ResizeObserver(() => overview.shown(current())).observe(byId("main"));
  byId("main").addEventListener("toggle", (event) => event.target.id === "chart-details" && overview.shown(current()), true);
}
