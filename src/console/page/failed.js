// The failed events, grouped by reason; one of them in detail; and how they are resolved.

import { get, instant, integer, post } from "./daemon.js";
import { byId, el } from "./dom.js";
import { ago, at, count, sentence, some } from "./format.js";
import { back, conversation, copyable, facts, head, isMessage, kind, loading, nothing, pretty, request, resolutions, resolved, response, undo, words } from "./parts.js";

/** The selected events, and their common reason. */
const selection = { reason: null, ids: new Set(), last: null };

const link = (reason, after) => `#/failed?reason=${encodeURIComponent(reason)}${after ? `&after=${after}` : ""}`;

export const failed = {
  tab: "failed",
  title: () => "Failed events",
  every: 4000,
  async load({ reason, after }) {
    const { groups, total, more, now } = await get("/api/failed");
    const chosen = groups.find((group) => group.reason === reason) ?? (reason === undefined && matchMedia("(min-width: 56rem)").matches ? groups[0] : null);
    if (reason !== undefined && !chosen) return { groups, total, more, now, chosen: null, missing: total > 0, page: null };
    const page = chosen && (await get(`/api/failed?reason=${encodeURIComponent(chosen.reason)}${after ? `&after=${encodeURIComponent(after)}` : ""}`));
    if (chosen?.reason !== selection.reason) clear(chosen?.reason ?? null);
    const there = new Set(page?.rows.map((event) => String(event.id)));
    for (const id of selection.ids) if (!there.has(id)) selection.ids.delete(id);
    return { groups, total, more, now, chosen, page, named: reason !== undefined, after };
  },
  show(data) {
    if (!data) return [head("Failed events"), loading(6)];
    if (data.total === 0) return [head("Failed events"), nothing("check", "No failed events need action", "Events that OurAPI permanently rejects, that could not be delivered after all attempts, or that cannot be parsed, are listed here until you resolve them.")];
    return [
      head(
        "Failed events",
        `${some(data.total, "event")} ${data.total === 1 ? "needs" : "need"} action: retry or discard.`,
        el("button.quiet", { type: "button", "data-do": "retry", "data-all": data.total, "data-by": data.now }, "Retry all"),
        el("button.quiet.danger", { type: "button", "data-do": "discard", "data-all": data.total, "data-by": data.now }, "Discard all…"),
      ),
      el("div.split", { "data-named": data.named ? "yes" : null }, groups(data), data.chosen ? group(data) : data.missing ? (data.more ? nothing("failed", "This reason is not listed", "Only the most frequent reasons are shown.") : nothing("check", "None of these are left", "They were resolved or erased meanwhile.")) : null),
    ];
  },
};

function groups({ groups, chosen, more }) {
  return el(
    "nav.groups",
    { "aria-label": "Reasons" },
    el(
      "ul",
      { "data-list": "reasons" },
      groups.map((group) =>
        el(
          "li",
          { "data-key": group.reason },
          el(
            "a",
            { href: link(group.reason), "aria-current": group.reason === chosen?.reason ? "true" : null, "data-step": "", tabindex: -1 },
            el("span", null, sentence(group.reason)),
            el("b", null, count(group.count)),
            el("small", null, "latest ", ago(group.latest_at)),
          ),
        ),
      ),
    ),
    more && el("p.quietly", null, "Only the most frequent reasons are shown."),
  );
}

