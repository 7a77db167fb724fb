// Numbers and times for people, in this browser's time zone and by the daemon's clock.

import { el } from "./dom.js";

const number = new Intl.NumberFormat("en");
const rate = new Intl.NumberFormat("en", { maximumFractionDigits: 1 });
const clock = new Intl.DateTimeFormat("en-GB", { hour: "2-digit", minute: "2-digit", second: "2-digit" });
const date = new Intl.DateTimeFormat("en-GB", { day: "numeric", month: "short" });
const longDate = new Intl.DateTimeFormat("en-GB", { weekday: "long", day: "numeric", month: "long", year: "numeric" });

/** By how much the daemon's clock is ahead of the browser's, in ms. */
let ahead = 0;

export function setNow(now) {
  ahead = now - Date.now();
}

/** The daemon's clock. */
export const now = () => Date.now() + ahead;

export const count = (n) => number.format(n);
export const perMinute = (n) => rate.format(n);

// The marks of an axis have at most three significant digits, so that these formats round none of them.
const mark = new Intl.NumberFormat("en", { maximumSignificantDigits: 3 });
const largeMark = new Intl.NumberFormat("en", { maximumSignificantDigits: 3, notation: "compact" });

/** A mark of an axis; from a million on, in the form "1.2M". */
export const axisText = (n) => (n < 1_000_000 ? mark : largeMark).format(n);

/** "1 event", "3 events". */
export const some = (n, one, many = `${one}s`) => `${count(n)} ${n === 1 ? one : many}`;

/** The text with a capital letter at the beginning. */
export const sentence = (text) => text.charAt(0).toUpperCase() + text.slice(1);

/** A duration in ms. */
export function lasting(ms) {
  const seconds = ms / 1000;
  if (ms < 1000) return `${Math.max(0, Math.round(ms))} ms`;
  if (seconds < 10) return `${rate.format(seconds)} s`;
  if (seconds < 60) return `${Math.floor(seconds)} s`;
  const minutes = Math.floor(seconds / 60);
  if (minutes < 60) return `${minutes} min`;
  const hours = Math.floor(minutes / 60);
  if (hours < 24) return minutes % 60 ? `${hours} h ${minutes % 60} min` : `${hours} h`;
  const days = Math.floor(hours / 24);
  return hours % 24 && days < 10 ? `${days} d ${hours % 24} h` : `${count(days)} d`;
}

/** The same, rounded down to whole seconds. */
export const roughly = (ms) => (ms < 1000 ? "0 s" : lasting(Math.floor(ms / 1000) * 1000));

export function size(bytes) {
  if (bytes < 1 << 20) return `${Math.max(1, Math.round(bytes / 1024))} KiB`;
  if (bytes < 1 << 30) return `${rate.format(bytes / (1 << 20))} MiB`;
  return `${rate.format(bytes / (1 << 30))} GiB`;
}

const sameDay = (one, other) => new Date(one).toDateString() === new Date(other).toDateString();

/** The time of day, with the date unless it is today. */
export function timeText(ms) {
  return sameDay(ms, now()) ? clock.format(ms) : `${date.format(ms)}, ${clock.format(ms)}`;
}

export const clockText = (ms) => clock.format(ms);
export const dayText = (ms) => `${longDate.format(ms)}, ${zone(ms)}`;

const zones = new Intl.DateTimeFormat("en-GB", { timeZoneName: "short" });

/** The time zone of this browser at that time: "UTC", "BST", "GMT+1". */
export const zone = (ms) => zones.formatToParts(ms).find((part) => part.type === "timeZoneName").value;

/** In this browser's time zone and in UTC, to the second. */
export const fullTime = (ms) => `${date.format(ms)} ${new Date(ms).getFullYear()}, ${clock.format(ms)} ${zone(ms)} (${utc(ms)})`;

const utc = (ms) => {
  const time = new Date(ms);
  return Number.isNaN(time.getTime()) ? "-" : time.toISOString().replace(/\.\d+Z$/, "Z");
};

/** A point in time, with its zone. */
export function at(ms) {
  return el("time", { datetime: utc(ms), title: fullTime(ms) }, `${timeText(ms)} ${zone(ms)}`);
}

/** How long ago it was; updated automatically. */
export function ago(ms) {
  return el("time", { datetime: utc(ms), title: fullTime(ms), "data-ago": ms }, agoText(ms));
}

/** How long it has lasted; updated automatically. */
export function since(ms) {
  return el("time", { datetime: utc(ms), title: `since ${fullTime(ms)}`, "data-since": ms }, roughly(now() - ms));
}

function agoText(ms) {
  const passed = now() - ms;
  return passed < 1500 ? "just now" : `${roughly(passed)} ago`;
}

/** Updates these times. */
export function tick() {
  for (const time of document.querySelectorAll("time[data-ago]")) say(time, agoText(Number(time.dataset.ago)));
  for (const time of document.querySelectorAll("time[data-since]")) say(time, roughly(now() - Number(time.dataset.since)));
}

function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}
