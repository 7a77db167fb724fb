// The theme that was chosen, before anything is painted: as the system, light, or dark.
"use strict";

const THEMES = ["system", "light", "dark"];

/** What this browser remembers under `key`; nothing where the browser remembers nothing. */
function remembered(key) {
  try {
    return localStorage.getItem(key);
  } catch {
    return null;
  }
}

/** Remembers it, as long as the browser does; `null` forgets. */
function remember(key, value) {
  try {
    if (value === null) localStorage.removeItem(key);
    else localStorage.setItem(key, value);
  } catch {
    // It is so for as long as the page is open.
  }
}

function applyTheme() {
  const chosen = remembered("theme");
  document.documentElement.dataset.theme = THEMES.includes(chosen) ? chosen : "system";
}

applyTheme();
// Another tab may have changed it.
addEventListener("storage", applyTheme);
