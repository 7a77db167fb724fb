// The console: chooses the view, keeps it up to date, and handles keys and buttons.
//
// While the page is visible, it regularly requests the daemon's status. Without a response, the last state stays on the
// screen, marked as old, and nothing can be resolved.

import { Denied, get, KEY, Lost, post, Refused } from "./daemon.js";
import { listen } from "./chart.js";
import { resolutions } from "./resolutions.js";
import { byId, el, icon, show, visibleText } from "./dom.js";
import { actions, clearSelection, event, failed } from "./failed.js";
import { ago, count, lasting, setNow, some, tick } from "./format.js";
import { overview, watch } from "./overview.js";
import { head, loading, nothing } from "./parts.js";
import { banner, pauseActions } from "./pause.js";
import { search, talk } from "./talk.js";

/** How often the status is requested. */
const BEAT = 2000;
/** The longest wait between attempts while there is no response. */
const LONGEST = 15_000;

const ROUTES = [
  [/^\/?$/, overview],
  [/^\/failed$/, failed],
  [/^\/failed\/(?<id>\d{1,19})$/, event],
  [/^\/search$/, search],
  [/^\/conversations\/(?<id>\d{1,19})$/, talk],
  [/^\/resolutions$/, resolutions],
];

const nowhere = { title: () => "Not found", load: async () => ({}), show: () => nothing("find", "There is no such page", "The link may be from another version.") };

/** What is shown. A response to an older request than `asked` is dropped. */
const now = { view: null, params: {}, shown: {}, data: null, error: null, asked: 0, loadedAt: 0 };
let status = null;
let version = null;
let guarded = false;

/** Whether there is a connection, and when the next attempt is due. */
const line = { lost: false, since: null, wait: BEAT, at: 0, last: null, trying: false };

// --- which view

