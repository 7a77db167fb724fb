// Applies the chosen theme (system, light or dark) before anything is painted.
"use strict";

const THEMES = ["system", "light", "dark"];

/** The value stored by this browser for `key`, if it stores any. */
function remembered(key) {
  try {
    return localStorage.getItem(key);
  } catch {
    return null;
  }
}

/** Stores the value in this browser; `null` deletes it. */
function remember(key, value) {
  try {
    if (value === null) localStorage.removeItem(key);
    else localStorage.setItem(key, value);
  } catch {
    // The choice lasts as long as the page is open.
  }
}

function applyTheme() {
  const chosen = remembered("theme");
  document.documentElement.dataset.theme = THEMES.includes(chosen) ? chosen : "system";
}

applyTheme();
// Another tab may have changed the theme.
addEventListener("storage", applyTheme);
