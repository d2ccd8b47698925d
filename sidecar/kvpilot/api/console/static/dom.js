// Elements made and changed. Text goes in as text, always: names come from callers that nobody vetted.

const SVG = "http://www.w3.org/2000/svg";

export const byId = (id) => document.getElementById(id);

/** An element with attributes (`class`, `data-x`, ...) and children: nodes, or text. */
export function el(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

export function svg(tag, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

/** Set text, only where it changed: layout and screen readers are left in peace. */
export function say(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

export function mark(node, name, value) {
  if (node.getAttribute(name) !== String(value)) node.setAttribute(name, value);
}

/** A list of texts as `li`, kept in place. */
export function lines(list, texts) {
  while (list.children.length > texts.length) list.lastChild.remove();
  while (list.children.length < texts.length) list.append(el("li"));
  texts.forEach((text, i) => say(list.children[i], text));
}

/** The same, with what stands before the first colon in bold. */
export function boldLines(list, texts) {
  lines(list, []);
  for (const text of texts) {
    const at = text.indexOf(": ");
    list.append(at < 0 ? el("li", {}, text) : el("li", {}, el("b", {}, text.slice(0, at)), text.slice(at)));
  }
}

/** Tell people who listen. */
export function announce(text) {
  byId("said").textContent = text;
}
