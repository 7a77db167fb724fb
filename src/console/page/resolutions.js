// The record of how failed events were resolved.

import { get } from "./daemon.js";
import { el } from "./dom.js";
import { at, sentence } from "./format.js";
import { conversation, head, kind, loading, nothing, resolved, undo } from "./parts.js";
import { by } from "./failed.js";

export const resolutions = {
  tab: "resolutions",
  title: () => "Resolutions",
  every: 6000,
  load: ({ before }) => get(`/api/resolutions${before ? `?before=${encodeURIComponent(before)}` : ""}`),
  show(data, { params }) {
    const title = head("Resolutions", "Who retried, discarded or reopened which failed event. This record is permanent.");
    if (!data) return [title, loading(6)];
    if (data.rows.length === 0) return [head("Resolutions"), nothing("audit", "Nothing has been resolved yet", "Each retry, discard and reopening of a failed event is recorded here, whether done in the console or with a command.")];
    return [
      title,
      el(
        "div.card.scroll",
        null,
        el(
          "table.audit",
          null,
          el("thead", null, el("tr", null, ["When", "What", "Event", "Conversation", "Reason for the failure", "By"].map((name) => el("th", { scope: "col" }, name)))),
          el(
            "tbody",
            null,
            data.rows.map((resolution) =>
              el(
                "tr",
                { "data-key": resolution.id },
                el("td", null, at(resolution.at)),
                el("td", null, resolved(resolution), " ", undo(resolution)),
                el("td", null, kind(resolution.kind), " ", el("a", { href: `#/failed/${resolution.event}` }, `#${resolution.event}`)),
                el("td", { "data-name": "Conversation" }, conversation(resolution.conversation_key, resolution.conversation)),
                el("td.why", null, sentence(resolution.reason)),
                el("td", { "data-name": "By" }, by(resolution)),
              ),
            ),
          ),
        ),
      ),
      (params.before || data.next !== null) && el("p.pages", null, params.before && el("a", { href: "#/resolutions" }, "Latest"), data.next !== null && el("a", { href: `#/resolutions?before=${data.next}` }, "Older")),
    ];
  },
};