function route() {
  const [path, query] = location.hash.replace(/^#/, "").split("?");
  const params = Object.fromEntries(new URLSearchParams(query ?? ""));
  for (const [pattern, view] of ROUTES) {
    const found = pattern.exec(path);
    if (found) return { view, params: { ...params, ...found.groups } };
  }
  return { view: nowhere, params };
}

async function go() {
  const { view, params } = route();
  const same = now.view === view && now.params.id === params.id;
  Object.assign(now, { view, params, error: null, data: same ? now.data : null });
  // While the data of the previous request is shown, `shown` remains that request.
  if (now.data === null) now.shown = params;
  for (const tab of document.querySelectorAll("[data-tab]")) {
    if (tab.dataset.tab === view.tab) tab.setAttribute("aria-current", "page");
    else tab.removeAttribute("aria-current");
  }
  if (view === search) byId("q").value = params.q ?? "";
  if (guarded) return;
  showAgain();
  if (!same) scrollTo(0, 0);
  await load();
  // A screen reader announces the new view and continues there.
  if (document.activeElement === document.body || !document.activeElement?.isConnected) byId("title")?.focus({ preventScroll: true });
}

async function load() {
  const asked = ++now.asked;
  const { view, params } = now;
  try {
    const data = await view.load(params);
    if (asked !== now.asked) return;
    Object.assign(now, { data, shown: params, error: null });
    found();
  } catch (error) {
    if (asked !== now.asked) return;
    if (error instanceof Lost) lose();
    else if (error instanceof Denied) return signIn();
    else if (error instanceof Refused) now.error = error;
    else throw error;
  }
  now.loadedAt = Date.now();
  showAgain();
}

function showAgain() {
  if (guarded) return;
  const main = byId("main");
  const focused = main.contains(document.activeElement) && document.activeElement !== main;
  const title = visibleText(now.view.title(now.data, now.shown));
  document.title = `${status?.failed ? `(${count(status.failed)}) ` : ""}${title} · bigchat-sync`;
  if (now.error) show(main, head(now.error.status === 404 ? "Not found" : "The request failed"), nothing("failed", now.error.message, now.error.status === 404 ? "It may have been dropped: delivered and discarded events are stored only for the retention period." : "The request is retried automatically."));
  else if (!now.data && line.lost) show(main, head(title), nothing("clock", "Waiting for bigchat-sync", "This page loads as soon as it responds."));
  else show(main, now.view.show(now.data, { status, params: now.shown }));
  main.toggleAttribute("data-busy", !now.data && !now.error);
  rove(main);
  // The focused element may be gone. Then a screen reader continues at the beginning of the view.
  if (focused && !main.contains(document.activeElement)) byId("title")?.focus({ preventScroll: true });
  now.view.shown?.(now.data);
}

// --- keeping up to date

async function beat() {
  line.trying = true;
  try {
    const next = await get("/api/status");
    found();
    if (version !== null && next.version !== version) location.reload();
    version = next.version;
    setNow(next.now);
    announceChange(status, next);
    const first = status === null;
    status = next;
    header();
    if (Date.now() - now.loadedAt >= (now.view.every ?? Infinity)) await load();
    else if (first || now.view === overview) showAgain();
  } catch (error) {
    if (error instanceof Lost) lose();
    else if (error instanceof Denied) signIn();
    else if (error instanceof Refused) {
      found();
      byId("live").dataset.state = "unhealthy";
      say("live", error.message);
    } else throw error;
  } finally {
    line.trying = false;
    line.at = Date.now() + line.wait;
  }
}

function lose() {
  if (!line.lost) Object.assign(line, { lost: true, since: Date.now(), wait: BEAT / 2 });
  line.wait = Math.min(line.wait * 2, LONGEST);
  line.at = Date.now() + line.wait;
  lost();
}

function found() {
  Object.assign(line, { wait: BEAT, last: Date.now() });
  if (!line.lost) return;
  line.lost = false;
  lost();
  announce("Connected again.");
  now.loadedAt = 0;
}

function lost() {
  document.documentElement.toggleAttribute("data-lost", line.lost);
  byId("lost").hidden = !line.lost;
  if (line.lost)
    show(
      byId("lost"),
      el("p", null, el("b", null, "No connection to bigchat-sync."), line.last === null ? " It may not be running." : [" The data shown is from ", ago(line.last), "."]),
      el("span.muted", { id: "again", "aria-hidden": "true" }),
      el("button", { type: "button", "data-do": "again" }, "Try now"),
    );
  else show(byId("lost"));
  header();
}

function header() {
  const live = byId("live");
  const state = line.lost ? "lost" : status === null ? "loading" : status.healthy ? "healthy" : "unhealthy";
  live.dataset.state = state;
  say("live", { lost: "Offline", loading: "Connecting", healthy: "Healthy", unhealthy: "Needs attention" }[state]);
  const badge = byId("failed-count");
  badge.hidden = !status?.failed;
  badge.textContent = status?.failed > 999 ? "999+" : String(status?.failed ?? "");
  banner(guarded ? null : (status?.paused ?? null));
  badge.setAttribute("aria-label", some(status?.failed ?? 0, "failed event"));
}

function say(id, text) {
  const element = byId(id).querySelector("span");
  if (element.textContent !== text) element.textContent = text;
}

/** Announces changes of the APIs' states, and newly failed events, to screen readers. */
function announceChange(before, next) {
  if (before === null) return;
  const news = [];
  for (const [key, name] of [["bigchat", "BigChat"], ["our_api", "OurAPI"]]) {
    const is = next[key].state;
    if (before[key].state !== is && is !== "unknown") news.push(`${name} is ${is}.`);
  }
  if (next.failed > before.failed) news.push(`${some(next.failed - before.failed, "more event")} failed.`);
  if (news.length > 0) byId("announcement").textContent = news.join(" ");
}

setInterval(() => {
  tick();
  if (guarded || document.hidden) return;
  const again = byId("again");
  if (again) again.textContent = line.trying ? "trying…" : `next try in ${lasting(Math.max(1000, Math.ceil((line.at - Date.now()) / 1000) * 1000))}`;
  if (!line.trying && Date.now() >= line.at) beat();
}, 500);

document.addEventListener("visibilitychange", () => {
  if (!document.hidden && !line.trying) beat();
});
addEventListener("online", () => beat());

// --- the token

function signIn(wrong) {
  guarded = true;
  byId("leave").hidden = true;
  document.documentElement.dataset.guarded = "";
  document.title = "Sign in · bigchat-sync";
  show(
    byId("main"),
    el(
      "form.door.card",
      { id: "door" },
      icon("overview"),
      el("h1", { id: "title", tabindex: -1 }, "Sign in"),
      el("p.under", null, "Enter the token of the console: the value of ", el("code", null, "BIGCHAT_SYNC_CONSOLE_TOKEN"), ", or the content of its token file."),
      el("label", { for: "token" }, "Token"),
      el("input", { id: "token", name: "token", type: "password", required: true, autocomplete: "current-password", "aria-describedby": wrong ? "wrong" : null, "aria-invalid": wrong ? "true" : null }),
      wrong && el("p.bad", { id: "wrong", role: "alert" }, wrong),
      el("button", { type: "submit" }, "Sign in"),
    ),
  );
  byId("token").focus();
  byId("token").select();
}

/** The button to sign out, after a login. */
function leaving() {
  byId("leave").hidden = remembered(KEY) === null;
}

async function enter(form) {
  const button = form.querySelector("button");
  button.disabled = true;
  try {
    const { key } = await post("/api/login", { token: byId("token").value });
    remember(KEY, key);
    guarded = false;
    delete document.documentElement.dataset.guarded;
    leaving();
    show(byId("main"), loading());
    await beat();
    await go();
  } catch (error) {
    button.disabled = false;
    if (error instanceof Denied) signIn("Wrong token.");
    else if (error instanceof Refused) signIn(error.message);
    else if (error instanceof Lost) signIn("bigchat-sync does not answer.");
    else throw error;
  }
}

// --- questions and announcements

let asking = null;

function ask(title, text, yes) {
  byId("ask-title").textContent = title;
  byId("ask-text").textContent = text;
  byId("ask-yes").textContent = yes;
  byId("ask").showModal();
  return new Promise((resolve) => (asking = resolve));
}

function answer(yes) {
  asking?.(yes);
  asking = null;
}

// The browser reports the close only after the dialog has gone. By then the next question may be open, so the answer
// counts as soon as it is given.
byId("ask").addEventListener("submit", (event) => answer(event.submitter?.value === "yes"));
byId("ask").addEventListener("cancel", () => answer(false));
byId("ask").addEventListener("close", () => byId("ask").open || answer(false));

let silence;

function announce(text) {
  const toast = byId("toast");
  show(toast, el("p", null, text));
  toast.toggleAttribute("data-on", true);
  clearTimeout(silence);
  silence = setTimeout(() => toast.removeAttribute("data-on"), 6000);
}

async function refresh() {
  await Promise.all([beat(), load()]);
}

const page = { ask, announce, refresh, showAgain };

const buttons = {
  ...actions,
  ...pauseActions,
  again: () => beat(),
  theme: () => {
    const chosen = THEMES[(THEMES.indexOf(document.documentElement.dataset.theme) + 1) % THEMES.length];
    remember("theme", chosen);
    document.documentElement.dataset.theme = chosen;
    themeButton();
    announce({ system: "Theme: system.", light: "Theme: light.", dark: "Theme: dark." }[chosen]);
  },
  help: () => byId("help").showModal(),
  leave: async () => {
    await post("/api/logout");
    remember(KEY, null);
    location.reload();
  },
  copy: async (button) => {
    await navigator.clipboard.writeText(button.dataset.text);
    announce("Copied.");
  },
};

async function act(element, why) {
  // A second click is ignored while the first is in progress.
  if (element.hasAttribute("data-busy")) return;
  const changes = ["retry", "discard", "undo", "pause", "resume"].includes(element.dataset.do);
  if (changes && line.lost) return announce("Not now: there is no connection.");
  element.toggleAttribute("data-busy", true);
  try {
    await buttons[element.dataset.do](element, page, why);
  } catch (error) {
    if (error instanceof Lost) {
      lose();
      announce(changes ? "No response. Check the result before you try again." : "There is no connection.");
    } else if (error instanceof Denied) signIn();
    else if (error instanceof Refused) announce(error.message);
    else throw error;
  } finally {
    element.removeAttribute("data-busy");
  }
}

function themeButton() {
  const name = document.documentElement.dataset.theme;
  byId("theme").title = `Theme: ${name} (t)`;
  byId("theme").querySelector("span").textContent = `Theme: ${name}`;
}

document.addEventListener("click", (event) => {
  const skip = event.target.closest(".skip");
  if (skip) {
    event.preventDefault();
    byId("main").focus();
  }
  const element = event.target.closest("[data-do]");
  if (element) act(element, event);
});

document.addEventListener("submit", (event) => {
  if (event.target.method === "dialog") return;
  event.preventDefault();
  if (event.target.id === "door") enter(event.target);
  if (event.target.id === "find") {
    location.hash = `#/search?q=${encodeURIComponent(byId("q").value.trim().toWellFormed())}`;
    byId("q").blur();
  }
});

// --- keys

/** One entry of each list is reached with the tab key, the others with the arrows. */
function rove(root) {
  for (const list of root.querySelectorAll("[data-list]")) {
    const rows = [...list.children].filter((row) => steps(row).length > 0);
    const at = rows.find((row) => steps(row).some((step) => step.tabIndex === 0)) ?? rows.find((row) => row.querySelector("[aria-current]")) ?? rows[0];
    for (const row of rows) for (const step of steps(row)) step.tabIndex = row === at ? 0 : -1;
  }
}

const steps = (row) => (row.dataset.step !== undefined ? [row] : [...row.querySelectorAll("[data-step]")]);

/** Moves the focus along its list, or to the first list. */
function move(by) {
  const focused = document.activeElement;
  const list = focused.closest("[data-list]") ?? ["[data-list=events]", "[data-list]"].map((what) => byId("main").querySelector(what)).find(Boolean);
  if (!list) return false;
  const rows = [...list.children].filter((row) => steps(row).length > 0);
  const from = rows.findIndex((row) => row.contains(focused));
  const to = from < 0 ? (rows.find((row) => steps(row)[0].tabIndex === 0) ?? rows[0]) : rows[Math.min(Math.max(from + by, 0), rows.length - 1)];
  const column = from < 0 ? -1 : steps(rows[from]).indexOf(focused);
  for (const row of rows) for (const step of steps(row)) step.tabIndex = row === to ? 0 : -1;
  (steps(to)[column] ?? steps(to).at(-1)).focus();
  return true;
}

let prefix = null;

const GO = { o: "#/", f: "#/failed", c: "#/search", d: "#/resolutions" };

function onKey(key) {
  if (prefix === "g") {
    prefix = null;
    if (GO[key]) return (location.hash = GO[key]), true;
  }
  const row = document.activeElement.closest("[data-event]");
  const resolveNamed = (what) => {
    const button = document.querySelector(`.chosen:not([hidden]) [data-do=${what}]`) ?? (now.view === event ? byId("main").querySelector(`.head [data-do=${what}]`) : null);
    if (button) return button.click(), true;
    if (!row) return false;
    act(el("button", { "data-do": what, "data-ids": row.dataset.event }));
    return true;
  };
  switch (key) {
    case "g":
      prefix = "g";
      setTimeout(() => (prefix = null), 1500);
      return true;
    case "/":
      byId("q").focus();
      byId("q").select();
      return true;
    case "j":
      return move(1);
    case "k":
      return move(-1);
    case "x":
      row?.querySelector("input")?.click();
      return row !== null;
    case "r":
      return resolveNamed("retry");
    case "d":
      return resolveNamed("discard");
    case "t":
      byId("theme").click();
      return true;
    case "?":
      byId("help").showModal();
      return true;
    default:
      return false;
  }
}

document.addEventListener("keydown", (event) => {
  if (event.defaultPrevented || event.ctrlKey || event.metaKey || event.altKey || document.querySelector("dialog[open]") || guarded) return;
  const writes = event.target.closest("input:not([type=checkbox]), textarea, select");
  if (event.key === "Escape") {
    if (writes) writes.blur();
    else if (clearSelection()) showAgain();
    else byId("main").querySelector(".back a")?.click();
    return;
  }
  if (writes) return;
  const arrows = { ArrowDown: 1, ArrowUp: -1 }[event.key];
  if (arrows && event.target.closest("[data-list]") && move(arrows)) return event.preventDefault();
  if (byId("keys-on").checked && onKey(event.key)) event.preventDefault();
});

document.addEventListener("focusin", (event) => {
  const list = event.target.dataset?.step !== undefined && event.target.closest("[data-list]");
  if (!list) return;
  for (const row of list.children) for (const step of steps(row)) step.tabIndex = row.contains(event.target) ? 0 : -1;
});

byId("keys-on").checked = remembered("keys") !== "off";
byId("keys-on").addEventListener("change", (event) => remember("keys", event.target.checked ? "on" : "off"));

// --- begin

themeButton();
leaving();
listen(document);
watch(() => (now.view === overview && !guarded ? now.data : null));
addEventListener("hashchange", go);
go();
beat();
