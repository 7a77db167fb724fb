// The theme that was chosen, before anything is painted: as the system, light, or dark.
"use strict";

const THEMES = ["system", "light", "dark"];

/** What is remembered under `key`; nothing where the browser remembers nothing. */
function remembered(key) {
  try {
    return localStorage.getItem(key);
  } catch {
    return null;
  }
}

function applyTheme() {
  const chosen = remembered("theme");
  document.documentElement.dataset.theme = THEMES.includes(chosen) ? chosen : "system";
}

applyTheme();
// Another tab may have changed it.
addEventListener("storage", applyTheme);
