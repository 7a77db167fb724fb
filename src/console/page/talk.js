// Conversations: search by id, chat or agent, and one in detail.

import { get } from "./daemon.js";
import { el, icon } from "./dom.js";
import { ago, at, clockText, count, dayText, fullTime, lasting, now, some } from "./format.js";
import { back, conversation, copyable, facts, head, isMessage, kind, loading, nothing, resolutions, words } from "./parts.js";

export const search = {
  tab: "search",
  title: (_, { q }) => (q ? `“${q}”` : "Conversations"),
  every: 6000,
  load: ({ q }) => get(`/api/search?q=${encodeURIComponent(q ?? "")}`),
  show(data, { params }) {
    const q = params.q ?? "";
    if (!data) return [head("Conversations"), loading(6)];
    const found = data.conversations;
    if (found.length === 0 && !data.event) {
      return [
        head("Conversations"),
        q
          ? nothing("find", `Nothing for “${q}”`, "Search by BigChat’s id of a conversation (42), by the id of an event, by OurAPI’s id of a chat, by its external id, or by an agent’s name or e-mail address.")
          : nothing("talk", "No conversation yet", "The first one is shown as soon as BigChat reports it."),
      ];
    }
    return [
      head("Conversations", q ? [`${data.more ? "The first " : ""}${some(found.length, "conversation")} for “${q}”. `, el("a", { href: "#/search" }, "Show the latest")] : "The latest; search for others by id, chat or agent."),
      data.event && el("p.card", null, kind(data.event.name), " ", el("a", { href: `#/failed/${data.event.id}` }, `Event #${data.event.id}`), data.event.conversation !== null && [" in conversation ", conversation(data.event.conversation_key, data.event.conversation)]),
      found.length > 0 && el(
        "ul.found.card",
        { "data-list": "conversations" },
        found.map((one) =>
          el(
            "li",
            { "data-key": one.key },
            el(
              "a",
              { href: `#/conversations/${one.key}`, "data-step": "", tabindex: -1 },
              el("b", null, `Conversation ${one.conversation}`, one.epoch < one.current_epoch && el("small", null, `of epoch ${one.epoch}, before BigChat restarted`)),
              el("span.who", null, who(one)),
              el("span.when", null, one.started_at === null ? el("span.muted", null, "start unknown") : at(one.started_at)),
              state(one),
            ),
          ),
        ),
      ),
    ];
  },
};

function who(one) {
  if (one.no_agent !== null) return ["no agent", el("small", null, one.no_agent)];
  return one.agent_name ? [one.agent_name, el("small", null, one.agent_email)] : (one.agent_email ?? one.chat_agent);
}

function state(one) {
  if (one.forgotten_at !== null) return el("span.chip", null, "forgotten");
  if (one.failed.length > 0) return el("span.chip.bad", null, `${count(one.failed.length)}${one.more_failed ? "+" : ""} failed`);
  if (one.missing !== null) return el("span.chip.bad", null, "not complete in OurAPI");
  if (one.waiting > 0) return el("span.chip.wait", null, `${count(one.waiting)} waiting`);
  if (one.discarded > 0) return el("span.chip", null, `${count(one.discarded)} discarded`);
  if (one.chat_id === null) return el("span.chip", null, "no chat yet");
  return one.ended_at === null ? el("span.chip.fine", null, "all delivered") : el("span.chip.fine", null, "all delivered, ended");
}

