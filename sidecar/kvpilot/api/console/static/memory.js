// KV memory as a map: one cell is so many blocks, in the order of the table beside it. Neighbours alternate
// between two shades, and whoever is pointed at in either place stands out in the other.

import { byId, el, mark, say } from "./dom.js";
import { number, percent } from "./format.js";
import { colour, onTheme } from "./theme_colours.js";

const GAP = 2;
const LEAST_CELL = 9;
let parts = [];
let chosen = null;
let signature = "";
let cells = { columns: 1, rows: 1, size: LEAST_CELL };

export function startMemory() {
  const canvas = byId("blocks");
  canvas.addEventListener("pointermove", (event) => choose(partAt(event)));
  canvas.addEventListener("pointerleave", () => choose(null));
  new ResizeObserver(() => draw()).observe(canvas);
  onTheme(draw);
}

export function showMemory(memory) {
  const sum = byId("memory-sum");
  if (memory.missing) {
    parts = [];
    say(sum, memory.missing);
    rows([]);
    draw();
    return;
  }
  parts = divide(memory);
  const bytes = memory.blocks * memory.block_bytes;
  const size = bytes >= 2 ** 20 ? `, ${number(Math.round(bytes / 2 ** 20))} MiB` : "";
  const now = JSON.stringify(parts);
  if (now === signature) return;
  signature = now;
  const shared = memory.shared ? `, ${number(memory.shared)} shared` : "";
  const waste = memory.tail_waste_blocks ? `, ${percent(memory.tail_waste_blocks / Math.max(1, memory.held))} of that unfilled` : "";
  say(sum, `${percent(memory.held / memory.blocks)} held of ${number(memory.blocks)} blocks of ${memory.block_tokens} tokens${size}${shared}${waste}`);
  rows(parts);
  draw();
  const words = parts.map((part) => `${part.name} ${percent(part.blocks / memory.blocks)}`).join(", ");
  mark(byId("blocks"), "aria-label", `KV blocks: ${words}`);
}

/** What fills the map, in order: [{name, kind, blocks, share, running, waiting}]. */
function divide(memory) {
  const found = [];
  const add = (name, kind, blocks, more = {}) => found.push({ name, kind, blocks, share: blocks / memory.blocks, ...more });
  let sum = 0;
  memory.tenants.forEach((row, i) => {
    add(row.name, i % 2 ? "held-alt" : "held", row.blocks, { running: row.running, waiting: row.waiting });
    sum += row.blocks;
  });
  // Sharers of one block each count it: the map shows every block once.
  const scale = sum > memory.held ? memory.held / sum : 1;
  found.forEach((part) => { part.drawn = part.blocks * scale; });
  if (memory.unattributed) add(memory.tenants.length ? "Unattributed" : "Held", memory.tenants.length ? "rest" : "held", memory.unattributed);
  if (memory.cached !== null) add("Cached", "cached", memory.cached);
  add("Free", "free", memory.free);
  return found.map((part) => ({ drawn: part.blocks, ...part }));
}

function rows(all) {
  const body = byId("holders").tBodies[0];
  while (body.rows.length > all.length) body.deleteRow(-1);
  all.forEach((part, i) => {
    const row = body.rows[i] || body.appendChild(makeRow(i));
    const [name, ...figures] = row.cells;
    mark(name.querySelector(".swatch"), "data-kind", part.kind);
    say(name.querySelector(".name"), part.name);
    mark(name, "title", part.name);
    const texts = [number(part.blocks), percent(part.share), part.running ?? "", part.waiting ?? ""];
    figures.forEach((cell, j) => say(cell, String(texts[j])));
  });
}

function makeRow(index) {
  const button = el("button", { type: "button" }, el("i", { class: "swatch" }), el("span", { class: "name" }));
  const row = el("tr", {}, el("td", {}, button), el("td"), el("td"), el("td"), el("td"));
  row.addEventListener("pointerenter", () => choose(index));
  row.addEventListener("pointerleave", () => choose(null));
  button.addEventListener("focus", () => choose(index));
  button.addEventListener("blur", () => choose(null));
  return row;
}

function choose(index) {
  if (index === chosen) return;
  chosen = index;
  [...byId("holders").tBodies[0].rows].forEach((row, i) => row.classList.toggle("chosen", i === index));
  draw();
}

function draw() {
  const canvas = byId("blocks");
  const width = canvas.clientWidth, height = canvas.clientHeight, ratio = devicePixelRatio || 1;
  if (!width || !height) return;
  if (canvas.width !== Math.round(width * ratio)) canvas.width = Math.round(width * ratio);
  if (canvas.height !== Math.round(height * ratio)) canvas.height = Math.round(height * ratio);
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, width, height);
  const total = parts.reduce((sum, part) => sum + part.drawn, 0);
  if (!total) return;
  cells = grid(width, height, total);
  const count = cells.columns * cells.rows;
  let before = 0;
  parts.forEach((part, index) => {
    const first = Math.round((before / total) * count);
    before += part.drawn;
    part.last = Math.round((before / total) * count);
    context.globalAlpha = chosen === null || chosen === index ? 1 : 0.25;
    paint(context, part, first);
  });
  context.globalAlpha = 1;
}

/** Cells that fill the canvas: as many as there are blocks, fewer where they would be too small to see. */
function grid(width, height, total) {
  const size = Math.max(LEAST_CELL, Math.floor(Math.sqrt((width * height) / total)));
  return { columns: Math.floor((width + GAP) / size), rows: Math.floor((height + GAP) / size), size };
}

function paint(context, part, first) {
  const { rows: high, size } = cells;
  context.fillStyle = colour[part.kind === "cached" ? "reference" : part.kind === "rest" ? "held" : part.kind];
  context.strokeStyle = colour.free;
  context.lineWidth = 1.2;
  for (let cell = first; cell < part.last; cell++) {
    // Down each column: a holder is a band.
    const x = Math.floor(cell / high) * size, y = (cell % high) * size, side = size - GAP;
    if (part.kind === "free") context.strokeRect(x + 0.6, y + 0.6, side - 1.2, side - 1.2);
    else if (part.kind === "rest") context.fillRect(x, y + side / 4, side, side / 2);
    else context.fillRect(x, y, side, side);
  }
}

function partAt(event) {
  const { columns, rows: high, size } = cells;
  const column = Math.floor(event.offsetX / size), row = Math.floor(event.offsetY / size);
  if (column >= columns || row >= high) return null;
  const found = parts.findIndex((part) => column * high + row < part.last);
  return found < 0 ? null : found;
}
