// Latency of each class against its target, throughput, queue and memory over the last ten minutes.

import { chart } from "./charts.js";
import { byId, el, mark, say } from "./dom.js";
import { number, percent, reasonOf, seconds, valueOf } from "./format.js";

const MEASURES = [["itl_seconds", "itl", "ITL"], ["ttft_seconds", "ttft", "TTFT"]];
const MOST_POINTS = 600;
let columns = [];
let data = [];
let targets = {};
const drawn = [];

export function takeHistory(history) {
  columns = history.columns;
  data = columns.map(() => []);
  history.points.forEach(push);
  redraw();
}

export function takePoint(point) {
  if (point[0] === null) return;
  push(point);
  redraw();
}

function push(point) {
  const last = data[0]?.[data[0].length - 1];
  if (!data.length || point[0] === null || (last !== undefined && point[0] <= last)) return;
  point.forEach((value, i) => {
    data[i].push(typeof value === "string" ? null : value);
    if (data[i].length > MOST_POINTS) data[i].shift();
  });
}

const column = (name) => data[columns.indexOf(name)] || data[0].map(() => null);

function redraw() {
  if (!data.length) return;
  for (const each of drawn) each.chart.set([data[0], ...each.names.map(column)]);
}

export function showLatency(frame) {
  if (JSON.stringify(frame.slo) !== JSON.stringify(targets)) {
    targets = frame.slo;
    build();
  }
  for (const klass of Object.keys(targets)) {
    for (const [name, key, said] of MEASURES) showCell(frame.signals[name], klass, key, said);
  }
  showLoad(frame.signals);
}

function build() {
  drawn.splice(0).forEach((each) => each.chart.drop());
  byId("classes").replaceChildren();
  byId("load").replaceChildren();
  byId("occupancy").replaceChildren();
  // Highest class first: whose promises are tightest.
  for (const klass of Object.keys(targets).reverse()) {
    const row = el("div", { class: "klass" }, el("b", {}, klass));
    for (const [name, key, said] of MEASURES) {
      const cell = el("div", { class: "cell", "data-cell": `${klass}/${key}` },
        el("p", {}, el("span", {}, `${said} `, el("strong"), " ", el("span", { class: "target" }))));
      row.append(cell);
      const lines = [{ label: said, stroke: "trace", fill: true }];
      byId("classes").append(row);
      add(cell, { lines, height: 72, limit: () => targets[klass]?.[key] ?? null, format: seconds, label: `${said} of ${klass}` }, [`${name}/${klass}`]);
    }
  }
  const load = (title, options, names) => {
    const cell = el("div", { class: "cell" }, el("h3", {}, title));
    byId("load").append(cell);
    add(cell, { height: 84, format: number, label: title, ...options }, names);
  };
  load("Output tokens per second", { lines: [{ label: "tokens/s", stroke: "trace", fill: true }] }, ["decode_tokens"]);
  load("Running, and waiting (dashed)", {
    lines: [{ label: "running", stroke: "trace" }, { label: "waiting", stroke: "caution", dash: [4, 3] }],
  }, ["requests_running", "requests_waiting"]);
  byId("occupancy").append(el("h3", {}, "Share of KV memory held, last ten minutes"));
  add(byId("occupancy"), { lines: [{ label: "held", stroke: "trace", fill: true }], height: 122, top: 1, format: percent, label: "KV memory held" }, ["kv_occupancy"]);
  redraw();
}

function add(place, options, names) {
  drawn.push({ chart: chart(place, options), names });
}

function showCell(signal, klass, key, said) {
  const cell = document.querySelector(`[data-cell="${CSS.escape(`${klass}/${key}`)}"]`);
  if (!cell) return;
  const strong = cell.querySelector("strong");
  const mine = signal?.classes?.[klass];
  const value = valueOf(mine), target = targets[klass][key];
  const late = value !== null && value > target;
  mark(strong, "class", value === null ? "missing" : late ? "late" : "");
  say(strong, value === null ? reasonOf(mine) : seconds(value));
  say(cell.querySelector(".target"), `${value === null ? "target" : late ? "over" : "of"} ${seconds(target)}`);
  const box = cell.querySelector("[role=img]");
  mark(box, "aria-label", `${said} p95 of ${klass}: ${value === null ? reasonOf(mine) : seconds(value)}, target ${seconds(target)}`);
}

function showLoad(signals) {
  const parts = [["decode_tokens", "tokens/s"], ["requests_running", "running"], ["requests_waiting", "waiting"], ["shed", "shed/s"], ["preemptions", "preempted/s"]]
    .map(([name, unit]) => [valueOf(signals[name]), unit])
    .filter(([value, unit]) => value !== null && !(value === 0 && /shed|preempted/.test(unit)))
    .map(([value, unit]) => `${number(value >= 100 ? Math.round(value) : value)} ${unit}`);
  say(byId("load-sum"), parts.join(" · "));
}