function group({ chosen, page, after, now }) {
  const ids = page.rows.map((event) => String(event.id));
  const selected = ids.filter((id) => selection.ids.has(id));
  return el(
    "section.group.card",
    { "aria-labelledby": "group-title", "data-key": `group ${chosen.reason}` },
    back("#/failed", "All reasons"),
    el(
      "header",
      null,
      el("div", null, el("h2", { id: "group-title" }, sentence(chosen.reason)), el("p.under", null, advice(chosen))),
      el(
        "div.buttons",
        null,
        resolutions(chosen.permanent, { "data-reason": chosen.reason, "data-count": chosen.count, "data-by": now }, `Retry ${all(chosen.count)}`, `Discard ${all(chosen.count)}…`),
      ),
    ),
    el(
      "label.every",
      null,
      el("input", { type: "checkbox", "data-do": "select-page", "data-ids": ids.join(" "), checked: selected.length > 0 && selected.length === ids.length }),
      `Select the ${some(ids.length, "event")} shown`,
    ),
    el(
      "ul.rows",
      { "data-list": "events" },
      page.rows.map((event) => {
        const chosen = selection.ids.has(String(event.id));
        return el(
          "li",
          { "data-key": event.id, "data-event": event.id, "data-selected": chosen ? "yes" : null },
          el("input", { type: "checkbox", "data-do": "select", "data-id": event.id, "data-step": "", tabindex: -1, checked: chosen, "aria-label": `Select event ${event.id}` }),
          el(
            "a",
            { href: `#/failed/${event.id}`, "data-step": "", tabindex: -1 },
            kind(event.kind),
            el("span.says", null, isMessage(event.kind) ? words(event.text) : event.text),
            el("span.where", null, event.conversation === null ? `#${event.id}` : `conversation ${event.conversation}`),
            el("span.when", null, ago(event.failed_at)),
          ),
        );
      }),
    ),
    (page.next !== null || after) && el("p.pages", null, after && el("a", { href: link(chosen.reason) }, "First page"), page.next !== null && el("a", { href: link(chosen.reason, page.next) }, "Next page")),
    el(
      "div.chosen",
      { role: "group", "aria-label": "The selection", hidden: selected.length === 0 },
      el("b", null, `${count(selected.length)} selected`),
      resolutions(chosen.permanent, { "data-ids": selected.join(" ") }, "Retry", "Discard…"),
      el("button.quiet", { type: "button", "data-do": "select-none" }, "Clear"),
    ),
  );
}

const all = (n) => (n === 1 ? "it" : n === 2 ? "both" : `all ${count(n)}`);

const PERMANENT = "A retry will fail again unless OurAPI or this program has changed. Check the event and the response, then discard.";

// What the operator should do first, by reason, if a retry can succeed.
const ADVICE = [
  [/rejected the credentials/, "Renew the token, then retry."],
  [/does not seem to be (OurAPI|BigChat)/, "Another service answers at this URL. Correct the URL, then retry."],
  [/no usable answer|did not answer in time/, "Retry: OurAPI is checked first, and nothing is sent twice."],
];

const advice = ({ permanent, reason }) => (permanent ? PERMANENT : (ADVICE.find(([pattern]) => pattern.test(reason))?.[1] ?? "A retry is as safe as the first attempt."));

const STATES = { waiting: "Waiting", delivered: "Delivered", failed: "Failed", discarded: "Discarded", forgotten: "Forgotten: its text was erased" };

export const event = {
  tab: "failed",
  title: (data, { id }) => `Event ${id}`,
  every: 3000,
  load: ({ id }) => get(`/api/failed/${id}`),
  show(event) {
    if (!event) return loading(8);
    const is = event.state === "failed";
    return [
      back(event.reason && is ? link(event.reason) : "#/failed", "Failed events"),
      head(
        [kind(event.kind), ` Event ${event.id}`],
        event.reason && [sentence(event.reason), "."],
        is && resolutions(event.permanent, { "data-ids": event.id }, "Retry", "Discard…"),
      ),
      el("p.verdict-line", { "data-state": event.state }, el("i.dot", { "aria-hidden": "true" }), el("b", null, STATES[event.state]), event.state_since !== null && [" ", ago(event.state_since)], is && [": ", advice(event)]),
      el(
        "div.sides",
        null,
        el(
          "div",
          null,
          block("What BigChat reported", el("pre", { tabindex: 0, id: "raw" }, pretty(event.raw)), event.raw_truncated && el("p.muted", null, "Truncated: the complete text is longer.")),
          (event.request || event.response) && el("div.exchange", { "data-key": "exchange" }, block("Last request", request(event.request)), block("Last response", response(event.response))),
          block("Attempts", attempts(event)),
        ),
        el(
          "aside",
          { "aria-label": "About this event" },
          block(
            "Details",
            facts([
              ["Conversation", event.conversation === null ? null : event.conversation_key === null ? String(event.conversation) : conversation(event.conversation_key, event.conversation)],
              ["Happened", event.event_at === null ? null : at(event.event_at)],
              ["Received", at(event.received_at)],
              ["Failed attempts", count(event.attempts)],
              ["Chat", event.chat_id && copyable(event.chat_id)],
              ["May exist in OurAPI", event.outcome_unknown && "yes: the chat is read before the event is sent again"],
            ]),
          ),
          event.resolutions.length > 0 &&
            block(
              "Resolutions",
              el(
                "ul.lately",
                null,
                event.resolutions.map((resolution) => el("li", { "data-key": resolution.id }, resolved(resolution), el("span.muted", null, `by ${by(resolution)}`), ago(resolution.at), undo(resolution))),
              ),
            ),
        ),
      ),
    ];
  },
};