export const talk = {
  tab: "search",
  title: (data) => (data ? `Conversation ${data.conversation.conversation}` : "Conversation"),
  every: 4000,
  load: ({ id, after }) => get(`/api/conversations/${id}${after ? `?after=${encodeURIComponent(after)}` : ""}`),
  show(data, { params }) {
    if (!data) return loading(9);
    const one = data.conversation;
    const page = (after) => `#/conversations/${one.key}${after ? `?after=${after}` : ""}`;
    return [
      back("#/search", "Conversations"),
      head(
        `Conversation ${one.conversation}`,
        [state(one), " ", one.forgotten_at !== null && [`Its text was erased by ${one.forgotten_by}: `, at(one.forgotten_at), ". "], one.epoch < one.current_epoch && "From an earlier epoch: since BigChat restarted, this id means another conversation."],
        one.failed.length > 0 && resolutions(one.permanent, { "data-ids": one.failed.join(" ") }, `Retry ${failedOf(one)}`, `Discard ${failedOf(one)}…`),
      ),
      el(
        "div.sides",
        null,
        el(
          "section.card.talk",
          { "aria-labelledby": "events" },
          el("header", null, el("h2", { id: "events" }, "Events"), el("span.muted", null, "in order of arrival")),
          data.events.length === 0 ? el("p.quietly", null, "No events are stored: they were dropped, or none has been received yet.") : el("ol.line", { "data-list": "line" }, days(data.events)),
          (params.after || data.next !== null) && el("p.pages", null, params.after && el("a", { href: page() }, "From the beginning"), data.next !== null && el("a", { href: page(data.next) }, "Next page")),
        ),
        el(
          "aside",
          { "aria-label": "The chat in OurAPI" },
          el(
            "section.card",
            null,
            el("header", null, el("h2", null, "Chat in OurAPI")),
            one.chat_id === null && el("p.quietly", null, "There is none yet."),
            facts([
              ["Id", one.chat_id && copyable(one.chat_id)],
              ["External id", one.external_id && copyable(one.external_id)],
              ["Started", time(one.chat_started_at)],
              ["Ended", one.chat_id && (one.chat_ended_at === null ? "not yet" : time(one.chat_ended_at))],
              ["Missing", one.missing && `OurAPI has lost ${one.missing}; not restored`],
              ["Stale", one.stale && "it is read back before anything is sent"],
            ]),
          ),
          el(
            "section.card",
            null,
            el("header", null, el("h2", null, "Agent")),
            one.no_agent !== null
              ? el("p.quietly", null, "None: ", one.no_agent, ".")
              : facts([
                  ["Name", one.agent_name || null],
                  ["E-mail", one.agent_email && el("a", { href: `#/search?q=${encodeURIComponent(one.agent_email)}` }, one.agent_email)],
                  ["Id", copyable(one.chat_agent)],
                ]),
          ),
          el(
            "section.card",
            null,
            el("header", null, el("h2", null, "In BigChat")),
            facts([
              ["Started", time(one.started_at) ?? "not known"],
              ["Last END", time(one.ended_at)],
              ["First advisor", one.first_advisor],
              ["Latest advisor", one.transfer_at === null ? null : [`${one.transfer_advisor}, set by the TRANSFER of `, time(one.transfer_at)]],
              ["Details", { unread: "not read yet", read: null, gone: "BigChat does not know the conversation, or has no usable record" }[one.details]],
            ]),
          ),
        ),
      ),
    ];
  },
};

const failedOf = (one) => (one.failed.length === 1 ? "the failed event" : `the ${one.more_failed ? "first " : ""}${count(one.failed.length)} failed events`);

const time = (ms) => (ms === null ? null : at(ms));

function days(events) {
  let day = null;
  let latest = -Infinity;
  return events.flatMap((event) => {
    const happened = event.event_at;
    const today = dayText(happened);
    const late = happened < latest;
    latest = Math.max(latest, happened);
    const item = entry(event, happened, late);
    if (today === day) return [item];
    day = today;
    return [el("li.day", { "data-key": `day ${event.id}` }, el("span", null, today)), item];
  });
}

function entry(event, happened, late) {
  return el(
    "li.entry",
    { "data-key": event.id, "data-kind": event.kind, "data-state": event.state, tabindex: -1, "data-step": "" },
    el("time", { datetime: new Date(happened).toISOString(), title: fullTime(happened) }, clockText(happened)),
    el(
      "div.what",
      null,
      isMessage(event.kind) ? el("p.words", null, words(event.text), event.text_truncated && [" … ", el("a", { href: `#/failed/${event.id}` }, "show all of it")]) : el("p.change", null, kind(event.kind), event.text && ` ${event.text}`),
      el("p.fate", null, fate(event), late && el("span.muted", { title: "It happened before an event that was received earlier." }, "out of order")),
    ),
  );
}

function fate(event) {
  switch (event.state) {
    case "delivered":
      return el("span.fine", null, icon("check"), SENT[event.effect] ?? "delivered", " ", at(event.state_since), el("span.muted", null, `, ${lasting(Math.max(0, event.state_since - event.received_at))} after it was received`));
    case "waiting":
      return el("span.wait", null, icon("clock"), event.reason ? `waiting${event.attempts > 0 ? ` after ${some(event.attempts, "failure")}` : ""}: ${event.reason}` : ["waiting, received ", ago(event.received_at)], event.next_at > now() && `; next attempt in ${lasting(event.next_at - now())}`);
    case "failed":
      return el("a.bad", { href: `#/failed/${event.id}` }, icon("cross"), `failed: ${event.reason}`);
    case "forgotten":
      return el("span.muted", null, "its text was erased");
    default:
      return el("a.muted", { href: `#/failed/${event.id}` }, icon("cross"), "discarded ", at(event.state_since));
  }
}

const SENT = {
  "chat created": "chat created",
  "chat changed": "chat changed",
  "message added": "message added",
  nothing: "nothing sent (OurAPI already had it, or a later event overrides it)",
};
