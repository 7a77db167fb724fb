// Events a minute by kind: events received as stacked bars, deliveries as a line, failures below.

import { byId, el, show, svg } from "./dom.js";
import { axisText, clockText, count, now, perMinute, some, timeText, zone } from "./format.js";

const HEIGHT = 232;
const EDGE = { top: 10, right: 4, bottom: 38 };
/** The gap between the labels of the axis and the bars. */
const AXIS_GAP = 8;
const LANE = 6;
const TICKS = [1, 2, 5, 10, 15, 30, 60, 120, 180, 240, 360, 720, 1440];

const MINUTE = 60_000;

/** The buckets of an answer of /api/activity, the gaps filled. */
export function buckets({ from, to, step, minutes }) {
  const all = [];
  for (let minute = from; minute <= to; minute += step) {
    all.push({ minute, received: {}, sum: 0, delivered: 0, failed: 0, length: Math.min(step, to - minute + 1), running: minute + step > to });
  }
  for (const { minute, kind, received, delivered, failed } of minutes) {
    const bucket = all[Math.floor((minute - from) / step)];
    if (!bucket) continue;
    bucket.received[kind] = (bucket.received[kind] ?? 0) + received;
    bucket.sum += received;
    bucket.delivered += delivered;
    bucket.failed += failed;
  }
  // The current minute is not over.
  const last = all.at(-1);
  if (last) last.length = Math.max(0.25, last.length - 1 + ((now() / MINUTE) % 1));
  return all;
}

const start = (bucket) => bucket.minute * MINUTE;
const span = (bucket, step) => (step === 1 ? clockText(start(bucket)).slice(0, 5) : `${timeText(start(bucket)).slice(0, -3)} to ${clockText(start(bucket) + step * MINUTE).slice(0, 5)}`);

/** The counts of a bucket in words. */
function words(bucket, step) {
  const kinds = Object.entries(bucket.received).filter(([, received]) => received).map(([kind, received]) => `${count(received)} ${kind}`);
  const parts = [`${span(bucket, step)} ${zone(start(bucket))}: ${some(bucket.sum, "event")}`, ...kinds, `${count(bucket.delivered)} delivered`];
  if (bucket.failed) parts.push(`${count(bucket.failed)} failed`);
  return parts.join(", ");
}

let drawn = null;
let place = null;
/** The selected bucket, counted from the latest. */
let pointed = null;

