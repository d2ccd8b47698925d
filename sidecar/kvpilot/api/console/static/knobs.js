// Each knob as a dial: where it is, where its baseline is, who holds it, and for how long without the pilot.

import { byId, el, mark, say, svg } from "./dom.js";
import { number, seconds } from "./format.js";

const SWEEP = 260, FROM = -130, RADIUS = 38, X = 60, Y = 48;
const LOG_FROM = 64;
const dials = new Map();
let held = [];
let at = 0;

export function showKnobs(frame) {
  at = performance.now();
  held = [];
  for (const name of dials.keys()) if (!(name in frame.knobs)) { dials.get(name).root.remove(); dials.delete(name); }
  for (const [name, knob] of Object.entries(frame.knobs)) {
    if (!dials.has(name)) dials.set(name, make(name, knob));
    const leases = frame.leases.filter((lease) => lease.knob === name);
    const orders = frame.overrides.filter((order) => order.knob === name);
    show(dials.get(name), knob, leases, orders);
  }
}

/** With the stream gone, leases run out: this counts them down. `gone_s` null while frames come. */
export function countDown(gone) {
  const past = (performance.now() - at) / 1000;
  for (const { node, ttl, text } of held) {
    const left = gone ? Math.max(0, ttl - past) : ttl;
    say(node, gone ? (left > 0 ? `lease runs out in ${left.toFixed(0)} s` : "lease has run out: baseline") : text);
  }
}

const turn = (knob, value) => {
  const low = knob.minimum, high = knob.maximum;
  if (high <= low) return 0;
  const logarithmic = low > 0 && high / low > LOG_FROM;
  const ratio = logarithmic ? Math.log(value / low) / Math.log(high / low) : (value - low) / (high - low);
  return Math.min(1, Math.max(0, ratio));
};

const spot = (ratio, radius) => {
  const angle = ((FROM + SWEEP * ratio) * Math.PI) / 180;
  return [X + radius * Math.sin(angle), Y - radius * Math.cos(angle)];
};

function arc() {
  const [x1, y1] = spot(0, RADIUS), [x2, y2] = spot(1, RADIUS);
  return `M${x1.toFixed(2)} ${y1.toFixed(2)}A${RADIUS} ${RADIUS} 0 1 1 ${x2.toFixed(2)} ${y2.toFixed(2)}`;
}

function make(name, knob) {
  const path = { d: arc(), fill: "none", "stroke-width": 8, pathLength: 100 };
  const bar = svg("path", { ...path, class: "arc" });
  const value = svg("text", { x: X, y: Y + 6 });
  const home = svg("line", { class: "home", "stroke-width": 2.2 });
  const [left, right] = [spot(0, RADIUS), spot(1, RADIUS)];
  const picture = svg("svg", { viewBox: "0 0 120 92", role: "img" },
    svg("path", { ...path, class: "rail" }), bar, home, value,
    svg("text", { x: X, y: Y + 19, class: "unit" }, knob.unit),
    svg("text", { x: left[0] - 1, y: left[1] + 14, class: "ends" }, number(knob.minimum)),
    svg("text", { x: right[0] + 1, y: right[1] + 14, class: "ends" }, number(knob.maximum)));
  const lease = el("p", { class: "lease" }), by = el("p", { class: "by" });
  const root = el("article", { class: "dial" }, el("h3", {}, ...breakable(name)), picture, lease, by);
  root.title = knob.meaning || name;
  byId("dials").append(root);
  return { name, root, bar, home, value, picture, lease, by };
}

/** A name that may break after each underscore. */
const breakable = (name) => name.split("_").flatMap((part, i) => (i ? ["_", el("wbr"), part] : [part]));

function show(dial, knob, leases, orders) {
  const scoped = knob.value === null || knob.value === undefined;
  const value = scoped ? foremost(knob, leases) : knob.value;
  const [here, home] = [turn(knob, value), turn(knob, knob.baseline)];
  // The arc runs from baseline to where the knob is: its length is how far the pilot has gone.
  const [from, to] = here < home ? [here, home] : [home, here];
  const length = Math.max(0.8, (to - from) * 100);
  mark(dial.bar, "stroke-dasharray", `0 ${(from * 100).toFixed(1)} ${length.toFixed(1)} 200`);
  const [x1, y1] = spot(home, RADIUS - 7), [x2, y2] = spot(home, RADIUS + 7);
  for (const [key, number] of Object.entries({ x1, y1, x2, y2 })) mark(dial.home, key, number.toFixed(1));
  say(dial.value, number(value));
  mark(dial.root, "data-held", leases.length ? "yes" : "no");
  mark(dial.root, "data-person", orders.length ? "yes" : "no");
  const text = leaseText(leases, orders, value, knob);
  say(dial.lease, text);
  if (leases.length && !orders.length) held.push({ node: dial.lease, ttl: Math.max(...leases.map((each) => each.ttl_s)), text });
  say(dial.by, orders.length ? `by ${orders[0].who}: ${orders[0].why || "no reason given"}`
    : leases.map((each) => `${each.policy}/${each.rule}${each.scope === "all" ? "" : ` (${each.scope})`}`).join(", "));
  mark(dial.picture, "aria-label", `${dial.name} is ${number(value)} ${knob.unit}, baseline ${number(knob.baseline)}`);
}

/** Of a knob that works by scope: the value furthest from baseline, or the baseline. */
function foremost(knob, leases) {
  const values = [...Object.values(knob.scopes), ...leases.map((each) => each.value)];
  return values.reduce((a, b) => (Math.abs(b - knob.baseline) > Math.abs(a - knob.baseline) ? b : a), knob.baseline);
}

function leaseText(leases, orders, value, knob) {
  if (orders.length) return `a person's for ${seconds(orders[0].left_s)} more`;
  if (!leases.length) return value === knob.baseline ? "at baseline" : "on its way to baseline";
  const ttl = Math.max(...leases.map((each) => each.ttl_s));
  const sure = leases.every((each) => each.confirmed) ? "" : ", not confirmed yet";
  return `leased, ${seconds(ttl)} at a time${sure}`;
}
