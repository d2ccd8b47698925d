// The three answers, and the axis on which memory runs out.

import { announce, boldLines, byId, lines, mark, say, svg } from "./dom.js";
import { seconds, valueOf } from "./format.js";

const ENDS = [1, 3600];
const TICKS = [[1, "1 s"], [10, "10 s"], [60, "1 min"], [600, "10 min"], [3600, "1 h"]];
const LEFT = 8, WIDTH = 250, LASTS = 292, MIDDLE = 14;
let axis = null;

export function showAnswers(frame) {
  const changes = [];
  for (const [name, answer] of Object.entries(frame.answers)) {
    const card = byId(`answer-${name}`);
    // Figures change all the time: who listens is told when it gets better or worse.
    if (card.dataset.level && card.dataset.level !== answer.level) changes.push(`${card.querySelector("h2").textContent}: ${answer.title}`);
    mark(card, "data-level", answer.level);
    say(card.querySelector(".title"), answer.title);
    const list = card.querySelector("ul"), now = answer.lines.join("\n");
    if (list.dataset.said === now) continue;
    list.dataset.said = now;
    (name === "doing" ? boldLines : lines)(list, answer.lines);
  }
  if (changes.length) announce(changes.join("; "));
  showExhaustion(frame.signals);
}

const place = (s) => {
  if (s === Infinity) return LASTS;
  const [low, high] = ENDS.map(Math.log);
  return LEFT + WIDTH * Math.min(1, Math.max(0, (Math.log(Math.max(s, 1e-3)) - low) / (high - low)));
};

function build() {
  const root = svg("svg", { viewBox: "0 0 312 38", role: "img", class: "axis", width: "100%" });
  root.append(svg("line", { x1: LEFT, x2: LASTS, y1: MIDDLE, y2: MIDDLE, class: "rail" }));
  root.append(svg("text", { x: LASTS, y: 33, "text-anchor": "middle" }, "lasts"));
  for (const [at, text] of TICKS) {
    const x = place(at);
    const anchor = at === ENDS[0] ? "start" : "middle";
    root.append(svg("line", { x1: x, x2: x, y1: MIDDLE - 4, y2: MIDDLE + 4, class: "tick" }));
    root.append(svg("text", { x, y: 33, "text-anchor": anchor }, text));
  }
  const band = svg("rect", { y: MIDDLE - 5, height: 10, rx: 5, class: "band" });
  const point = svg("path", { d: "M0-9 7 0 0 9-7 0Z", class: "point" });
  root.append(band, point);
  byId("exhaustion").append(root);
  axis = { root, band, point };
}

function showExhaustion(signals) {
  if (!axis) build();
  const of = (name) => valueOf(signals[`forecast.kv_exhaustion${name}_seconds`]);
  const [early, middle, late] = [of("_p10"), of(""), of("_p90")];
  const known = middle !== null && early !== null && early !== Infinity;
  mark(byId("exhaustion"), "data-known", known ? "yes" : "no");
  if (!known) {
    mark(axis.root, "aria-label", middle === null ? "no forecast" : "memory does not run out in sight");
    return;
  }
  const end = late === null ? middle : late;
  mark(axis.band, "x", place(early));
  mark(axis.band, "width", Math.max(4, place(end) - place(early)));
  mark(axis.point, "transform", `translate(${place(middle)} ${MIDDLE})`);
  mark(axis.root, "aria-label", `runs out in ${seconds(middle)}; early ${seconds(early)}, late ${seconds(end)}`);
}