/** Draws `activity` into the page's chart, at its current width. */
export function draw(activity) {
  const host = byId("chart");
  if (!host) return;
  const step = activity.step;
  const all = buckets(activity);
  const width = Math.max(240, host.clientWidth);
  // Deliveries after an outage would dwarf all other values, so their line is cut off at the top.
  const highest = (what) => Math.max(...all.map((bucket) => bucket[what] / bucket.length), 0);
  const received = highest("sum");
  const scale = niceScale(received > 0 ? Math.max(received, Math.min(highest("delivered"), received * 1.25)) : highest("delivered"));
  const marks = scale.marks.map((value) => [value, axisText(value)]);
  const edge = Math.max(34, Math.ceil(widest(host, marks.map(([, label]) => label)) + AXIS_GAP + 2));
  const inner = { width: width - edge - EDGE.right, height: HEIGHT - EDGE.top - EDGE.bottom };
  const x = (index) => edge + (index * inner.width) / all.length;
  const y = (value) => EDGE.top + inner.height * (1 - value / scale.top);
  const base = y(0);
  const gap = inner.width / all.length > 5 ? 1.5 : 0.6;
  const wide = Math.max(1, inner.width / all.length - gap);

  const picture = svg("svg", { width, height: HEIGHT, viewBox: `0 0 ${width} ${HEIGHT}`, "aria-hidden": "true" });
  for (const [value, label] of marks) {
    picture.append(
      svg(value === 0 ? "line.base" : "line.grid", { x1: edge, x2: width - EDGE.right, y1: y(value), y2: y(value) }),
      svg("text.axis", { x: edge - AXIS_GAP, y: y(value) + 4, "text-anchor": "end" }, label),
    );
  }
  const pointer = svg("rect.pointer", { y: EDGE.top, width: wide + gap, height: inner.height + 12 + LANE, rx: 2 });
  picture.append(pointer);
  const line = [];
  all.forEach((bucket, index) => {
    let below = 0;
    for (const kind of activity.kinds) {
      const value = (bucket.received[kind] ?? 0) / bucket.length;
      if (value === 0) continue;
      const [bottom, top] = [y(below), y(below + value)];
      below += value;
      picture.append(svg(`rect.received.${kind.toLowerCase()}`, { x: x(index) + gap / 2, y: top, width: wide, height: Math.max(0.5, bottom - top), "data-running": bucket.running || null }));
    }
    if (bucket.failed) picture.append(svg("rect.fell", { x: x(index) + gap / 2, y: base + 4, width: Math.max(2, wide), height: LANE, rx: 1.5 }));
    if (!bucket.running) line.push(`${(x(index) + wide / 2).toFixed(1)},${y(Math.min(bucket.delivered / bucket.length, scale.top)).toFixed(1)}`);
  });
  if (all.some((bucket) => bucket.delivered)) picture.append(svg("polyline.delivered", { points: line.join(" ") }));
  for (const [index, label, anchor] of hours(all, step, inner.width)) {
    const middle = x(index);
    picture.append(svg("line.mark", { x1: middle, x2: middle, y1: base + 14, y2: base + 18 }), svg("text.axis", { x: middle, y: base + 31, "text-anchor": anchor }, label));
  }

  // The last kind is UNREADABLE, for events that could not be parsed. Usually there are none.
  const kinds = activity.kinds.filter((kind, index, { length }) => index < length - 1 || all.some((bucket) => bucket.received[kind]));
  const receivedOf = (kind) => all.reduce((sum, bucket) => sum + (bucket.received[kind] ?? 0), 0);
  const sum = (what) => all.reduce((sum, bucket) => sum + bucket[what], 0);
  show(
    byId("legend"),
    kinds.map((kind) => el("li", { title: `${count(receivedOf(kind))} received` }, el(`i.swatch.${kind.toLowerCase()}`), kind, el("b", null, count(receivedOf(kind))))),
    el("li", { title: "delivered to OurAPI" }, el("i.swatch.line"), "delivered", el("b", null, count(sum("delivered")))),
    sum("failed") > 0 && el("li", null, el("i.swatch.fell"), "failed", el("b", null, count(sum("failed")))),
  );
  show(byId("chart-none"), sum("sum") + sum("delivered") + sum("failed") === 0 && el("p", null, "Nothing was received in this period."));
  host.querySelector("svg")?.remove();
  host.prepend(picture);
  drawn = { all, step, kinds, pointer };
  place = { x, gap, wide, width, edge };
  point(pointed);
  table(all, step, kinds);
}

function table(all, step, kinds) {
  const body = byId("chart-table");
  if (!body?.closest("details").open) return show(body);
  const head = [`From (${zone(now())})`, ...kinds, "All", "Delivered", "Failed"];
  show(
    body,
    el(
      "table",
      null,
      el("caption.unseen", null, `Events by kind, ${step === 1 ? "minute by minute" : `for every ${step} minutes`}, the latest first`),
      el("thead", null, el("tr", null, head.map((name) => el("th", { scope: "col" }, name)))),
      el("tbody", null, all.toReversed().map((bucket) => el("tr", { "data-key": bucket.minute }, el("th", { scope: "row" }, timeText(start(bucket)).slice(0, -3)), [...kinds.map((kind) => bucket.received[kind] ?? 0), bucket.sum, bucket.delivered, bucket.failed].map((n) => el("td", { class: n ? null : "faint" }, count(n)))))),
    ),
  );
}

/** A round maximum, and round marks up to it. */
function niceScale(most) {
  const highest = most > 0 ? Math.max(most, 1) : 4;
  const rough = highest / 4;
  const power = 10 ** Math.floor(Math.log10(rough));
  const unit = [1, 2, 2.5, 3, 4, 5, 10].map((factor) => factor * power).find((candidate) => candidate >= rough);
  const marks = [];
  for (let value = 0; value < highest + unit * 0.999; value += unit) marks.push(Math.round(value * 1000) / 1000);
  return { top: marks.at(-1), marks };
}

/** The width of the widest label of an axis, in the page's font. */
function widest(host, labels) {
  const probe = svg("svg", { width: 0, height: 0, "aria-hidden": "true" }, labels.map((label) => svg("text.axis", null, label)));
  host.append(probe);
  const widths = [...probe.children].map((label) => label.getComputedTextLength());
  probe.remove();
  return Math.max(...widths);
}

