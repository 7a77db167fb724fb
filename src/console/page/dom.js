// Elements, and updating the page.
//
// All content is made here from elements and text nodes, so that foreign text stays text. A view makes its complete
// content each time, and `show` changes only what differs. So focus, scroll position, open details and a screen
// reader's position stay as they are.

const SVG = "http://www.w3.org/2000/svg";

/** An element: `el("p.muted", { title: "…" }, "text", child, …)`. Null, undefined and false are left out. */
export function el(name, attributes, ...children) {
  return make((tag) => document.createElement(tag), name, attributes, children);
}

/** The same in SVG. */
export function svg(name, attributes, ...children) {
  return make((tag) => document.createElementNS(SVG, tag), name, attributes, children);
}

function make(create, name, attributes, children) {
  const [tag, ...classes] = name.split(".");
  const element = create(tag);
  if (classes.length > 0) element.setAttribute("class", classes.join(" "));
  for (const [key, value] of Object.entries(attributes ?? {})) {
    if (value === null || value === undefined || value === false) continue;
    element.setAttribute(key, value === true ? "" : String(value));
  }
  append(element, children);
  return element;
}

function append(element, children) {
  for (const child of children) {
    if (child === null || child === undefined || child === false) continue;
    if (Array.isArray(child)) append(element, child);
    else if (child instanceof Node) element.append(child);
    else element.append(...visible(String(child)));
  }
}

// Control characters, bidirectional overrides and other characters without a glyph. They would be invisible, or change
// how the text around them is shown. Line breaks, joiners and variation selectors are ordinary text.
const SPECIAL = /\r(?!\n)|[[\p{Cc}\p{Cs}\p{Zl}\p{Zp}\p{Default_Ignorable_Code_Point}]--[\n\r\t\u200c\u200d\p{Variation_Selector}]]/gv;

/** A text in pieces, with a mark in place of each special character. */
function visible(text) {
  const pieces = [];
  let from = 0;
  for (const { 0: character, index } of text.matchAll(SPECIAL)) {
    pieces.push(text.slice(from, index), el("mark.special", { title: "invisible character" }, codePoint(character)));
    from = index + character.length;
  }
  pieces.push(text.slice(from));
  return pieces.filter((piece) => piece !== "");
}

/** The same as a single string, for places that cannot contain elements. */
export const visibleText = (text) => text.replace(SPECIAL, codePoint);

const codePoint = (character) => `U+${character.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}`;

/** One of the icons in the page. */
export function icon(name) {
  return svg("svg.i", { "aria-hidden": "true" }, svg("use", { href: `#i-${name}` }));
}

/** Makes `children` the content of `parent`. */
export function show(parent, ...children) {
  const next = document.createElement("div");
  append(next, children);
  patchChildren(parent, next);
}

// Children with a `data-key` are matched by it, the others by position.
function patchChildren(parent, next) {
  const keyed = new Map();
  for (const child of parent.children) {
    if (child.dataset.key !== undefined) keyed.set(child.dataset.key, child);
  }
  let at = parent.firstChild;
  for (const wanted of [...next.childNodes]) {
    const key = wanted.dataset?.key;
    const there = key === undefined ? at : keyed.get(key);
    if (there && alike(there, wanted)) {
      if (there === at) at = at.nextSibling;
      else parent.insertBefore(there, at);
      patch(there, wanted);
    } else {
      parent.insertBefore(wanted, at);
    }
  }
  while (at) {
    const gone = at;
    at = at.nextSibling;
    gone.remove();
  }
}

function alike(one, other) {
  return one.nodeName === other.nodeName && one.dataset?.key === other.dataset?.key;
}

function patch(there, wanted) {
  if (there.nodeType !== Node.ELEMENT_NODE) {
    if (there.nodeValue !== wanted.nodeValue) there.nodeValue = wanted.nodeValue;
    return;
  }
  for (const { name } of [...there.attributes]) {
    if (!wanted.hasAttribute(name) && !isTheReaders(there, name)) there.removeAttribute(name);
  }
  for (const { name, value } of wanted.attributes) {
    if (there.getAttribute(name) !== value && !isTheReaders(there, name)) there.setAttribute(name, value);
  }
  if (there instanceof HTMLInputElement) there.checked = wanted.checked;
  // Another module draws the content.
  if (there.dataset.own === undefined) patchChildren(there, wanted);
}

/** Whether the user, not the view, sets this attribute: open details, or the focused entry of a list. */
function isTheReaders(element, attribute) {
  return (attribute === "open" && element.nodeName === "DETAILS") || (attribute === "tabindex" && element.dataset.step !== undefined);
}

/** The element with this id in the page. */
export const byId = (id) => document.getElementById(id);
