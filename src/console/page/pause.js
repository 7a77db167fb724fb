// Pausing deliveries: the banner while they are paused, and the question for how long.

import { post } from "./daemon.js";
import { byId, el, show } from "./dom.js";
import { at } from "./format.js";

/** Shows above every view that deliveries are paused, if they are. */
export function banner(pause) {
  byId("held").hidden = pause === null;
  if (pause === null) return show(byId("held"));
  show(
    byId("held"),
    el("p", null, el("b", null, "Deliveries are paused."), " BigChat is still polled. Nothing is sent to OurAPI until ", pause.until === null ? "you resume." : [at(pause.until), "."]),
    el("button", { type: "button", "data-do": "resume" }, "Resume"),
  );
}

export const pauseButton = () => el("button.quiet", { type: "button", "data-do": "pause" }, "Pause deliveries…");

/** For how long, in seconds; "": until an operator resumes; null: not at all. */
function askLength() {
  const dialog = byId("pause");
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "yes" ? byId("pause-for").value : null), { once: true });
  });
}

export const pauseActions = {
  async pause(_, page) {
    const seconds = await askLength();
    if (seconds === null) return;
    await post("/api/pause", seconds === "" ? {} : { seconds: Number(seconds) });
    page.announce("Deliveries are paused.");
    await page.refresh();
  },
  async resume(_, page) {
    await post("/api/resume");
    page.announce("Deliveries resume.");
    await page.refresh();
  },
};