/** The labels of the time axis: at round times of day in this time zone, as many as fit. */
function hours(all, step, width) {
  const room = Math.max(2, Math.floor(width / 84));
  const minutes = all.length * step;
  const every = TICKS.find((tick) => minutes / tick <= room) ?? 1440;
  const labels = [];
  all.forEach((bucket, index) => {
    const time = new Date(start(bucket));
    const ofDay = time.getHours() * 60 + time.getMinutes();
    if (ofDay % every >= step) return;
    const x = (index * width) / all.length;
    if (x > width - 18) return;
    const label = every >= 1440 || (ofDay < step && minutes > 1440) ? time.toLocaleDateString("en-GB", { weekday: "short", day: "numeric" }) : clockText(time).slice(0, 5);
    labels.push([index, label, x < 16 ? "start" : "middle"]);
  });
  return labels;
}

/** Selects the bucket `back` steps before the latest; `null` selects none. */
function point(back) {
  const tip = byId("chart-tip");
  const slider = byId("chart-slider");
  if (!drawn || !tip) return;
  const last = drawn.all.length - 1;
  pointed = back === null ? null : Math.min(Math.max(back, 0), last);
  const bucket = drawn.all[last - (pointed ?? 0)];
  slider.setAttribute("aria-valuemax", last);
  slider.setAttribute("aria-valuenow", last - (pointed ?? 0));
  slider.setAttribute("aria-valuetext", words(bucket, drawn.step));
  drawn.pointer.toggleAttribute("data-on", pointed !== null);
  tip.hidden = pointed === null;
  if (pointed === null) return;
  const left = place.x(last - pointed);
  drawn.pointer.setAttribute("x", left);
  show(
    tip,
    el("strong", null, span(bucket, drawn.step), bucket.running && el("em", null, " so far")),
    el(
      "dl",
      null,
      drawn.kinds.toReversed().filter((kind) => bucket.received[kind]).map((kind) => row(kind.toLowerCase(), kind, bucket.received[kind])),
      el("div.sum", null, el("dt", null, "received"), el("dd", null, count(bucket.sum))),
      row("line", "delivered", bucket.delivered),
      bucket.failed > 0 && row("fell", "failed", bucket.failed),
    ),
    el("p", null, `${perMinute(bucket.sum / bucket.length)} a minute`),
  );
  // Beside the selected bucket.
  const right = left + place.wide + 14;
  const beside = right + tip.offsetWidth <= place.width ? right : left - tip.offsetWidth - 14;
  tip.style.left = `${Math.max(0, beside)}px`;
}

const row = (swatch, name, value) => el("div", null, el("dt", null, el(`i.swatch.${swatch}`), name), el("dd", null, count(value)));

/** The chart's place in a view. */
export function frame() {
  return el(
    "div.chart",
    { id: "chart", "data-own": true },
    el("div.slider", { id: "chart-slider", role: "slider", tabindex: 0, "aria-label": "Events a minute, by time", "aria-valuemin": 0, "aria-valuemax": 0, "aria-valuenow": 0 }),
    el("div.tip", { id: "chart-tip", hidden: true, "aria-hidden": "true" }),
    el("div.none", { id: "chart-none" }),
  );
}

function under(event) {
  const { left } = byId("chart").getBoundingClientRect();
  const share = (event.clientX - left - place.edge) / (place.width - place.edge - EDGE.right);
  const index = Math.floor(share * drawn.all.length);
  return drawn.all.length - 1 - index;
}

/** Makes the chart usable by pointer and keyboard. */
export function listen(root) {
  root.addEventListener("pointermove", (event) => {
    if (event.target.id === "chart-slider" && drawn) point(under(event));
  });
  root.addEventListener("pointerdown", (event) => {
    if (event.target.id === "chart-slider" && drawn) point(under(event));
  });
  root.addEventListener("pointerout", (event) => {
    if (event.target.id === "chart-slider" && event.pointerType === "mouse" && document.activeElement !== event.target) point(null);
  });
  root.addEventListener("focusin", (event) => {
    if (event.target.id === "chart-slider" && pointed === null) point(0);
  });
  root.addEventListener("focusout", (event) => {
    if (event.target.id === "chart-slider") point(null);
  });
  root.addEventListener("keydown", (event) => {
    if (event.target.id !== "chart-slider" || !drawn) return;
    const last = drawn.all.length - 1;
    const to = { ArrowLeft: pointed + 1, ArrowDown: pointed + 1, ArrowRight: pointed - 1, ArrowUp: pointed - 1, PageUp: pointed + 10, PageDown: pointed - 10, Home: last, End: 0 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    point(to);
  });
}