const BY = { console: "the console", command: "the command line" };

/** Who resolved it: a named user, the console or the command line. */
export const by = (resolution) => BY[resolution.by] ?? resolution.by;

const block = (title, ...content) => el("section.card", { "data-key": title }, el("header", null, el("h2", null, title)), content);

function attempts(event) {
  if (event.failures.length === 0) return el("p.quietly", null, event.kind === "UNREADABLE" ? "None: the event could not be parsed." : "None is recorded.");
  return el(
    "ol.attempts",
    null,
    event.failures.map((failure) =>
      el(
        "li",
        { "data-key": failure.attempt },
        el("details", null, el("summary", null, el("b", null, `${failure.attempt}.`), el("span", null, sentence(failure.reason)), ago(failure.failed_at)), request(failure.request), response(failure.response)),
      ),
    ),
    event.failures.length < event.attempts && el("li.quietly", null, `Only the last ${count(event.failures.length)} of ${count(event.attempts)} attempts are stored.`),
  );
}

function clear(reason) {
  selection.reason = reason;
  selection.ids.clear();
  selection.last = null;
}

/** The failed events that a button applies to: those that had failed when it was drawn, not those that fail later. */
function meant({ ids, reason, all, count, by }) {
  const failed_by = by && instant(by);
  if (all !== undefined) return { which: { all: true, failed_by }, number: Number(all) };
  if (reason !== undefined) return { which: { reason, failed_by }, number: Number(count) };
  const numbers = ids.split(" ").map((id) => integer(id));
  return { which: { ids: numbers }, number: numbers.length };
}

/** The actions of these views' buttons; `page` asks, announces and refreshes. */
export const actions = {
  async retry(button, page) {
    const { which, number } = meant(button.dataset);
    const done = await resolve("retry", which, page);
    page.announce(done >= number ? `${some(done, "event")} will be tried again.` : `${some(done, "event")} will be tried again; ${count(number - done)} will not (already resolved, or still unparsable).`);
    await afterResolution(page);
  },
  async discard(button, page) {
    const { which, number } = meant(button.dataset);
    const sure = await page.ask(
      `Discard ${some(number, "event")}?`,
      `${number === 1 ? "It" : "They"} will not be sent to OurAPI. You can undo this in the list of resolutions until the retention period ends.`,
      number === 1 ? "Discard" : `Discard ${count(number)}`,
    );
    if (!sure) return;
    const done = await resolve("discard", which, page);
    page.announce(`${some(done, "event")} discarded.`);
    await afterResolution(page);
  },
  async undo(button, page) {
    const { which } = meant(button.dataset);
    const done = await resolve("undo", which, page);
    page.announce(done > 0 ? `${some(done, "event")} reopened.` : "Nothing to undo: the event was resolved in another way, or dropped after the retention period.");
    await afterResolution(page);
  },
  select(box, page, event) {
    const { id } = box.dataset;
    const boxes = [...byId("main").querySelectorAll("[data-do=select]")].map((each) => each.dataset.id);
    const [from, to] = [boxes.indexOf(selection.last), boxes.indexOf(id)];
    const range = event?.shiftKey && from >= 0 ? boxes.slice(Math.min(from, to), Math.max(from, to) + 1) : [id];
    for (const each of range) {
      if (box.checked) selection.ids.add(each);
      else selection.ids.delete(each);
    }
    selection.last = id;
    page.showAgain();
  },
  "select-page"(box, page) {
    for (const id of box.dataset.ids.split(" ")) {
      if (box.checked) selection.ids.add(id);
      else selection.ids.delete(id);
    }
    page.showAgain();
  },
  "select-none"(_, page) {
    selection.ids.clear();
    page.showAgain();
  },
};

/** Repeats the request until all selected events are resolved: the daemon resolves a limited number at a time. */
async function resolve(resolution, which, page) {
  let done = 0;
  let next = 0;
  while (next !== null) {
    const piece = await post(`/api/failed/${resolution}`, { ...which, after: integer(next) });
    done += piece.done;
    next = piece.next;
    if (next !== null) page.announce(`${some(done, "event")} so far…`);
  }
  return done;
}

async function afterResolution(page) {
  selection.ids.clear();
  await page.refresh();
}

/** Whether there was a selection to clear. */
export function clearSelection() {
  const any = selection.ids.size > 0;
  selection.ids.clear();
  return any;
}
