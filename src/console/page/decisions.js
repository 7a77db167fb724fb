// The record of what was decided about failed events.

import { get } from "./daemon.js";
import { el } from "./dom.js";
import { at, sentence } from "./format.js";
import { conversation, head, kind, loading, nothing, resolved, undo } from "./parts.js";
import { by } from "./failed.js";

export const decisions = {
  tab: "decisions",
  title: () => "Decisions",
  every: 6000,
  load: ({ before }) => get(`/api/decisions${before ? `?before=${encodeURIComponent(before)}` : ""}`),
  show(data, { params }) {
    const title = head("Decisions", "Who retried, discarded or reopened which failed event. Kept for good.");
    if (!data) return [title, loading(6)];
    if (data.rows.length === 0) return [head("Decisions"), nothing("audit", "Nobody has decided anything yet", "Each retry and each discard of a failed event is recorded here, by whichever way it was done.")];
    return [
      title,
      el(
        "div.card.scroll",
        null,
        el(
          "table.audit",
          null,
          el("thead", null, el("tr", null, ["When", "What", "Event", "Conversation", "It had failed since", "By"].map((name) => el("th", { scope: "col" }, name)))),
          el(
            "tbody",
            null,
            data.rows.map((decision) =>
              el(
                "tr",
                { "data-key": decision.id },
                el("td", null, at(decision.at)),
                el("td", null, resolved(decision), " ", undo(decision)),
                el("td", null, kind(decision.kind), " ", el("a", { href: `#/failed/${decision.event}` }, `#${decision.event}`)),
                el("td", { "data-name": "Conversation" }, conversation(decision.conversation_key, decision.conversation)),
                el("td.why", null, sentence(decision.reason)),
                el("td", { "data-name": "By" }, by(decision)),
              ),
            ),
          ),
        ),
      ),
      (params.before || data.next !== null) && el("p.pages", null, params.before && el("a", { href: "#/decisions" }, "Latest"), data.next !== null && el("a", { href: `#/decisions?before=${data.next}` }, "Older")),
    ];
  },
};
