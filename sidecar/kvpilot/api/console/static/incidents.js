// Recordings of engine starts, and a scrubber over the one that was opened.

import { chart } from "./charts.js";
import { byId, el, say } from "./dom.js";
import { number, percent, seconds } from "./format.js";

const stamp = new Intl.DateTimeFormat("en-GB", { dateStyle: "medium", timeStyle: "medium" });
const when = (wall_ns) => (wall_ns ? stamp.format(new Date(wall_ns / 1e6)) : "never stepped");
let nonce = null;
let drawn = [];

export function startIncidents() {
  list();
}

/** Another start of the engine: the list has changed. */
export function showIncidents(engine) {
  const now = `${engine.nonce}/${engine.state === "dead"}`;
  if (nonce !== null && now !== nonce) list();
  nonce = now;
}

async function ask(path) {
  const answer = await fetch(path);
  const told = await answer.json();
  if (!answer.ok) throw new Error(told.error);
  return told;
}

async function list() {
  const place = byId("starts");
  let starts;
  try {
    starts = await ask("console/incidents");
  } catch (error) {
    place.replaceChildren(el("p", { class: "empty" }, error.message));
    return;
  }
  if (!starts.length) {
    place.replaceChildren(el("p", { class: "empty" }, "No start of this engine was recorded yet."));
    return;
  }
  const head = ["Start", "Began", "Last sign of life", "Steps", "How it ended", ""];
  const soft = [3];
  place.replaceChildren(el("table", {},
    el("caption", { class: "unseen" }, "Starts whose recordings are kept"),
    el("thead", {}, el("tr", {}, ...head.map((text, i) => el("th", { scope: "col", class: soft.includes(i) ? "soft" : null }, text)))),
    el("tbody", {}, ...starts.map(row))));
}

function row(start) {
  const button = el("button", { type: "button", "aria-label": `Open the recording of ${start.nonce}` }, "Open");
  button.addEventListener("click", () => open(start.nonce));
  const ended = start.problem || (start.alive ? "it lives" : start.ending ? `${start.ending.kind}${start.ending.what.length ? `: ${start.ending.what.at(-1)}` : ""}` : "without a word");
  return el("tr", {}, el("td", {}, el("code", {}, start.nonce.slice(0, 8))), el("td", {}, when(start.start_wall_ns)),
    el("td", {}, when(start.last_wall_ns)), el("td", { class: "soft" }, number(start.steps)), el("td", {}, ended),
    el("td", {}, start.problem ? "" : button));
}

async function open(start) {
  const place = byId("case");
  place.hidden = false;
  place.replaceChildren(el("p", { class: "note" }, "reading the recording"));
  drawn.splice(0).forEach((each) => each.drop());
  let told;
  try {
    told = await ask(`console/incidents/${start}`);
  } catch (error) {
    place.replaceChildren(el("p", { class: "empty" }, error.message));
    return;
  }
  show(place, told);
}

function show(place, told) {
  const close = el("button", { type: "button", class: "close" }, "Close");
  close.addEventListener("click", () => { place.hidden = true; });
  const facts = [told.why, ...told.evidence].filter(Boolean);
  place.replaceChildren(
    el("div", { class: "casehead" }, el("p", { class: "headline", tabindex: "-1" }, told.headline), close),
    el("ul", { class: "facts" }, ...facts.map((text) => el("li", {}, text))));
  place.querySelector(".headline").focus();
  if (!told.rows.length) {
    place.append(el("p", { class: "empty" }, "It never made a step."));
    return;
  }
  const column = (name) => told.rows.map((each) => each[told.columns.indexOf(name)]);
  const times = column("wall_s");
  const draw = (title, options, names) => {
    const cell = el("div", { class: "cell" }, el("h3", {}, title));
    place.append(cell);
    drawn.push(chart(cell, { height: 96, label: title, ...options }));
    drawn.at(-1).set([times, ...names.map(column)]);
  };
  draw("Share of KV memory held", { lines: [{ label: "held", stroke: "trace", fill: true }], top: 1, format: percent }, ["kv_used"]);
  draw("Longest step", { lines: [{ label: "step", stroke: "trace" }], format: (v) => seconds(v) }, ["step_max_s"]);
  draw("Running, and waiting (dashed)", { lines: [{ label: "running", stroke: "trace" }, { label: "waiting", stroke: "caution", dash: [4, 3] }], format: number }, ["running", "waiting"]);
  scrubber(place, told);
}

function scrubber(place, told) {
  const last = told.rows.length - 1;
  const slider = el("input", { type: "range", id: "scrub", min: 0, max: last, step: 1, value: last, "aria-label": "Moment of the recording" });
  const at = el("p", { class: "at" }), moments = el("ul", { class: "moments" });
  const lines = drawn.map((each) => {
    const line = el("i", { class: "scrubline" });
    each.plot.over.append(line);
    return line;
  });
  const move = () => {
    const row = told.rows[slider.value], of = (name) => row[told.columns.indexOf(name)];
    const before = told.end_wall_s - of("wall_s");
    const parts = [["", `${seconds(Math.max(0, before))} before the end`], ["KV held", of("kv_used") === null ? "unknown" : percent(of("kv_used"))],
      ["running", number(of("running"))], ["waiting", number(of("waiting"))],
      ["longest step", of("step_max_s") === null ? "none" : seconds(of("step_max_s"))],
      ...told.knobs.map((name) => [name, number(of(`knob.${name}`))])];
    at.replaceChildren(...parts.map(([name, text]) => el("span", {}, name ? `${name} ` : "", el("b", {}, text))));
    slider.setAttribute("aria-valuetext", parts.slice(0, 5).map((each) => each.join(" ")).join(", "));
    drawn.forEach((each, i) => { lines[i].style.transform = `translateX(${each.plot.valToPos(of("wall_s"), "x")}px)`; });
    const near = told.moments.filter((each) => each.wall_s <= of("wall_s") + 0.05).slice(-4).reverse();
    moments.replaceChildren(...near.map((each) => el("li", {}, `${seconds(Math.max(0, told.end_wall_s - each.wall_s))} before the end: ${each.text}`)));
  };
  slider.addEventListener("input", move);
  place.append(slider, at, moments);
  move();
}
